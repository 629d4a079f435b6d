"""Matrices quantized and transposed in one pass, for the backward pass of trained float8 layers.

    out[k, n] = round(W[n, k] / s[n])        W [N, K], s [N] or one for all -> e4m3 [K, N]

Hopper multiplies float8 only along adjacent bytes. The gradient of a layer's input needs the transposed weight: made
from the weight itself it costs 3 bytes of traffic per bfloat16 weight and no memory between the passes, where
quantizing and transposing one after the other would cost 5. The gradient of the weight needs the transposed gradient
of the output, which is quantized by tokens and gets a common scale here.

Four rows are packed into 32-bit words before threads exchange them, as in `float8.transpose_bytes`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import FLOAT8_MAX
from ltx_titan_kernels.launches import with_unit_stride, wrap_if_traced

# A program transposes 32 words of four rows: 128 rows of so many columns that 128 bytes of each are read.
_QUADS, _COLUMN_BYTES = 32, 128


@triton.jit
def _load_quantized(
    weight_ptr, scale_ptr, row, column, rows, columns, weight_stride, scale_stride, LARGEST: tl.constexpr
):
    """Bytes of rows [rows, columns], as 32-bit numbers."""
    w = tl.load(
        weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :],
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0.0,
    ).to(tl.float32)
    up = 1.0 / tl.load(scale_ptr + row * scale_stride, mask=row < rows, other=1.0)
    q = tl.clamp(w * up[:, None], -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


@triton.jit
def _quantize_transposed_kernel(
    weight_ptr, scale_ptr, factor_ptr, words_ptr, factors_ptr, rows, columns, weight_stride, scale_stride, out_stride,
    LARGEST: tl.constexpr, QUADS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weight [rows, columns] -> words [columns, rows / 4], and the factor once for each row of the result."""
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)  # four rows each
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    word = tl.zeros([QUADS, BLOCK_COLUMNS], tl.int32)
    for byte in tl.static_range(4):
        q = _load_quantized(
            weight_ptr, scale_ptr, quad * 4 + byte, column, rows, columns, weight_stride, scale_stride, LARGEST
        )
        word |= q << byte * 8
    target = words_ptr + column.to(tl.int64)[:, None] * out_stride + quad[None, :]
    tl.store(target, tl.trans(word), mask=(column < columns)[:, None] & (quad < rows // 4)[None, :])
    if tl.program_id(0) == 0:
        factor = tl.load(factor_ptr)
        tl.store(factors_ptr + column, factor + tl.zeros([BLOCK_COLUMNS], tl.float32), mask=column < columns)


def quantize_transposed(parts: Sequence[Tensor], scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes matrices by rows and transposes them, as if their rows were joined.

    Args:
        parts: [N_i, K], bfloat16, float32, or e4m3 to scale its rows; each N_i is a multiple of 4.
        scale: by which rows are divided, a float32 value for each row of a single part, or one for all.
        factor: one float32 value, for the second result.

    Returns:
        e4m3 [K, N_1 + N_2 + ...], contiguous, and scales of its rows [1, K] float32, all of them `factor`.
    """
    columns, joined, start = parts[0].shape[1], sum(len(part) for part in parts), 0
    assert scale.numel() == 1 or (len(parts) == 1 and scale.numel() == joined)
    out = torch.empty((columns, joined), dtype=torch.float8_e4m3fn, device=parts[0].device)
    factors = torch.empty((1, columns), dtype=torch.float32, device=parts[0].device)
    for weight in map(with_unit_stride, parts):
        rows = len(weight)
        assert rows % 4 == 0
        block_columns = _COLUMN_BYTES // weight.element_size()
        grid = (triton.cdiv(rows // 4, _QUADS), triton.cdiv(columns, block_columns))
        wrap_if_traced(_quantize_transposed_kernel, weight)[grid](
            weight_ptr=weight,
            scale_ptr=scale,
            factor_ptr=factor,
            words_ptr=out[:, start:].view(torch.int32),
            factors_ptr=factors,
            rows=rows,
            columns=columns,
            weight_stride=weight.stride(0),
            scale_stride=1 if scale.numel() > 1 else 0,
            out_stride=joined // 4,
            LARGEST=FLOAT8_MAX,
            QUADS=_QUADS,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )
        start += rows
    return out, factors
