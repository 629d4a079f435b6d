"""Collectives that torch.compile keeps in its graph and autograd differentiates.

The gradient of every function here is its exact adjoint: summed over the ranks of the axis, what reaches the inputs is
the gradient of the one global loss. A tensor that all ranks hold in full therefore has a *partial* gradient on each of
them, and whoever owns it (FSDP2 for parameters, the adjoint of the next collective for activations) sums the parts.

`gather_output` and `share_gradient` start that off: they stand between the model and a loss that every rank computes in
full, and see to it that each token's loss counts once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

_ops = torch.ops._c10d_functional


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh, as its ranks see it: name of the process group, number of ranks, own place."""

    group: str
    size: int
    rank: int

    @classmethod
    def of(cls, mesh: DeviceMesh) -> "Axis":
        """The axis of a 1-D mesh."""
        group = mesh.get_group()
        return cls(group.group_name, dist.get_world_size(group), dist.get_rank(group))


def gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Joins the ranks' parts along `dim`; the gradient is `scatter_sum`."""
    if axis.size == 1:
        return x
    return _back(_Gather.apply(_rows(x, dim), axis.group, axis.size), dim)


def scatter_sum(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sums over ranks and keeps this rank's part along `dim`; the gradient is `gather`."""
    if axis.size == 1:
        return x
    return _back(_ScatterSum.apply(_rows(x, dim), axis.group, axis.size), dim)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sums over ranks, result on all of them; so is the gradient."""
    return x if axis.size == 1 else _Sum.apply(x.contiguous(), axis.group)


def exchange(x: Tensor, axis: Axis) -> Tensor:
    """Row i of the result is row `axis.rank` of rank i; the first dim counts ranks. The gradient goes the way back."""
    return x if axis.size == 1 else _Exchange.apply(x.contiguous(), axis.group, axis.size)


def gather_output(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Joins parts for a loss that all ranks compute; the gradient is this rank's part of theirs, which are equal."""
    if axis.size == 1:
        return x
    return _back(_GatherOutput.apply(_rows(x, dim), axis.group, axis.size, axis.rank), dim)


def share_gradient(x: Tensor, axis: Axis) -> Tensor:
    """`x` itself, held by all ranks for a loss that all compute; each gets an equal share of the gradient."""
    return x if axis.size == 1 else _ShareGradient.apply(x, axis.size)


# Collectives split and join the first dim. Bringing another one there stays outside the functions below: torch 2.11
# compiles a function that returns a view (which moving dims is for a batch of one) to one whose gradient is zero.
def _rows(x: Tensor, dim: int) -> Tensor:
    return x.movedim(dim, 0).contiguous()


def _back(rows: Tensor, dim: int) -> Tensor:
    return rows.movedim(0, dim).contiguous()


def _all_gather(rows: Tensor, group: str, size: int) -> Tensor:
    return _ops.wait_tensor(_ops.all_gather_into_tensor(rows.contiguous(), size, group))


def _reduce_scatter(rows: Tensor, group: str, size: int) -> Tensor:
    return _ops.wait_tensor(_ops.reduce_scatter_tensor(rows.contiguous(), "sum", size, group))


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", group))


def _all_to_all(rows: Tensor, group: str, size: int) -> Tensor:
    return _ops.wait_tensor(_ops.all_to_all_single(rows.contiguous(), [1] * size, [1] * size, group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _all_gather(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.group, ctx.size), None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return _reduce_scatter(rows, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.group, ctx.size), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
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
        return grad.narrow(0, ctx.rank * ctx.length, ctx.length), None, None, None


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None
