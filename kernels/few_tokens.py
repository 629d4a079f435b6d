"""Matmul of a few tokens with a float8 weight that is dequantized in registers.

    y[t, n] += x[t, :] . W[n, :]            W = s Q, rounded to the dtype of x         (forward)
    dx[t, k] += dy[t, :] . W[:, k]                                                     (input gradient)

Audio has tens of tokens: such a matmul waits for the weight. Dequantizing it first moves 5 bytes a weight, of which
this kernel reads one. Its numbers are those of a dequantized weight, and tokens are not rounded.

A program computes `_OUTPUTS` outputs of up to `_TOKENS` tokens, and reads its weights once. Sums are in float32, in a
fixed order: no atomics, no parts that a second kernel adds.
"""

import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.launches import with_unit_stride, wrap_if_traced

_TOKENS, _OUTPUTS, _SUMMED = 64, 32, 128


@triton.jit
def _few_tokens_kernel(
    x_ptr, q_ptr, scale_ptr, bias_ptr, out_ptr, tokens, outputs, summed, x_stride, output_stride, summed_stride,
    SCALES_OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_SUMMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [tokens, summed] times a weight whose dims have the strides given, to out [tokens, outputs]."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_output, is_token = output < outputs, token < tokens
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], tl.float32)
    if SCALES_OUTPUTS:
        scale = tl.load(scale_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    for start in tl.range(0, summed, BLOCK_SUMMED, num_stages=STAGES):
        r = start + tl.arange(0, BLOCK_SUMMED)
        is_summed = r < summed
        x = tl.load(
            x_ptr + token[:, None] * x_stride + r[None, :], mask=is_token[:, None] & is_summed[None, :], other=0.0
        )
        q = tl.load(
            q_ptr + r[:, None] * summed_stride + output[None, :] * output_stride,
            mask=is_summed[:, None] & is_output[None, :],
            other=0.0,
        )
        if not SCALES_OUTPUTS:
            scale = tl.load(scale_ptr + r, mask=is_summed, other=0.0).to(tl.float32)[:, None]
        total = tl.dot(x, (q.to(tl.float32) * scale).to(x.dtype), total)
    target = out_ptr + token[:, None] * outputs + output[None, :]
    mask = is_token[:, None] & is_output[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


def multiply_few_tokens(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """`x W^T + bias`, or `x W` with `transposed`.

    Args:
        x: [T, K], or [T, N] with `transposed`; bfloat16.
        weight: e4m3 [N, K], contiguous.
        scale: of its rows, N values.
        bias: one value per output.
        out: the product is added to it in place, if given; contiguous.
        transposed: multiply by the weight instead of its transpose.

    Returns:
        [T, N], or [T, K] with `transposed`.
    """
    assert weight.is_contiguous()
    rows, columns = weight.shape
    x, outputs, summed = with_unit_stride(x), *((columns, rows) if transposed else (rows, columns))
    result = x.new_empty(x.shape[0], outputs) if out is None else out
    assert result.is_contiguous()
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(x.shape[0], _TOKENS))
    wrap_if_traced(_few_tokens_kernel, x)[grid](
        x_ptr=x,
        q_ptr=weight,
        scale_ptr=scale,
        bias_ptr=scale if bias is None else bias,
        out_ptr=result,
        tokens=x.shape[0],
        outputs=outputs,
        summed=summed,
        x_stride=x.stride(0),
        output_stride=1 if transposed else columns,
        summed_stride=columns if transposed else 1,
        SCALES_OUTPUTS=not transposed,
        HAS_BIAS=bias is not None,
        ADDS=out is not None,
        BLOCK_TOKENS=_TOKENS,
        BLOCK_OUTPUTS=_OUTPUTS,
        BLOCK_SUMMED=_SUMMED,
        STAGES=4,
        num_warps=4,
    )
    return result
