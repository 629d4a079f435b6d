"""Forward kernel of `qk_norm_rope`: reads and writes queries and keys once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.angles import angles_of_first, angles_of_next, cos_sin
from ltx_titan_kernels.launches import Launch, runnable, with_unit_stride
from ltx_titan_kernels.qk_layout import (
    both,
    channels,
    divide,
    first_pair_and_padding,
    load_halves,
    load_stored,
    number_of_program,
    sum_of,
)

TOGETHER = Launch(warps=4, programs=2, stages=None)
APART = Launch(warps=8, programs=16, stages=None)
WITHOUT_ROTATION = Launch(warps=8, programs=32, stages=None)
"""Launches at inner width 4096, measured on an H100 (docs/benchmarks)."""


def forward_launch(width: int, rotations: int) -> Launch:
    """Launch of the forward kernel at this inner width; `rotations` is 0, 1 that queries and keys share, or 2."""
    return (WITHOUT_ROTATION, TOGETHER, APART)[rotations].at(width)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _sum_of_each(a, b):
    """Sums of all elements of two tensors, in one reduction: threads wait for each other once."""
    a = tl.reshape(a, [a.numel], can_reorder=True)
    b = tl.reshape(b, [b.numel], can_reorder=True)
    return tl.reduce((a, b), 0, _add_pairs)


@triton.jit
def _store_turned(out_ptr, x1, x2, rstd, w1, w2, cos, sin, cols, inside, HALF: tl.constexpr, ROTATED: tl.constexpr):
    z1 = x1 * rstd * w1
    z2 = x2 * rstd * w2
    o1, o2 = z1, z2
    if ROTATED:
        o1 = z1 * cos - z2 * sin
        o2 = z2 * cos + z1 * sin
    tl.store(out_ptr + cols, o1.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + cols + HALF, o2.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_alone(
    x_ptr, weight_ptr, sum_ptr, table_ptr, rows_ptr, out_ptr, rstd_ptr,
    batch, first, tokens_per_program, tokens, stride_s, width, eps, cols, inside, axis, frequency, is_turned,
    D: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """A program's tokens of queries or of keys, where they do not share their angles; prefetched as in the kernel."""
    last = tl.minimum(first + tokens_per_program, tokens) - 1
    next_x1, next_x2 = load_stored(x_ptr + first * stride_s, cols, inside, HALF)
    pairs_ptr, angles = angles_of_first(table_ptr, inside)
    rows_ptr += batch * AXES * tokens
    out_ptr += batch * tokens * D
    rstd_ptr += batch * tokens
    sum_ptr += batch * tokens
    for token in tl.range(first, last + 1, num_stages=1):
        x1, x2 = next_x1.to(tl.float32), next_x2.to(tl.float32)
        next_x1, next_x2 = load_stored(x_ptr + (token + 1) * stride_s, cols, inside & (token < last), HALF)
        cos, sin = x1, x2
        if ROTATED:
            angles = angles_of_next(
                angles, pairs_ptr, rows_ptr + token, tokens, token == first, axis, frequency, is_turned, ROW, AXES
            )
            cos, sin = cos_sin(angles)
        squares = tl.load(sum_ptr + token) if SUMMED else sum_of(x1 * x1 + x2 * x2)
        rstd = tl.rsqrt(squares / width + eps)
        w1, w2 = load_halves(weight_ptr, cols, inside, HALF)
        _store_turned(out_ptr + token * D, x1, x2, rstd, w1, w2, cos, sin, cols, inside, HALF, ROTATED)
        tl.store(rstd_ptr + token, rstd)


@triton.jit
def _qk_norm_rope_forward_kernel(
    q_ptr, q_weight_ptr, q_sum_ptr, q_table_ptr, q_rows_ptr, q_out_ptr, q_rstd_ptr,
    k_ptr, k_weight_ptr, k_sum_ptr, k_table_ptr, k_rows_ptr, k_out_ptr, k_rstd_ptr,
    q_tokens, k_tokens, first_program, q_programs, q_tokens_per_program, k_tokens_per_program,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, first_pair, pad, width, eps,
    D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROW: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr, SHARED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    program = number_of_program(first_program)
    cols, inside, is_turned, axis, frequency = channels(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    if SHARED:
        first = program * q_tokens_per_program
        last = tl.minimum(first + q_tokens_per_program, q_tokens) - 1
        q_ptr += batch * q_stride_b
        k_ptr += batch * k_stride_b
        rows_ptr = q_rows_ptr + batch * AXES * q_tokens
        pairs_ptr, angles = angles_of_first(q_table_ptr, inside)
        next_x1, next_x2 = load_stored(q_ptr + first * q_stride_s, cols, inside, HALF)
        next_y1, next_y2 = load_stored(k_ptr + first * k_stride_s, cols, inside, HALF)
        # The next token is on its way, in its own narrow dtype, while this one is worked on. That leaves registers for
        # two programs a multiprocessor, which the compiler's own pipeline, with angles and weights in it, does not.
        for token in tl.range(first, last + 1, num_stages=1):
            at = batch * q_tokens + token
            x1, x2, y1, y2 = (
                next_x1.to(tl.float32), next_x2.to(tl.float32), next_y1.to(tl.float32), next_y2.to(tl.float32)
            )  # fmt: skip
            coming = tl.minimum(token + 1, last)
            next_x1, next_x2 = load_stored(q_ptr + coming * q_stride_s, cols, inside, HALF)
            next_y1, next_y2 = load_stored(k_ptr + coming * k_stride_s, cols, inside, HALF)
            angles = angles_of_next(
                angles, pairs_ptr, rows_ptr + token, q_tokens, token == first, axis, frequency, is_turned, ROW, AXES
            )
            cos, sin = cos_sin(angles)
            if SUMMED:
                q_squares = tl.load(q_sum_ptr + at)
                k_squares = tl.load(k_sum_ptr + at)
            else:
                q_squares, k_squares = _sum_of_each(x1 * x1 + x2 * x2, y1 * y1 + y2 * y2)
            q_rstd = tl.rsqrt(q_squares / width + eps)
            k_rstd = tl.rsqrt(k_squares / width + eps)
            # Weights come from the cache each time: kept, they would take the registers of a second program.
            w1, w2 = load_halves(q_weight_ptr, cols, inside, HALF)
            _store_turned(q_out_ptr + at * D, x1, x2, q_rstd, w1, w2, cos, sin, cols, inside, HALF, True)
            v1, v2 = load_halves(k_weight_ptr, cols, inside, HALF)
            _store_turned(k_out_ptr + at * D, y1, y2, k_rstd, v1, v2, cos, sin, cols, inside, HALF, True)
            tl.store(q_rstd_ptr + at, q_rstd)
            tl.store(k_rstd_ptr + at, k_rstd)
    elif program < q_programs:
        _forward_alone(
            q_ptr + batch * q_stride_b, q_weight_ptr, q_sum_ptr, q_table_ptr, q_rows_ptr, q_out_ptr, q_rstd_ptr,
            batch, program * q_tokens_per_program, q_tokens_per_program, q_tokens, q_stride_s, width, eps,
            cols, inside, axis, frequency, is_turned, D, HALF, ROW, AXES, ROTATED, SUMMED,
        )  # fmt: skip
    else:
        _forward_alone(
            k_ptr + batch * k_stride_b, k_weight_ptr, k_sum_ptr, k_table_ptr, k_rows_ptr, k_out_ptr, k_rstd_ptr,
            batch, (program - q_programs) * k_tokens_per_program, k_tokens_per_program, k_tokens, k_stride_s, width,
            eps, cols, inside, axis, frequency, is_turned, D, HALF, ROW, AXES, ROTATED, SUMMED,
        )  # fmt: skip


def launch_forward(
    q: Tensor,
    k: Tensor,
    weights: list[Tensor],
    tables: list[Tensor],
    rows: list[Tensor],
    sums: list[Tensor],
    head_dim: int,
    width: int,
    first_head: int,
    eps: float,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the forward kernel. `launch` overrides the choice, to measure it.

    Args:
        q, k: [B, S, D] and [B, T, D].
        weights: of queries and of keys [D].
        tables, rows: rotation (see `PackedRotation`) of queries, of keys; one where they share it, none without.
        sums: sums of squares of queries [B, S] and keys [B, T] float32, or none to compute them.
        head_dim: width of a head.
        width: inner width over all ranks.
        first_head: number of the first head here.
        eps: added to the mean square.
        launch: see above.

    Returns:
        Queries [B, S, D], keys [B, T, D], and their 1 / rms, [B, S] and [B, T] float32.
    """
    launch = launch or forward_launch(q.shape[-1], len(tables))
    q, k = with_unit_stride(q), with_unit_stride(k)
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    rstds = [torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k)]
    work = divide(q, k, tables, rows, head_dim, launch)
    inputs = zip(
        (q, k),
        [weight.contiguous() for weight in weights],
        [total.contiguous() for total in sums] or rstds,
        both(tables, q),
        both(rows, q),
        outs,
        rstds,
        strict=True,
    )
    runnable(_qk_norm_rope_forward_kernel, q)[work.grid](
        *(tensor for tensors in inputs for tensor in tensors),
        *work.programs,
        *q.stride()[:2],
        *k.stride()[:2],
        *first_pair_and_padding(tables, rows, head_dim, width, first_head),
        width,
        eps,
        *work.constants,
        bool(sums),
        num_warps=launch.warps,
    )
    return [*outs, *rstds]
