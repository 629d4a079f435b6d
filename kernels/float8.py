"""Operands of float8 matmuls: tokens quantized with one scale per row, and weights of one byte transposed.

    q[t] = round(x[t] * c / s[t])        s[t] = max |x[t] * c| / 448        [T, K] -> e4m3 [T, K], float32 [T, 1]

A token is read once: it stays in registers between its maximum and the cast. The factors c [K] are the row scales of a
weight in the backward pass, where they belong to the columns of the gradient: (dy c) Q = dy (c Q).

Hopper multiplies float8 only if both factors are contiguous along the dim that is summed over. For the gradient of the
input that dim is the weight's rows, so the weight is transposed into scratch memory for each such matmul: 2 bytes of
traffic per weight, where a second, transposed copy would take a byte of memory for each.

Bytes: quantization reads 2 T K and writes T K; transposition reads and writes N K.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import FLOAT8_MAX, SMALLEST_AMAX
from ltx_titan_kernels.launches import (
    MAX_WIDTH,
    Launch,
    load_token,
    operator,
    tile_of_program,
    tile_tokens,
    with_unit_stride,
    wrap_if_traced,
)

QUANTIZE = Launch(warps=8, programs=16, stages=1)
"""Launch at width 4096."""

# A program transposes a tile of 128 x 128 bytes as 32-bit words: four rows of 32 x 32 words.
_TILE = 32


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, factor_ptr, out_ptr, scale_ptr, tokens, tokens_per_program, x_stride,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    HAS_FACTOR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    if HAS_FACTOR:
        factor = load_token(factor_ptr, cols, inside)
    # int64: offsets within a batch of long clips can exceed 2^31 elements.
    for token in tl.range(first.to(tl.int64), last.to(tl.int64), num_stages=STAGES):
        x = load_token(x_ptr + token * x_stride, cols, inside)
        if HAS_FACTOR:
            x *= factor
        amax = tl.maximum(tl.max(tl.abs(x), 0), SMALLEST)
        # Rounding can push the largest value past the format's range; NaN is kept.
        q = tl.clamp(x * (LARGEST / amax), -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr + token * D + cols, q.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + token, amax / LARGEST)


def launch_quantize(x: Tensor, factor: Tensor | None, launch: Launch | None = None) -> tuple[Tensor, Tensor]:
    """Runs the kernel: e4m3 [T, K] and scales [T, 1] float32. `launch` overrides the default, for sweeps."""
    tokens, width = x.shape
    launch = launch or QUANTIZE.scaled_to(width)
    x = with_unit_stride(x)
    out = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    tiles = tile_tokens(x[None], launch.programs)
    wrap_if_traced(_quantize_tokens_kernel, x)[(tiles.programs,)](
        x_ptr=x,
        factor_ptr=x if factor is None else factor.contiguous(),
        out_ptr=out,
        scale_ptr=scale,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        x_stride=x.stride(0),
        LARGEST=FLOAT8_MAX,
        SMALLEST=SMALLEST_AMAX,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        HAS_FACTOR=factor is not None,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return out, scale


@triton.jit
def _load_words(ptr, row, col, rows, words):
    return tl.load(
        ptr + row.to(tl.int64)[:, None] * words + col[None, :],
        mask=(row < rows)[:, None] & (col < words)[None, :],
        other=0,
    )


@triton.jit
def _transpose_kernel(words_ptr, out_ptr, ones_ptr, rows, words, TILE: tl.constexpr):
    """Bytes [rows, 4 words] -> [4 words, rows], both as 32-bit words; and a 1 for each row of the result."""
    quad = tl.program_id(0) * TILE + tl.arange(0, TILE)  # four rows each
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)
    a = _load_words(words_ptr, quad * 4, col, rows, words)
    b = _load_words(words_ptr, quad * 4 + 1, col, rows, words)
    c = _load_words(words_ptr, quad * 4 + 2, col, rows, words)
    d = _load_words(words_ptr, quad * 4 + 3, col, rows, words)
    quads = rows // 4
    inside = (col < words)[:, None] & (quad < quads)[None, :]
    for byte in tl.static_range(4):
        # Byte `byte` of four rows in one word, so that what is exchanged between threads are words.
        word = (a >> byte * 8) & 255
        word |= ((b >> byte * 8) & 255) << 8
        word |= ((c >> byte * 8) & 255) << 16
        word |= (d >> byte * 8) << 24
        target = out_ptr + (col * 4 + byte).to(tl.int64)[:, None] * quads + quad[None, :]
        tl.store(target, tl.trans(word), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(ones_ptr + col * 4 + byte, tl.full([TILE], 1.0, tl.float32), mask=col < words)


def transpose_bytes(data: Tensor) -> tuple[Tensor, Tensor]:
    """Transposes a weight of one byte per element.

    Args:
        data: [N, K] of any dtype of one byte, contiguous; N and K are multiples of 4.

    Returns:
        [K, N], contiguous, and ones [1, K] float32, the scales of a weight whose own scales are in the other factor.
    """
    rows, columns = data.shape
    assert data.is_contiguous()
    assert rows % 4 == 0
    assert columns % 4 == 0
    out = torch.empty((columns, rows), dtype=data.dtype, device=data.device)
    ones = torch.empty((1, columns), dtype=torch.float32, device=data.device)
    grid = (triton.cdiv(rows // 4, _TILE), triton.cdiv(columns // 4, _TILE))
    _transpose_kernel[grid](
        words_ptr=data.view(torch.int32),
        out_ptr=out.view(torch.int32),
        ones_ptr=ones,
        rows=rows,
        words=columns // 4,
        TILE=_TILE,
        num_warps=4,
    )
    return out, ones


def _fake_quantize(x, factor):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@operator("quantize_tokens", _fake_quantize)
def _quantize_op(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    return launch_quantize(x, factor)


def quantize_tokens(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantizes tokens to e4m3 with one scale each; see `formulas.quantize_tokens`, which it equals.

    Args:
        x: [T, K], K up to MAX_WIDTH.
        factor: [K], multiplied first; None for none.

    Returns:
        e4m3 [T, K] and scales [T, 1] float32.
    """
    assert x.shape[1] <= MAX_WIDTH
    return _quantize_op(x, factor)
