"""The memory-bound operations of a block: norm + modulate, gated residual, QK-norm rotation.

They are gathered here because they, not the matrix products, decide the speed of a block, and are what fused kernels
replace. Blocks get them as one `Operators` record, chosen once (kernel_ops.py); the functions here are the plain torch
form, which runs anywhere, and the reference of the kernels. Statistics and modulation are computed in float32 (or in
the input's own float64) and rounded once to the dtype of the stream.

Letters: `B` samples, `S` tokens, `D` width, `K` distinct timesteps of a sample, `H` heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from ltx_titan.model.rope import PackedRotation, RotaryTables, Rotation, rotate


class Row(NamedTuple):
    """One modulation row (a scale, a shift or a gate) of every distinct timestep: `table + embedding`.

    Attributes:
        embedding: what the timestep makes [B, K, D].
        table: what the block has learned [D]; None adds nothing.
    """

    embedding: Tensor
    table: Tensor | None = None


Modulation = tuple[Row, Row]
"""Scale and shift."""


@dataclass(frozen=True)
class HeadShare:
    """This rank's share of an attention's heads under tensor parallelism, set from outside on `Attention.share`.

    Attributes:
        first: number of its first head.
        width: inner width over all ranks.
        sum_over_ranks: adds a statistic [B, S] over the ranks, differentiably.
    """

    first: int
    width: int
    sum_over_ranks: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Operators:
    """One implementation of the operations below, under their names and with their signatures.

    Attributes:
        name: for logs.
        rotation: brings the tables of a set of tokens to the form that `qk_norm_rope` reads; runs eagerly, once.
        attention_backends: implementations of softmax attention, the preferred one first; None lets torch choose.
    """

    name: str
    norm_modulate: Callable[[Tensor, Row, Row, Tensor | None, float], Tensor]
    gated_residual: Callable[[Tensor, Tensor, Row | None, Tensor | None], Tensor]
    gated_residual_norm: Callable[..., tuple[Tensor, ...]]
    qk_norm_rope: Callable[..., tuple[Tensor, Tensor]]
    rotation: Callable[[RotaryTables], Rotation | PackedRotation]
    attention_backends: tuple[SDPBackend, ...] | None = None


def rows_of(table_RD: Tensor, embedding_BKRD: Tensor) -> tuple[Row, ...]:
    """The R rows of a table and of what the timesteps add to them."""
    return tuple(Row(e, t) for t, e in zip(table_RD.unbind(0), embedding_BKRD.unbind(2), strict=True))


def split_row(row: Row, x_BSD: Tensor, index_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Embedding [B, K, D] and table [D] of a row as kernels read them: K is 1 without an index, an absent table 0."""
    embedding = row.embedding if index_BS is not None else row.embedding[:, :1]
    table = row.table if row.table is not None else embedding.new_zeros(embedding.shape[-1])
    return embedding.expand(x_BSD.shape[0], -1, -1), table


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


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _of_tokens(row: Row, index_BS: Tensor | None) -> Tensor:
    value = row.embedding if row.table is None else row.table + row.embedding
    return pick_rows(_widen(value), index_BS)


def rms_norm(x_BSD: Tensor, eps: float) -> Tensor:
    """X / sqrt(mean(x ** 2) + eps) over the last dimension, without weight."""
    return F.rms_norm(x_BSD, (x_BSD.shape[-1],), eps=eps)


def modulate(x_BSD: Tensor, scale: Row, shift: Row, index_BS: Tensor | None) -> Tensor:
    """X * (1 + scale) + shift with each token's rows."""
    return (_widen(x_BSD) * (1 + _of_tokens(scale, index_BS)) + _of_tokens(shift, index_BS)).to(x_BSD.dtype)


def norm_modulate(x_BSD: Tensor, scale: Row, shift: Row, index_BS: Tensor | None, eps: float) -> Tensor:
    """RMS norm without weight, then `modulate`."""
    return modulate(rms_norm(_widen(x_BSD), eps), scale, shift, index_BS).to(x_BSD.dtype)


def gated_residual(x_BSD: Tensor, y_BSD: Tensor, gate: Row | None, index_BS: Tensor | None) -> Tensor:
    """X + y * gate with each token's gate; without a gate, x + y. A gate of a single row is every token's."""
    if gate is None:
        return x_BSD + y_BSD
    return (_widen(x_BSD) + _widen(y_BSD) * _of_tokens(gate, index_BS)).to(x_BSD.dtype)


def gated_residual_norm(
    x_BSD: Tensor,
    y_BSD: Tensor,
    gate: Row | None,
    modulations: Sequence[Modulation | None],
    index_BS: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """`gated_residual`, and what the next sub-layers read of it.

    Args:
        x_BSD, y_BSD: tokens, and what a sub-layer adds to them.
        gate: factor on `y_BSD`; None is 1.
        modulations: one or two scale and shift pairs; None is the bare norm.
        index_BS: which row each token has.
        eps: of the norm.

    Returns:
        The new tokens, then one normed and modulated [B, S, D] per modulation.
    """
    x_BSD = gated_residual(x_BSD, y_BSD, gate, index_BS)
    return (x_BSD, *norm_modulate_each(norm_modulate, x_BSD, modulations, index_BS, eps))


def norm_modulate_each(
    one: Callable[[Tensor, Row, Row, Tensor | None, float], Tensor],
    x_BSD: Tensor,
    modulations: Sequence[Modulation | None],
    index_BS: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """The tokens normed and modulated by each of several pairs, by the given implementation of `norm_modulate`."""
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
    """RMS norm with weight over the full inner width, then the split into heads and their rotation.

    Args:
        q_BSD, k_BTD: projections of queries and keys; under tensor parallelism this rank's heads of them.
        q_weight_D, k_weight_D: weights of the two norms, of the same heads.
        q_rotation, k_rotation: angles of all heads; None rotates nothing.
        head_dim: width of a head.
        eps: added to the mean square.
        interleaved: see `rotate`.
        share: which heads these are, where they are not all.

    Returns:
        Queries [B, H, S, head_dim] and keys [B, H, T, head_dim].
    """
    return (
        _norm_rope(q_BSD, q_weight_D, q_rotation, head_dim, eps, interleaved, share),
        _norm_rope(k_BTD, k_weight_D, k_rotation, head_dim, eps, interleaved, share),
    )


def sum_squares(x_BSD: Tensor, share: HeadShare) -> Tensor:
    """Sum of squares over the full inner width [B, S] of which `x_BSD` is this rank's share."""
    return share.sum_over_ranks(_widen(x_BSD).square().sum(-1))


def _norm_rope(
    x_BSD: Tensor,
    weight_D: Tensor,
    rotation: Rotation | None,
    head_dim: int,
    eps: float,
    interleaved: bool,
    share: HeadShare | None,
) -> Tensor:
    if share is None:
        x_BSD = F.rms_norm(x_BSD, (x_BSD.shape[-1],), weight_D, eps)
    else:
        rstd = torch.rsqrt(sum_squares(x_BSD, share) / share.width + eps)
        x_BSD = (_widen(x_BSD) * rstd[..., None] * weight_D).to(x_BSD.dtype)
    x_BHSK = x_BSD.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    if rotation is None:
        return x_BHSK
    if share is not None:
        heads = slice(share.first, share.first + x_BHSK.shape[1])
        rotation = Rotation(rotation.cos[:, heads], rotation.sin[:, heads])
    return rotate(x_BHSK, rotation, interleaved)


TORCH = Operators(
    name="torch",
    norm_modulate=norm_modulate,
    gated_residual=gated_residual,
    gated_residual_norm=gated_residual_norm,
    qk_norm_rope=qk_norm_rope,
    rotation=RotaryTables.expand,
)
