"""A matrix quantized and transposed in one pass, for the backward pass of a trained float8 layer.

    out[k, n] = round(W[n, k] / s[n])        W [N, K], s [N] or one for all -> e4m3 [K, N]

Hopper multiplies float8 only along adjacent bytes. The gradient of a layer's input needs the transposed weight: made
from the weight itself it costs 3 bytes of traffic per bfloat16 weight and no memory between the passes, where
quantizing and transposing one after the other would cost 5. The gradient of the weight needs the transposed gradient
of the output, which is quantized by tokens and gets a common scale here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import FLOAT8_MAX
from ltx_titan_kernels.launches import with_unit_stride, wrap_if_traced

_ROWS, _COLUMNS = 128, 64


@triton.jit
def _quantize_transposed_kernel(
    weight_ptr, scale_ptr, factor_ptr, out_ptr, factors_ptr, rows, columns, weight_stride, scale_stride,
    LARGEST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weight [rows, columns] -> [columns, rows], and the factor once for each row of the result."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_row, is_column = row < rows, column < columns
    w = tl.load(
        weight_ptr + row.to(tl.int64)[:, None] * weight_stride + column[None, :],
        mask=is_row[:, None] & is_column[None, :],
        other=0.0,
    ).to(tl.float32)
    up = 1.0 / tl.load(scale_ptr + row * scale_stride, mask=is_row, other=1.0)
    q = tl.clamp(w * up[:, None], -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty)
    target = out_ptr + column.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(target, tl.trans(q), mask=is_column[:, None] & is_row[None, :])
    if tl.program_id(0) == 0:
        factor = tl.load(factor_ptr)
        tl.store(factors_ptr + column, factor + tl.zeros([BLOCK_COLUMNS], tl.float32), mask=is_column)


def quantize_transposed(weight: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a matrix by rows and transposes it.

    Args:
        weight: [N, K], bfloat16, float32, or e4m3 to scale its rows.
        scale: by which rows are divided, N float32 values or one.
        factor: one float32 value, for the second result.

    Returns:
        e4m3 [K, N], contiguous, and scales of its rows [1, K] float32, all of them `factor`.
    """
    weight = with_unit_stride(weight)
    rows, columns = weight.shape
    out = torch.empty((columns, rows), dtype=torch.float8_e4m3fn, device=weight.device)
    factors = torch.empty((1, columns), dtype=torch.float32, device=weight.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    wrap_if_traced(_quantize_transposed_kernel, weight)[grid](
        weight_ptr=weight,
        scale_ptr=scale,
        factor_ptr=factor,
        out_ptr=out,
        factors_ptr=factors,
        rows=rows,
        columns=columns,
        weight_stride=weight.stride(0),
        scale_stride=1 if scale.numel() > 1 else 0,
        LARGEST=FLOAT8_MAX,
        BLOCK_ROWS=_ROWS,
        BLOCK_COLUMNS=_COLUMNS,
        num_warps=8,
    )
    return out, factors
