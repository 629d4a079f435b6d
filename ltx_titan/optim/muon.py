"""Muon: momentum with each matrix's update replaced by the nearest orthogonal matrix.

    M <- m M + (1 - m) G                     U = (1 - m) G + m M                (Nesterov)
    W <- (1 - lr wd) W - lr 0.2 sqrt(max(out, in)) NS(U)

NS is five Newton-Schulz steps X <- a X + b (X X^T) X + c (X X^T)^2 X in bfloat16, which need the whole matrix. The
factor 0.2 sqrt(max) gives updates the size of AdamW's, whose learning rates then fit.

torch.optim.Muon also accepts sharded matrices, but multiplies shards and reduces in bfloat16, so its result depends on
the number of ranks. Here matrices are gathered and distributed: of as many matrices as there are ranks, each rank
orthogonalizes one and broadcasts the result, which equals that of a single process bit for bit.
"""

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ltx_titan.common.tensors import local

# Keller Jordan's coefficients: steepest at zero, singular values end between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


class Muon(Optimizer):
    """Muon, for matrices only; sharded ones must be passed in the same order on all ranks."""

    def __init__(self, params: Iterable[Any], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            assert all(parameter.ndim == 2 for parameter in group["params"]), "Muon is for matrices"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Updates every matrix that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            todo = [parameter for parameter in group["params"] if parameter.grad is not None]
            while todo:
                size = _workers(todo[0])[1]
                # As many at a time as there are ranks: all of them work, and no more whole matrices are in memory than
                # that.
                batch, todo = todo[:size], todo[size:]
                updates = orthogonalize([self._direction(p, group["momentum"]) for p in batch])
                for parameter, update in zip(batch, updates, strict=True):
                    weight = local(parameter)
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    # 0.2 sqrt(max(out, in)) after Liu et al. (2025), "Muon is Scalable for LLM Training".
                    weight.add_(update, alpha=-group["lr"] * 0.2 * sqrt(max(parameter.shape)))

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        average = local(state["momentum"])
        gradient = local(parameter.grad)
        average.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(average, momentum).bfloat16()
        if not isinstance(parameter, DTensor):
            return direction
        mesh, placements = parameter.device_mesh, parameter.placements
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(direction, mesh, placements, run_check=False, shape=shape, stride=stride)


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Applies Newton-Schulz to each matrix and returns this rank's shards.

    Args:
        matrices: bfloat16, plain or sharded alike; at most as many as there are ranks in the group.
    """
    group, size, rank = _workers(matrices[0])
    whole = [matrix.full_tensor() if isinstance(matrix, DTensor) else matrix for matrix in matrices]
    if group is None or size == 1:
        whole = [newton_schulz(matrix) for matrix in whole]
    else:
        if rank < len(whole):
            whole[rank] = newton_schulz(whole[rank])
        for source, matrix in enumerate(whole):
            # In the same order on all ranks, or the collectives would not match.
            dist.broadcast(matrix, src=dist.get_global_rank(group, source), group=group)
    return [_own_shard(full, matrix) for full, matrix in zip(whole, matrices, strict=True)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Approximates U V^T of the matrix's singular value decomposition U S V^T, in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16()
    is_tall = x.shape[0] > x.shape[1]
    x = x.T if is_tall else x  # the Gram matrix of the short side is the smaller one
    # The iteration converges for singular values up to about 1.2; the Frobenius norm bounds the largest.
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).contiguous()


def _workers(matrix: Tensor) -> tuple[dist.ProcessGroup | None, int, int]:
    """Group that distributes the work on matrices sharded like this one: group, its size, this rank's index."""
    if not isinstance(matrix, DTensor):
        return None, 1, 0
    mesh = matrix.device_mesh
    # The longest axis of the mesh; ranks that differ in the other axes do the same work redundantly.
    axis = max(range(mesh.ndim), key=mesh.size)
    return mesh.get_group(axis), mesh.size(axis), mesh.get_local_rank(axis)


def _own_shard(full: Tensor, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, DTensor):
        return full
    return distribute_tensor(full, matrix.device_mesh, matrix.placements, src_data_rank=None).to_local()
