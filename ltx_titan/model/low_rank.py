"""What the operations on adapted layers share: gradients of the adapters' factors, see `adapted_linear.py`."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients_of_adapters(
    dys: Sequence[Tensor], dn: Tensor | None, lora_b: Sequence[Tensor], z: Tensor, scalings: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of z = x [A_1; A_2; ...; N]^T and of each B_i.

    Args:
        dys: gradients of the outputs [tokens, out].
        dn: of x N^T [tokens, rows]; None without rows N.
        lora_b: [out, rank] of each layer.
        z: [tokens, ranks + rows].
        scalings: factor on each adapter.

    Returns:
        [tokens, ranks + rows], and [out, rank] of each layer.
    """
    dz, dbs, start = torch.empty_like(z), [], 0
    for dy, b, scaling in zip(dys, lora_b, scalings, strict=True):
        columns = slice(start, start + b.shape[1])
        torch.mm(dy, b, out=dz[:, columns])
        if scaling != 1.0:
            dz[:, columns] *= scaling
        dbs.append(torch.mm(dy.t(), scaled(z[:, columns], scaling)))
        start += b.shape[1]
    if dn is not None:
        dz[:, start:] = dn
    return dz, dbs


def scaled(z: Tensor, scaling: float) -> Tensor:
    """`z` times the factor on an adapter, without a pass if that is 1."""
    return z if scaling == 1.0 else z * scaling
