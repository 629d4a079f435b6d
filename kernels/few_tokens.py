"""Matmul of a few tokens with a float8 weight that is dequantized in registers.

    y[t, n] += x[t, :] . W[n, :]            W = s Q, rounded to the dtype of x         (forward)
    dx[t, k] += dy[t, :] . W[:, k]                                                     (input gradient)

Audio has tens of tokens: such a matmul waits for the weight. Dequantizing it first moves 5 bytes a weight, of which
this kernel reads one. Its numbers are those of a dequantized weight, and tokens are not rounded.

A program sums over a part of the summed dim, because one that sums over all of it waits for one load after the other
while most of the device is idle. Parts are added by a second kernel, in float32 and in a fixed order: no atomics, the
same bits in every run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.launches import with_unit_stride, wrap_if_traced

# Two programs for each multiprocessor of an H100: that many hide each other's waits.
_PROGRAMS = 264
# Elements of a result that a program of the second kernel adds.
_ADDED = 512


class Tiling(NamedTuple):
    """Division of a matmul over programs.

    Attributes:
        outputs: that a program computes. Programs read `tokens x summed` numbers for so many outputs each, from the
            L2 cache; 32 bound wide layers by that. With `transposed` it is also the number of adjacent bytes of a read.
        summed: numbers of the summed dim in an iteration.
        splits: parts of the summed dim.
        tokens: that a program computes; 128 read and dequantize the weight once for audio of more than 2.5 seconds.
        warps, stages: of a program.
    """

    outputs: int
    summed: int
    splits: int
    tokens: int = 64
    warps: int = 4
    stages: int = 3


def choose_tiling(tokens: int, outputs: int, summed: int) -> Tiling:
    """The tiling of a matmul by its shape.

    Traffic through the cache is `2 tokens summed outputs / tile` bytes of tokens and `8 tokens outputs splits` of parts
    written and read. For a given number of programs their sum is least for a tile of about
    sqrt(outputs summed / (4 programs)): 63 for 2,048 x 2,048 weights, 126 for 2,048 x 8,192. Of more than 64 tokens
    parts cost more: wide tiles for wide outputs only, and fewer splits. Measured at 51 and 126 tokens
    (docs/benchmarks/log.md, twelfth round).
    """
    has_many = tokens > 64
    is_wide = outputs >= 4096 if has_many else outputs * summed >= 2**23
    tile, block_tokens = (128 if is_wide else 64), (128 if has_many else 64)
    # Long rows are read faster, but two programs must fit into the memory of a multiprocessor.
    step = 64 if is_wide or has_many else 128
    programs = triton.cdiv(outputs, tile) * triton.cdiv(tokens, block_tokens)
    # At least two iterations, so that the second one's loads run beside the first one's matmul.
    fewest = 8 if is_wide and has_many else 2
    splits = max(1, min(round(_PROGRAMS / programs), summed // (fewest * step), 16))
    return Tiling(tile, step, splits, block_tokens)


@triton.jit
def _few_tokens_kernel(
    x_ptr, q_ptr, scale_ptr, bias_ptr, out_ptr, tokens, outputs, summed, summed_per_split, x_stride, output_stride,
    summed_stride,
    SCALES_OUTPUTS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BLOCK_SUMMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tokens [tokens, summed] times a weight whose dims have the strides given, to out [splits, tokens, outputs]."""
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_output, is_token = output < outputs, token < tokens
    total = tl.zeros([BLOCK_TOKENS, BLOCK_OUTPUTS], tl.float32)
    if SCALES_OUTPUTS:
        scale = tl.load(scale_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(2) * summed_per_split
    for start in tl.range(first, tl.minimum(first + summed_per_split, summed), BLOCK_SUMMED, num_stages=STAGES):
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
    target = out_ptr + (tl.program_id(2) * tokens + token)[:, None] * outputs + output[None, :]
    mask = is_token[:, None] & is_output[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        total += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts_kernel(
    parts_ptr, bias_ptr, out_ptr, outputs, count,
    SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums parts [SPLITS, count] of `count` = tokens x outputs numbers."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    total = tl.load(parts_ptr + i, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts_ptr + split * count + i, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + i % outputs, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        total += tl.load(out_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=inside)


def multiply_few_tokens(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    transposed: bool = False,
    tiling: Tiling | None = None,
) -> Tensor:
    """`x W^T + bias`, or `x W` with `transposed`.

    Args:
        x: [T, K], or [T, N] with `transposed`; bfloat16.
        weight: e4m3 [N, K], contiguous.
        scale: of its rows, N values.
        bias: one value per output.
        out: the product is added to it in place, if given; contiguous.
        transposed: multiply by the weight instead of its transpose.
        tiling: overrides `choose_tiling`, for sweeps.

    Returns:
        [T, N], or [T, K] with `transposed`.
    """
    assert weight.is_contiguous()
    rows, columns = weight.shape
    x, outputs, summed = with_unit_stride(x), *((columns, rows) if transposed else (rows, columns))
    tokens = x.shape[0]
    result = x.new_empty(tokens, outputs) if out is None else out
    assert result.is_contiguous()
    tiling = tiling or choose_tiling(tokens, outputs, summed)
    per_split = triton.cdiv(triton.cdiv(summed, tiling.splits), tiling.summed) * tiling.summed
    splits = triton.cdiv(summed, per_split)
    is_whole = splits == 1
    target = result if is_whole else torch.empty((splits, tokens, outputs), dtype=torch.float32, device=x.device)
    has_bias, adds, bias = bias is not None, out is not None, scale if bias is None else bias
    grid = (triton.cdiv(outputs, tiling.outputs), triton.cdiv(tokens, tiling.tokens), splits)
    wrap_if_traced(_few_tokens_kernel, x)[grid](
        x_ptr=x,
        q_ptr=weight,
        scale_ptr=scale,
        bias_ptr=bias,
        out_ptr=target,
        tokens=tokens,
        outputs=outputs,
        summed=summed,
        summed_per_split=per_split,
        x_stride=x.stride(0),
        output_stride=1 if transposed else columns,
        summed_stride=columns if transposed else 1,
        SCALES_OUTPUTS=not transposed,
        HAS_BIAS=has_bias and is_whole,
        ADDS=adds and is_whole,
        BLOCK_TOKENS=tiling.tokens,
        BLOCK_OUTPUTS=tiling.outputs,
        BLOCK_SUMMED=tiling.summed,
        STAGES=tiling.stages,
        num_warps=tiling.warps,
    )
    if not is_whole:
        wrap_if_traced(_add_parts_kernel, x)[(triton.cdiv(tokens * outputs, _ADDED),)](
            parts_ptr=target,
            bias_ptr=bias,
            out_ptr=result,
            outputs=outputs,
            count=tokens * outputs,
            SPLITS=splits,
            HAS_BIAS=has_bias,
            ADDS=adds,
            BLOCK=_ADDED,
            num_warps=4,
        )
    return result
