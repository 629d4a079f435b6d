"""Operands of float8 matmuls: tokens quantized with one scale per row, and weights of one byte transposed.

    q[t] = round(x[t] * c / s[t])        s[t] = max |x[t] * c| / 448        [T, K] -> e4m3 [T, K], float32 [T, 1]

A token is read once: it stays in registers between its maximum and the cast. The factors c [K] are the row scales of a
weight in the backward pass, where they belong to the columns of the gradient: (dy c) Q = dy (c Q).

Hopper multiplies float8 only if both factors are contiguous along the dim that is summed over. For the gradient of the
input that dim is the weight's rows, so the weight is transposed into scratch memory for each such matmul: 2 bytes of
traffic per weight, where a second, transposed copy would take a byte of memory for each.

Bytes: quantization reads 2 T K and writes T K; transposition reads and writes N K.
"""

from collections.abc import Sequence
from typing import Any

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
# Tensors that `quantize_joined` takes at most.
_PARTS = 4


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
def _load_part(x_ptr, factor_ptr, token, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    # The factors are read again for each token, from the cache: there are too many for registers.
    return load_token(x_ptr + token * stride, cols, cols < D) * load_token(factor_ptr, cols, cols < D)


@triton.jit
def _store_part(x, out_ptr, LARGEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    q = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + cols, q.to(out_ptr.dtype.element_ty), mask=cols < D)


@triton.jit
def _quantize_joined_kernel(
    x0_ptr, x1_ptr, x2_ptr, x3_ptr, factor0_ptr, factor1_ptr, factor2_ptr, factor3_ptr, out_ptr, scale_ptr,
    tokens, tokens_per_program, stride0, stride1, stride2, stride3,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    D3: tl.constexpr, BLOCK0: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, BLOCK3: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Quantizes tokens whose channels are in up to four tensors; those with D = 0 are absent."""
    first, last = tile_of_program(tokens, tokens_per_program)
    for token in tl.range(first.to(tl.int64), last.to(tl.int64), num_stages=STAGES):
        # All loads before the first maximum: it synchronizes threads, which no load may be moved across.
        x0 = _load_part(x0_ptr, factor0_ptr, token, stride0, D0, BLOCK0)
        x1 = _load_part(x1_ptr, factor1_ptr, token, stride1, D1, BLOCK1)
        x2 = _load_part(x2_ptr, factor2_ptr, token, stride2, D2, BLOCK2)
        x3 = _load_part(x3_ptr, factor3_ptr, token, stride3, D3, BLOCK3)
        largest = tl.abs(x0)
        amax = tl.full([], SMALLEST, tl.float32)
        # One maximum over threads for parts of one width.
        if BLOCK1 == BLOCK0:
            largest = tl.maximum(largest, tl.abs(x1))
        else:
            amax = tl.maximum(amax, tl.max(tl.abs(x1), 0))
        if BLOCK2 == BLOCK0:
            largest = tl.maximum(largest, tl.abs(x2))
        else:
            amax = tl.maximum(amax, tl.max(tl.abs(x2), 0))
        if BLOCK3 == BLOCK0:
            largest = tl.maximum(largest, tl.abs(x3))
        else:
            amax = tl.maximum(amax, tl.max(tl.abs(x3), 0))
        amax = tl.maximum(amax, tl.max(largest, 0))
        row_ptr = out_ptr + token * (D0 + D1 + D2 + D3)
        up = LARGEST / amax
        _store_part(x0 * up, row_ptr, LARGEST, D0, BLOCK0)
        if D1 > 0:
            _store_part(x1 * up, row_ptr + D0, LARGEST, D1, BLOCK1)
        if D2 > 0:
            _store_part(x2 * up, row_ptr + D0 + D1, LARGEST, D2, BLOCK2)
        if D3 > 0:
            _store_part(x3 * up, row_ptr + D0 + D1 + D2, LARGEST, D3, BLOCK3)
        tl.store(scale_ptr + token, amax / LARGEST)


def quantize_joined(
    xs: Sequence[Tensor], factors: Sequence[Tensor], launch: Launch | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes tokens whose channels are in several tensors, as if these were joined.

    Args:
        xs: [T, K_i], one to four, together up to MAX_WIDTH channels.
        factors: [K_i], multiplied first.
        launch: overrides the default, for sweeps.

    Returns:
        e4m3 [T, K_1 + K_2 + ...] and scales [T, 1] float32.
    """
    xs, tokens = [with_unit_stride(x) for x in xs], xs[0].shape[0]
    widths = [x.shape[1] for x in xs]
    assert 1 <= len(xs) == len(factors) <= _PARTS
    assert sum(widths) <= MAX_WIDTH
    # Few warps and several tokens in flight, measured at widths of 4,096 to 12,416.
    launch = launch or Launch(warps=4, programs=4 if sum(widths) > 8192 else 8, stages=1)
    out = torch.empty((tokens, sum(widths)), dtype=torch.float8_e4m3fn, device=xs[0].device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=xs[0].device)
    tiles = tile_tokens(xs[0][None], launch.programs)
    arguments: dict[str, Any] = {}
    for i in range(_PARTS):
        # A part that is absent has the pointers of the first, which are not read.
        x, factor = (xs[i], factors[i]) if i < len(xs) else (xs[0], factors[0])
        width = widths[i] if i < len(xs) else 0
        arguments |= {f"x{i}_ptr": x, f"factor{i}_ptr": factor.contiguous(), f"stride{i}": x.stride(0)}
        arguments |= {f"D{i}": width, f"BLOCK{i}": triton.next_power_of_2(max(width, 1))}
    wrap_if_traced(_quantize_joined_kernel, xs[0])[(tiles.programs,)](
        **arguments,
        out_ptr=out,
        scale_ptr=scale,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        LARGEST=FLOAT8_MAX,
        SMALLEST=SMALLEST_AMAX,
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
def _transpose_kernel(words_ptr, out_ptr, ones_ptr, rows, words, out_stride, TILE: tl.constexpr):
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
        target = out_ptr + (col * 4 + byte).to(tl.int64)[:, None] * out_stride + quad[None, :]
        tl.store(target, tl.trans(word), mask=inside)
        if tl.program_id(0) == 0:
            tl.store(ones_ptr + col * 4 + byte, tl.full([TILE], 1.0, tl.float32), mask=col < words)


def transpose_bytes(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Transposes weights of one byte per element, as if their rows were joined.

    Args:
        parts: [N_i, K] of any dtype of one byte, contiguous; N_i and K are multiples of 4.

    Returns:
        [K, N_1 + N_2 + ...], contiguous, and ones [1, K] float32, the scales of a weight whose own scales are in the
        other factor.
    """
    columns, joined, start = parts[0].shape[1], sum(part.shape[0] for part in parts), 0
    out = torch.empty((columns, joined), dtype=parts[0].dtype, device=parts[0].device)
    ones = torch.empty((1, columns), dtype=torch.float32, device=parts[0].device)
    for part in parts:
        rows = part.shape[0]
        assert part.is_contiguous()
        assert rows % 4 == 0
        assert columns % 4 == 0
        wrap_if_traced(_transpose_kernel, part)[(triton.cdiv(rows // 4, _TILE), triton.cdiv(columns // 4, _TILE))](
            words_ptr=part.view(torch.int32),
            out_ptr=out[:, start:].view(torch.int32),
            ones_ptr=ones,
            rows=rows,
            words=columns // 4,
            out_stride=joined // 4,
            TILE=_TILE,
            num_warps=4,
        )
        start += rows
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
