"""Gradient norms and clipping over sharded parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    max_norm: float,
    group_of: Callable[[str], str] = lambda name: "all",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Scales all gradients so that their global L2 norm is at most `max_norm`; 0 leaves them alone.

    Parameters may live on different meshes (some sharded over tp, some not): norms are taken per mesh, then combined.
    Nothing waits for the device.

    Args:
        named_parameters: those without a gradient are passed over.
        max_norm: largest norm afterwards.
        group_of: name of the group that a parameter's norm is also reported for.

    Returns:
        The norm before clipping and that of each group: scalars on the gradients' device, the same on every rank.
    """
    sorted_out: dict[str, dict[object, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for name, parameter in named_parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            sorted_out[group_of(name)][mesh].append(parameter.grad)
    norms = {group: _combine(map(_norm, by_mesh.values())) for group, by_mesh in sorted_out.items()}
    total = _combine(norms.values())
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        gradients = [g for by_mesh in sorted_out.values() for grads in by_mesh.values() for g in grads]
        torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
    return total, norms


def _norm(gradients: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _combine(norms: Iterable[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(list(norms)))
