"""Operands of trained float8 layers: rows quantized with scales that are powers of two, after GELU or its gradient.

    q[t] = x[t] / s[t]      s[t] = 2^ceil(log2(max |x[t]| / 448))      [T, K] -> e4m3 [T, K], float32 [T, 1]

x is given, or gelu(z), or dz = gelu'(z) da with its sum over the tokens, the gradient of a bias. A row is read once and
stays in registers between its maximum and the cast: compiled from the formula, GELU is computed twice, and its
hyperbolic tangent takes longer than the memory. Here tanh GELU is z sigmoid(2v), one exp2 and one division.

Sums: each program adds its tokens in registers and stores a partial; the partials are added in a fixed order.

Bytes: 3 T K, or 5 T K for dz.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import SMALLEST_AMAX
from ltx_titan_kernels.launches import (
    MAX_WIDTH,
    Launch,
    load_token,
    tile_of_program,
    tile_tokens,
    with_unit_stride,
    wrap_if_traced,
)

ROWS = Launch(warps=8, programs=8, stages=2)
"""Launch at width 4096. The compiler loads the next token while one is computed."""
ROWS_WITH_SUMS = Launch(warps=8, programs=4, stages=2)
"""The same with sums, which take registers."""


@triton.jit
def _power_of_two(amax):
    """The scale of a row with this largest number, and its inverse."""
    # 448 is 1.75 x 2^8: a larger mantissa carries into the exponent. No division, and all of it is exact.
    bits = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - 0x04000000
    up = (0x7F000000 - bits).to(tl.float32, bitcast=True)
    # What is not finite stays so: NaN is kept, and infinity times 0 is NaN.
    is_finite = amax < float("inf")
    return tl.where(is_finite, bits.to(tl.float32, bitcast=True), float("inf")), tl.where(is_finite, up, 0.0)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, gradient_ptr, out_ptr, scale_ptr, partial_ptr, tokens, tokens_per_program, x_stride, gradient_stride,
    SMALLEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Quantizes x, gelu(x), or with a gradient gelu'(x) times it; SUMS: what is quantized adds up to [programs, D]."""
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    sums = tl.zeros([BLOCK], tl.float32)
    # int64: offsets within a batch of long clips can exceed 2^31 elements.
    for token in tl.range(first.to(tl.int64), last.to(tl.int64), num_stages=STAGES):
        x = load_token(x_ptr + token * x_stride, cols, inside)
        if GELU:
            # (1 + tanh v) / 2 = sigmoid(2 v), v = sqrt(2 / pi) (x + 0.044715 x^3); 1.595769 is 2 sqrt(2 / pi).
            square = x * x
            v2 = x * (1.5957691216057308 + 0.07135481627159788 * square)
            sigmoid = 1.0 / (1.0 + tl.exp2(-1.4426950408889634 * v2))
            if HAS_GRADIENT:
                gradient = load_token(gradient_ptr + token * gradient_stride, cols, inside)
                slope = 1.5957691216057308 + 0.21406444881479364 * square
                x = gradient * (sigmoid + x * sigmoid * (1.0 - sigmoid) * slope)
            else:
                x *= sigmoid
        if SUMS:
            sums += x
        scale, up = _power_of_two(tl.maximum(tl.max(tl.abs(x), 0), SMALLEST))
        tl.store(out_ptr + token * D + cols, (x * up).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + token, scale)
    if SUMS:
        tl.store(partial_ptr + tl.program_id(0) * D + cols, sums, mask=inside)


def quantize_rows(
    x: Tensor,
    gradient: Tensor | None = None,
    *,
    is_gelu: bool = False,
    has_sum: bool = False,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows; see `formulas.quantize_tokens` with `powers_of_two`, which it equals.

    Args:
        x: [T, K], K up to MAX_WIDTH.
        gradient: of gelu(x) [T, K], to quantize that of x; only with `is_gelu`.
        is_gelu: quantize gelu(x), with the approximation by tanh.
        has_sum: return the sum over the tokens of what is quantized.
        launch: overrides the default, for sweeps.

    Returns:
        e4m3 [T, K], scales [T, 1] float32, and sums [K] float32, or an empty tensor.
    """
    tokens, width = x.shape
    assert width <= MAX_WIDTH
    assert gradient is None or is_gelu
    launch = launch or (ROWS_WITH_SUMS if has_sum else ROWS).scaled_to(width)
    x = with_unit_stride(x)
    gradient = x if gradient is None else with_unit_stride(gradient)
    out = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=x.device)
    tiles = tile_tokens(x[None], launch.programs)
    partial = torch.empty((tiles.programs if has_sum else 0, width), dtype=torch.float32, device=x.device)
    wrap_if_traced(_quantize_rows_kernel, x)[(tiles.programs,)](
        x_ptr=x,
        gradient_ptr=gradient,
        out_ptr=out,
        scale_ptr=scale,
        partial_ptr=partial if has_sum else scale,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        x_stride=x.stride(0),
        gradient_stride=gradient.stride(0),
        SMALLEST=SMALLEST_AMAX,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        GELU=is_gelu,
        HAS_GRADIENT=gradient is not x,
        SUMS=has_sum,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return out, scale, partial.sum(0) if has_sum else scale.new_empty(0)


@triton.jit
def _quantize_parts_kernel(
    x0_ptr, x1_ptr, x2_ptr, out_ptr, scale_ptr, partial_ptr, tokens, tokens_per_program, stride0, stride1, stride2,
    SMALLEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Quantizes rows that are in two or three tensors of D columns, as if these were joined."""
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    sums0 = tl.zeros([BLOCK], tl.float32)
    sums1 = tl.zeros([BLOCK], tl.float32)
    sums2 = tl.zeros([BLOCK], tl.float32)
    for token in tl.range(first.to(tl.int64), last.to(tl.int64), num_stages=STAGES):
        # All loads before the maximum: it synchronizes threads, which no load may be moved across.
        x0 = load_token(x0_ptr + token * stride0, cols, inside)
        x1 = load_token(x1_ptr + token * stride1, cols, inside)
        largest = tl.maximum(tl.abs(x0), tl.abs(x1))
        if PARTS == 3:
            x2 = load_token(x2_ptr + token * stride2, cols, inside)
            largest = tl.maximum(largest, tl.abs(x2))
        scale, up = _power_of_two(tl.maximum(tl.max(largest, 0), SMALLEST))
        row_ptr = out_ptr + token * (PARTS * D) + cols
        tl.store(row_ptr, (x0 * up).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(row_ptr + D, (x1 * up).to(out_ptr.dtype.element_ty), mask=inside)
        if PARTS == 3:
            tl.store(row_ptr + 2 * D, (x2 * up).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(scale_ptr + token, scale)
        if SUMS:
            sums0 += x0
            sums1 += x1
            if PARTS == 3:
                sums2 += x2
    if SUMS:
        slot_ptr = partial_ptr + tl.program_id(0) * (PARTS * D) + cols
        tl.store(slot_ptr, sums0, mask=inside)
        tl.store(slot_ptr + D, sums1, mask=inside)
        if PARTS == 3:
            tl.store(slot_ptr + 2 * D, sums2, mask=inside)


def _parts_launch(width: int, has_sum: bool) -> Launch:
    scaled = (ROWS_WITH_SUMS if has_sum else ROWS).scaled_to(width)
    # Parts are loaded one by one, so that more threads have less to do: 221 instead of 265 us for 3 x 4,096 channels.
    return Launch(min(scaled.warps, 8), max(scaled.programs, 2), scaled.stages)


def quantize_parts(
    xs: Sequence[Tensor], *, has_sum: bool = False, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes rows whose columns are in two or three tensors of one width, as if these were joined.

    Args:
        xs: [T, K] each, together up to MAX_WIDTH columns.
        has_sum, launch: as for `quantize_rows`.

    Returns:
        e4m3 [T, n K], scales [T, 1] float32, and sums [n K] float32, or an empty tensor.
    """
    tokens, width = xs[0].shape
    parts, xs = len(xs), [with_unit_stride(x) for x in xs]
    assert parts in (2, 3)
    assert all(x.shape == (tokens, width) for x in xs)
    assert parts * width <= MAX_WIDTH
    launch = launch or _parts_launch(parts * width, has_sum)
    out = torch.empty((tokens, parts * width), dtype=torch.float8_e4m3fn, device=xs[0].device)
    scale = torch.empty((tokens, 1), dtype=torch.float32, device=xs[0].device)
    tiles = tile_tokens(xs[0][None], launch.programs)
    partial = torch.empty((tiles.programs if has_sum else 0, parts * width), dtype=torch.float32, device=xs[0].device)
    wrap_if_traced(_quantize_parts_kernel, xs[0])[(tiles.programs,)](
        x0_ptr=xs[0],
        x1_ptr=xs[1],
        x2_ptr=xs[-1],
        out_ptr=out,
        scale_ptr=scale,
        partial_ptr=partial if has_sum else scale,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        stride0=xs[0].stride(0),
        stride1=xs[1].stride(0),
        stride2=xs[-1].stride(0),
        SMALLEST=SMALLEST_AMAX,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        PARTS=parts,
        SUMS=has_sum,
        STAGES=launch.stages,
        num_warps=launch.warps,
    )
    return out, scale, partial.sum(0) if has_sum else scale.new_empty(0)
