"""Formulas of the fused operations in plain PyTorch. This file does not import Triton.

The float32 reference in each operation's file is composed of these functions, and so is the model's eager path
(ltx_titan/model/ops.py), which must also run where Triton is not installed: each formula is written once.

Statistics and modulation are computed in float32 (float64 inputs stay float64) and rounded once to the dtype of the
tokens. Letters: `B` samples, `S` tokens, `D` width, `K` distinct timesteps of a sample, `H` heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

AdaLN = tuple[Tensor, Tensor | None]
"""A scale, shift or gate: timestep embedding [B, K, D] and learned table [D], whose sum it is; None adds nothing."""

CosSin = tuple[Tensor, Tensor]
"""Cosines and sines of every token and head [B, H, S, head_dim / 2], float32."""


MAX_WIDTH = 16384
"""Widest token of a kernel, which holds it in the registers of one program."""


@dataclass(frozen=True)
class HeadShare:
    """Heads of an attention that a tensor holds under tensor parallelism.

    Attributes:
        first: index of the first head.
        width: inner width over all ranks.
        sum_over_ranks: adds a statistic [B, S] over the ranks, differentiably.
    """

    first: int
    width: int
    sum_over_ranks: Callable[[Tensor], Tensor]


def upcast(x: Tensor) -> Tensor:
    """`x` of any shape in float32, or unchanged if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


def select_timesteps(modulation_BKD: Tensor, index_BS: Tensor | None) -> Tensor:
    """Selects each token's modulation [B, S, D], or returns [B, 1, D] if all tokens of a sample share it."""
    if index_BS is None or modulation_BKD.shape[1] == 1:
        return modulation_BKD[:, :1]
    if modulation_BKD.shape[1] == 2:
        # The usual case with conditioning. The gradient of `where` is a masked sum, which is deterministic and fuses;
        # that of `gather` is a scatter of [B, S, D].
        return torch.where(index_BS[..., None] == 0, modulation_BKD[:, :1], modulation_BKD[:, 1:])
    return modulation_BKD.gather(1, index_BS[..., None].expand(-1, -1, modulation_BKD.shape[-1]))


def per_token(parameter: AdaLN, index_BS: Tensor | None) -> Tensor:
    """A scale, shift or gate of each token [B, S | 1, D], float32."""
    embedding, table = parameter
    return select_timesteps(upcast(embedding if table is None else table + embedding), index_BS)


def rms_norm(x_BSD: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension without weight: `x / sqrt(mean(x ** 2) + eps)`."""
    return F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=eps)


def modulate(x_BSD: Tensor, scale: AdaLN, shift: AdaLN, index_BS: Tensor | None) -> Tensor:
    """AdaLN modulation [B, S, D]: `x * (1 + scale) + shift`."""
    return (upcast(x_BSD) * (1 + per_token(scale, index_BS)) + per_token(shift, index_BS)).to(x_BSD.dtype)


def gated_residual(x_BSD: Tensor, y_BSD: Tensor, gate: AdaLN | None, index_BS: Tensor | None) -> Tensor:
    """Gated residual [B, S, D]: `x + gate * y`, or `x + y` without a gate. A gate with K = 1 applies to every token."""
    if gate is None:
        return x_BSD + y_BSD
    return (upcast(x_BSD) + upcast(y_BSD) * per_token(gate, index_BS)).to(x_BSD.dtype)


def sum_squares(x_BSD: Tensor, share: HeadShare) -> Tensor:
    """Sum of squares [B, S] over the full inner width, of which `x_BSD` holds this rank's heads."""
    return share.sum_over_ranks(upcast(x_BSD).square().sum(-1))


def norm_heads(x_BSD: Tensor, weight_D: Tensor, head_dim: int, eps: float, share: HeadShare | None) -> Tensor:
    """RMS norm with weight over the full inner width, then the split into heads [B, H, S, head_dim]."""
    if share is None:
        x_BSD = F.rms_norm(x_BSD, (x_BSD.shape[-1],), weight_D, eps)
    else:
        # `F.rms_norm` would take the mean over this rank's heads alone.
        rstd = torch.rsqrt(sum_squares(x_BSD, share) / share.width + eps)
        x_BSD = (upcast(x_BSD) * rstd[..., None] * weight_D).to(x_BSD.dtype)
    return x_BSD.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(x_BHSK: Tensor, rotation: CosSin, interleaved: bool = False) -> Tensor:
    """Rotary embedding: `(a cos - b sin, b cos + a sin)` of channel pairs (a, b), in float32, in the dtype of `x`.

    Args:
        x_BHSK: queries or keys [B, H, S, head_dim].
        rotation: cosines and sines [B, H, S, head_dim / 2].
        interleaved: pair i is (2i, 2i + 1); otherwise it is (i, i + head_dim / 2).
    """
    cos, sin = rotation
    # In float32, as in diffusers and in the kernel: in bfloat16 cosines and sines would be rounded as well.
    x = x_BHSK.float()
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)
    return joined.to(x_BHSK.dtype)


def rotate_heads(x_BHSK: Tensor, rotation: CosSin | None, share: HeadShare | None, interleaved: bool = False) -> Tensor:
    """`rotate` with the cosines and sines of all heads, of which `x_BHSK` holds `share`; None rotates nothing."""
    if rotation is None:
        return x_BHSK
    if share is not None:
        # Heads differ in their frequencies, so each rank needs its own part of the tables.
        heads = slice(share.first, share.first + x_BHSK.shape[1])
        rotation = (rotation[0][:, heads], rotation[1][:, heads])
    return rotate(x_BHSK, rotation, interleaved)


FLOAT8_MAX = 448.0
"""Largest value of e4m3."""

# Rows of smaller numbers round to zero. Gradients of single tokens are small: 1e-12, a usual bound, would drop them.
SMALLEST_AMAX = 1e-30


def quantize_tokens(x: Tensor, factor: Tensor | None = None, *, powers_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Quantizes tokens to e4m3 with one scale each: `x * factor` is about `q * scale`.

    Args:
        x: [T, K].
        factor: [K], multiplied first; None for none.
        powers_of_two: round scales up to powers of two, so that a quantized token can be brought to another such scale
            without a second rounding.

    Returns:
        e4m3 [T, K] and scales [T, 1] float32.
    """
    x = x.float()
    if factor is not None:
        x = x * factor.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp(min=SMALLEST_AMAX)
    if powers_of_two:
        # 448 is 1.75 x 2^8: a larger mantissa carries into the exponent.
        bits = ((amax.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - 0x04000000
        # What is not finite stays so, and reaches the result.
        scale = torch.where(amax.isfinite(), bits.view(torch.float32), amax)
        return (x * (1 / scale)).to(torch.float8_e4m3fn), scale
    # Rounding can push the largest value past the format's range, where a cast on a CPU gives NaN.
    q = (x * (FLOAT8_MAX / amax)).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    return q, amax / FLOAT8_MAX


ADAFACTOR_DECAY = -0.8
"""Exponent of the decay of Adafactor's averages (Shazeer and Stern, 2018)."""
SMALLEST_RMS = 1e-3
"""Their epsilon_2, the floor of a weight's scale."""
SMALLEST_VARIANCE = 1e-30
"""Their epsilon_1, the floor of an average square."""
