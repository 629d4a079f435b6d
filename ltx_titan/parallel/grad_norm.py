"""Gradient norms and clipping over sharded parameters.

A norm and the factor that clips it are computed here. Who applies the factor is for the caller to decide: AdamW's
update on a GPU takes it, which saves a pass over the gradients; other updates find them scaled.

Works on local shards: foreach operations on lists of thousands of DTensors spend more time on dispatch than on
arithmetic.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

# A mesh and the axes of it that a gradient is sharded over; None for a plain tensor, which every rank holds in full.
_Sharding = tuple[DeviceMesh, tuple[int, ...]] | None


GradNorms = tuple[Tensor, dict[str, Tensor]]
"""The norm of all gradients and that of each group: scalars on their device, the same on every rank."""


@torch.no_grad()
def grad_norms(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_of: Callable[[str], str] = lambda name: "all",
    further_group_of: Callable[[str], str | None] = lambda name: None,
) -> GradNorms:
    """Global L2 norms of gradients.

    Parameters may be sharded differently (some over tp, some not), and a square must be counted once: sums of squares
    are reduced for each sharding separately, all groups in one tensor. Nothing waits for the device.

    Args:
        named_parameters: those without a gradient are ignored.
        group_of: name of the group that a parameter's norm is also reported for.
        further_group_of: name of another one; None without.
    """
    # By both groups of a parameter together, so that each gradient is read once.
    gradients_of: dict[_Sharding, dict[tuple[str, str | None], list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            sharding, gradient = _shard_of(parameter.grad)
            gradients_of[sharding][group_of(name), further_group_of(name)].append(gradient)
    squares: dict[tuple[str, str | None], list[Tensor]] = defaultdict(list)
    for sharding, groups in gradients_of.items():
        sums = torch.stack([_sum_of_squares(gradients) for gradients in groups.values()])
        if sharding is not None:
            mesh, axes = sharding
            for axis in axes:
                # Replicas have equal gradients, so only the sharded axes are summed over.
                dist.all_reduce(sums, group=mesh.get_group(axis))
        for names, value in zip(groups, sums.unbind(), strict=True):
            squares[names].append(value)
    disjoint = {names: torch.stack(values).sum() for names, values in squares.items()}
    total = torch.stack(list(disjoint.values())).sum().sqrt()
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for names, value in disjoint.items():
        for group in names:
            if group is not None:
                parts[group].append(value)
    return total, {group: torch.stack(values).sum().sqrt() for group, values in parts.items()}


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Factor on gradients of this norm after which it is at most `max_norm`; at most 1."""
    # A tensor, clamped instead of compared: a Python `if` on the norm would wait for the device.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_grads_(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """Multiplies all gradients by `factor`, in place."""
    gradients = [_shard_of(parameter.grad)[1] for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, factor)


def clip_grad_norm_(named_parameters: Iterable[tuple[str, nn.Parameter]], max_norm: float) -> Tensor:
    """Scales all gradients so that their global L2 norm is at most `max_norm`; with 0 they stay as they are.

    Returns:
        The norm before clipping.
    """
    named = list(named_parameters)
    norm, _ = grad_norms(named)
    if max_norm > 0:
        scale_grads_((parameter for _, parameter in named), clip_factor(norm, max_norm))
    return norm


def _shard_of(gradient: Tensor) -> tuple[_Sharding, Tensor]:
    if not isinstance(gradient, DTensor):
        return None, gradient
    assert not any(placement.is_partial() for placement in gradient.placements), gradient.placements
    mesh = gradient.device_mesh
    axes = (axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate())
    # Axes of size 1 are dropped, so that equal shardings are equal keys.
    return (mesh, tuple(axis for axis in axes if mesh.size(axis) > 1)), gradient.to_local()


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    # float32: a long sum of bfloat16 squares stops growing once an addend is below half a unit in the last place.
    return torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
