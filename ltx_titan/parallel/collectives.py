"""Differentiable collectives that torch.compile keeps in its graph.

The backward of every function is its exact adjoint: summed over the ranks of the axis, the gradients of the inputs are
those of the one global loss. A replicated tensor therefore has a *partial* gradient on each rank, which FSDP2 (for
parameters) or the adjoint of the next collective (for activations) sums.

`gather_output` and `share_gradient` establish this: they are placed between the model and a loss that every rank
computes in full, and make each token's loss count once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

# Functional collectives: they return new tensors and have fake implementations, so compiled blocks keep them in one
# graph.
_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: name of its process group, number of ranks, this rank's index."""

    group: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Axis":
        """The axis of a 1-D mesh."""
        group = mesh.get_group()
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """All-gathers the ranks' shards along `dim`, [.., n, ..] -> [.., size n, ..]; the adjoint is `scatter_sum`."""
    if axis.size == 1:
        return x
    return _back(_Gather.apply(_rows(x, dim), axis.group, axis.size), dim)


def scatter_sum(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Reduce-scatters: sums over ranks and returns this rank's shard along `dim`; the adjoint is `gather`.

    Args:
        x: partial sums of all rows along `dim`, whose length is a multiple of the axis size.
        dim: dim that is sharded.
        axis: ranks to reduce over.
    """
    if axis.size == 1:
        return x
    return _back(_ScatterSum.apply(_rows(x, dim), axis.group, axis.size), dim)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """All-reduces the sum; the adjoint is the same."""
    return x if axis.size == 1 else _Sum.apply(x.contiguous(), axis.group)


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """All-to-all over the first dim, which has one row per rank: row i of the result is row `axis.rank` of rank i.

    The adjoint is the same.
    """
    return x if axis.size == 1 else _Exchange.apply(x.contiguous(), axis.group, axis.size)


def gather_output(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """All-gathers shards for a loss that all ranks compute; backward takes this rank's shard of the gradient.

    Unlike `gather`, whose adjoint sums over ranks: here all ranks have the whole gradient, and each keeps its part.
    """
    if axis.size == 1:
        return x
    return _back(_GatherOutput.apply(_rows(x, dim), axis.group, axis.size, axis.rank), dim)


def share_gradient(x: Tensor, axis: Axis) -> Tensor:
    """Returns `x`, replicated for a loss that all ranks compute; backward divides the gradient by the axis size."""
    return x if axis.size == 1 else _ShareGradient.apply(x, axis.size)


# Collectives shard the first dim. Another dim is moved there outside of the autograd functions below: torch 2.11
# compiles an autograd function that returns a view (which movedim is for a batch of one) to one whose gradient is zero.
def _rows(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).contiguous()


def _back(rows: Tensor, dim: int) -> Tensor:
    return rows.movedim(0, dim).contiguous()


# These operations return before the data has arrived; `wait_tensor` orders the current stream behind them.
def _all_gather(rows: Tensor, group: str, size: int) -> Tensor:
    return _ops.wait_tensor(_ops.all_gather_into_tensor(rows.contiguous(), size, group))


def _reduce_scatter(rows: Tensor, group: str, size: int) -> Tensor:
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(rows.contiguous(), "sum", size, group))


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def _all_to_all(rows: Tensor, group: str, size: int) -> Tensor:
    # The single-tensor form, because gloo on torch 2.11 lacks the one that takes lists. Each rank sends one row to
    # each.
    return _ops.wait_tensor(_ops.all_to_all_single(rows.contiguous(), [1] * size, [1] * size, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_gather(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Every rank used the whole tensor, so a shard's gradient is the sum of what all ranks contribute to it.
        return _reduce_scatter(grad, ctx.group, ctx.size), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _reduce_scatter(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # This rank's input has a part in every rank's shard, so its gradient is that of all shards.
        return _all_gather(grad, ctx.group, ctx.size), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # The output is replicated, but each rank's gradient of it is partial: it covers the rank's own use of the
        # value.
        return _all_reduce(grad, ctx.group), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_to_all(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad, ctx.group, ctx.size), None, None


class _GatherOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int, rank: int) -> Tensor:
        ctx.rank, ctx.length = rank, rows.shape[0]
        return _all_gather(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # No reduction: every rank has the gradient of the same loss, and a sum would count each token once per rank.
        return grad.narrow(0, ctx.rank * ctx.length, ctx.length), None, None, None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        # A view, unlike in `_rows`, is safe here: velocities leave the model outside of the compiled blocks.
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None
