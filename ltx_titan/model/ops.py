"""Memory-bound operations of a block: RMS norm + AdaLN modulation, gated residual, QK-norm + rotary embedding.

Fused kernels replace them, because they and not the matmuls limit the speed of a block. Blocks receive them as one
`Operators` record, chosen once (kernel_ops.py). `TORCH` is the plain PyTorch set, which runs anywhere. Its formulas
are those of the kernels' references (kernels/formulas.py, which does not import Triton): statistics and modulation in
float32 (float64 inputs stay float64), one rounding to the dtype of the stream.

Letters: `B` samples, `S` tokens, `D` width, `K` distinct timesteps of a sample, `H` heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn.attention import SDPBackend

from ltx_titan.model.rope import PackedRotation, RotaryTables, Rotation
from ltx_titan_kernels.formulas import (
    HeadShare,
    gated_residual,
    modulate,
    norm_heads,
    rms_norm,
    rotate_heads,
    upcast,
)

__all__ = [
    "TORCH",
    "HeadShare",
    "Modulation",
    "Operators",
    "Row",
    "gated_residual",
    "gated_residual_norm",
    "modulate",
    "norm_modulate",
    "norm_modulate_each",
    "qk_norm_rope",
    "rms_norm",
    "rows_of",
]


class Row(NamedTuple):
    """One AdaLN parameter (a scale, a shift or a gate) of every distinct timestep: `table + embedding`.

    Attributes:
        embedding: timestep embedding [B, K, D].
        table: learned by the block [D]; None adds nothing.
    """

    embedding: Tensor
    table: Tensor | None = None


Modulation = tuple[Row, Row]
"""Scale and shift."""


@dataclass(frozen=True)
class Operators:
    """One implementation of the operations below, under their names and with their signatures.

    Attributes:
        name: for logs.
        rotation: converts the tables of a set of tokens to the format that `qk_norm_rope` reads; runs eagerly, once.
        attention_backends: implementations of softmax attention in order of preference; None lets torch choose.
    """

    name: str
    norm_modulate: Callable[[Tensor, Row, Row, Tensor | None, float], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Row | None, Tensor | None], Tensor]
    gated_residual_norm: Callable[..., tuple[Tensor, ...]]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]]
    rotation: Callable[[RotaryTables], Rotation | PackedRotation]
    attention_backends: tuple[SDPBackend, ...] | None = None


def rows_of(table_RD: Tensor, embedding_BKRD: Tensor) -> tuple[Row, ...]:
    """Splits a table [R, D] and the timestep embeddings added to it [B, K, R, D] into R AdaLN parameters."""
    # Table and embedding stay apart: the fused kernels add them in registers, one launch less per row and block.
    return tuple(Row(e, t) for t, e in zip(table_RD.unbind(0), embedding_BKRD.unbind(2), strict=True))


def norm_modulate(x_BSD: Tensor, scale: Row, shift: Row, index_BS: Tensor | None, eps: float) -> Tensor:
    """RMS norm without weight, then AdaLN modulation: [B, S, D] in the dtype of `x_BSD`."""
    # Upcast before the norm: a norm in bfloat16 would round once more before the modulation.
    return modulate(rms_norm(upcast(x_BSD), eps), scale, shift, index_BS).to(x_BSD.dtype)


def gated_residual_norm(
    x_BSD: Tensor,
    y_BSD: Tensor,
    gate: Row | None,
    modulations: Sequence[Modulation | None],
    index_BS: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """`gated_residual`, then the norm and modulation that the next sub-layers read.

    Args:
        x_BSD, y_BSD: tokens, and what a sub-layer adds to them.
        gate: factor on `y_BSD`; None is 1.
        modulations: one or two scale and shift pairs; None is the norm alone.
        index_BS: timestep of each token.
        eps: of the norm.

    Returns:
        The new tokens, then one normed and modulated [B, S, D] per modulation.
    """
    # The norm reads the sum rounded to the stream's dtype, the same tokens that every later sub-layer reads.
    x_BSD = gated_residual(x_BSD, y_BSD, gate, index_BS)
    return (x_BSD, *norm_modulate_each(norm_modulate, x_BSD, modulations, index_BS, eps))


def norm_modulate_each(
    one: Callable[[Tensor, Row, Row, Tensor | None, float], Tensor],
    x_BSD: Tensor,
    modulations: Sequence[Modulation | None],
    index_BS: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Norm, then modulation by each scale and shift pair, one [B, S, D] per pair; `one` implements `norm_modulate`."""
    return [rms_norm(x_BSD, eps) if m is None else one(x_BSD, *m, index_BS, eps) for m in modulations]


def qk_norm_rope(
    q_BSD: Tensor,
    k_BTD: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    q_rotation: Rotation | None,
    k_rotation: Rotation | None,
    *,
    head_dim: int,
    eps: float,
    interleaved: bool = False,
    share: HeadShare | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm with weight over the full inner width, then the split into heads and rotary embedding.

    Args:
        q_BSD, k_BTD: projections of queries and keys; under tensor parallelism this rank's heads of them.
        q_weight_D, k_weight_D: weights of the two norms, of the same heads.
        q_rotation, k_rotation: cosines and sines of all heads; None rotates nothing.
        head_dim: width of a head.
        eps: added to the mean square.
        interleaved: whether rotated pairs are adjacent channels; otherwise they are half a head apart.
        share: heads of this rank, unless it has all of them.

    Returns:
        Queries [B, H, S, head_dim] and keys [B, H, T, head_dim].
    """
    # Norm before the split (full width), rotation after it (each head has its own frequencies).
    q_BHSK = rotate_heads(norm_heads(q_BSD, q_weight_D, head_dim, eps, share), q_rotation, share, interleaved)
    k_BHTK = rotate_heads(norm_heads(k_BTD, k_weight_D, head_dim, eps, share), k_rotation, share, interleaved)
    return q_BHSK, k_BHTK


TORCH = Operators(
    name="torch",
    norm_modulate=norm_modulate,
    gated_residual=gated_residual,
    gated_residual_norm=gated_residual_norm,
    qk_norm_rope=qk_norm_rope,
    rotation=RotaryTables.expand,
)
