"""The memory-bound operations of a block: norm + modulate, gated residual, QK-norm rotation, softmax attention.

They are gathered here because they, not the matrix products, decide the speed of a block, and are what fused kernels
replace. Statistics and modulation are computed in float32 and rounded once to the dtype of the stream.

Letters: `B` samples, `S` tokens, `D` width, `K` distinct timesteps of a sample.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pick_rows(rows_BKD: Tensor, index_BS: Tensor | None) -> Tensor:
    """Each token's row [B, S, D], or [B, 1, D] where a sample has one row for all its tokens.

    Two rows, the usual case with conditioning, are selected by `where`: its gradient is a masked sum, which is
    deterministic and fuses, while that of a gather is a scatter of [B, S, D].
    """
    if index_BS is None or rows_BKD.shape[1] == 1:
        return rows_BKD[:, :1]
    if rows_BKD.shape[1] == 2:
        return torch.where(index_BS[..., None] == 0, rows_BKD[:, :1], rows_BKD[:, 1:])
    return rows_BKD.gather(1, index_BS[..., None].expand(-1, -1, rows_BKD.shape[-1]))


def rms_norm(x_BSD: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x ** 2) + eps) over the last dimension, without weight."""
    return F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=eps)


def modulate(x_BSD: Tensor, scale_BKD: Tensor, shift_BKD: Tensor, index_BS: Tensor | None) -> Tensor:
    """X * (1 + scale) + shift with each token's rows."""
    scale, shift = pick_rows(scale_BKD.float(), index_BS), pick_rows(shift_BKD.float(), index_BS)
    return (x_BSD.float() * (1 + scale) + shift).to(x_BSD.dtype)


def norm_modulate(x_BSD: Tensor, scale_BKD: Tensor, shift_BKD: Tensor, index_BS: Tensor | None, eps: float) -> Tensor:
    """RMS norm without weight, then `modulate`."""
    return modulate(rms_norm(x_BSD.float(), eps), scale_BKD, shift_BKD, index_BS).to(x_BSD.dtype)


def gated_residual(x_BSD: Tensor, y_BSD: Tensor, gate_BKD: Tensor, index_BS: Tensor | None) -> Tensor:
    """X + y * gate with each token's gate."""
    return (x_BSD.float() + y_BSD.float() * pick_rows(gate_BKD.float(), index_BS)).to(x_BSD.dtype)
