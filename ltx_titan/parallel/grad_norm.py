"""Gradient norms and clipping over sharded parameters.

Everything is done on this rank's shards: lists of thousands of DTensors would keep the host busy with bookkeeping.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# The axes of a mesh that a gradient is split over; None for a plain tensor, which every rank holds whole.
_Split = tuple[DeviceMesh, tuple[int, ...]] | None


@torch.no_grad()
def clip_grad_norm_(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    group_of: Callable[[str], str] = lambda name: "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales all gradients so that their global L2 norm is at most `max_norm`; 0 leaves them alone.

    Parameters may be split differently (some over tp, some not): squares are summed over the ranks for each way of
    splitting, all groups at once. Nothing waits for the device.

    Args:
        named_parameters: those without a gradient are passed over.
        max_norm: largest norm afterwards.
        group_of: name of the group that a parameter's norm is also reported for.

    Returns:
        The norm before clipping and that of each group: scalars on the gradients' device, the same on every rank.
    """
    sorted_out: dict[_Split, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            split, gradient = _shard_of(parameter.grad)
            sorted_out[split][group_of(name)].append(gradient)
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for split, groups in sorted_out.items():
        sums = torch.stack([_sum_of_squares(gradients) for gradients in groups.values()])
        if split is not None:
            mesh, axes = split
            for axis in axes:
                dist.all_reduce(sums, group=mesh.get_group(axis))
        for group, value in zip(groups, sums.unbind(), strict=True):
            squares[group].append(value)
    sums_of_groups = {group: torch.stack(values).sum() for group, values in squares.items()}
    total = torch.stack(list(sums_of_groups.values())).sum().sqrt()
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([g for groups in sorted_out.values() for grads in groups.values() for g in grads], factor)
    return total, {group: value.sqrt() for group, value in sums_of_groups.items()}


def _shard_of(gradient: Tensor) -> tuple[_Split, Tensor]:
    if not isinstance(gradient, DTensor):
        return None, gradient
    assert not any(placement.is_partial() for placement in gradient.placements), gradient.placements
    mesh = gradient.device_mesh
    split = (axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return (mesh, tuple(axis for axis in split if mesh.size(axis) > 1)), gradient.to_local()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
