"""Gradient norm and clipping over sharded parameters."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales all gradients so that their global L2 norm is at most `max_norm`; 0 leaves them alone.

    Parameters may live on different meshes (some sharded over tp, some not): norms are taken per mesh, then combined.
    Nothing waits for the device.

    Returns:
        The norm before clipping, a scalar on the gradients' device, the same on every rank.
    """
    by_mesh: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh[mesh].append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        gradients = [g.to_local() if isinstance(g, DTensor) else g for group in by_mesh.values() for g in group]
        torch._foreach_mul_(gradients, factor)
    return total
