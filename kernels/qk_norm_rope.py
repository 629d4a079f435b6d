"""RMS norm of queries and keys over the full inner width, with weight, then split rotary embedding, in one launch.

    z = x / sqrt(sum(x ** 2) / width + eps) * weight                    over all heads at once
    o_i = z_i cos_p - z_j sin_p,  o_j = z_j cos_p + z_i sin_p           i < K / 2,  j = i + K / 2,  p = head * K / 2 + i

x, z, o [B, S, D] with D = heads * K: contiguous tokens of contiguous heads, which attention takes as [B, H, S, K]
without a copy. Angle p belongs to axis (p - pad) mod axes and to frequency (p - pad) div axes; the first `pad` angles
turn nothing. Cosines and sines come from the small tables of rope.py, so nothing of the size of q is read besides q.

Queries and keys with the same angles (self-attention) are done token by token together, which reads the angles once.
Without angles it is the norm alone (text attention). Under tensor parallelism the sums of squares come from outside,
summed over ranks, and their gradient is returned.

Forward: reads and writes q and k. Backward: reads do, x and writes dx for each; weight gradients are summed on the way,
per program, then over programs, without atomics. torch.compile writes the rotation in several passes and needs another
for the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.ops import HeadShare
from ltx_titan.model.rope import PackedRotation
from ltx_titan_kernels.angles import angles_of_first, angles_of_next, angles_of_one, cos_sin
from ltx_titan_kernels.launches import (
    Launch,
    Walk,
    divide_tokens,
    divide_tokens_of_two,
    is_supported,
    operator,
    runnable,
    with_unit_stride,
)
from ltx_titan_kernels.modulation_rows import SUM_PROGRAMS, SUM_WIDTH, sum_over_programs

reference = ops.qk_norm_rope
"""The same in plain torch operations, with angles written out per token; what the kernel is held against."""


FORWARD_TOGETHER = Launch(warps=4, programs=2, stages=1)
FORWARD_APART = Launch(warps=8, programs=16, stages=1)
FORWARD_WITHOUT_ROTATION = Launch(warps=8, programs=32, stages=1)
BACKWARD_TOGETHER = Launch(warps=8, programs=1, stages=3)
BACKWARD_WITHOUT_ROTATION = Launch(warps=16, programs=2, stages=3)
"""Launches at inner width 4096, measured on an H100 (docs/benchmarks)."""

BACKWARD_APART = Launch(warps=4, programs=3, stages=3)
"""The same at 2048, the width of the attention between the streams, where queries and keys have angles of their own."""


def forward_launch(width: int, rotations: int) -> Launch:
    """Launch of the forward kernel at this inner width; `rotations` is 0, 1 that queries and keys share, or 2."""
    return (FORWARD_WITHOUT_ROTATION, FORWARD_TOGETHER, FORWARD_APART)[rotations].at(width)


def backward_launch(width: int, rotations: int) -> Launch:
    """Launch of the backward kernel at this inner width; `rotations` as in `forward_launch`."""
    if rotations == 2:
        return BACKWARD_APART.at(width, measured_at=2048)
    return (BACKWARD_WITHOUT_ROTATION, BACKWARD_TOGETHER)[rotations].at(width)


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
def _sum_of(a):
    return tl.sum(tl.reshape(a, [a.numel], can_reorder=True), 0)


@triton.jit
def _number_of_program(first_program):
    """Numbers that begin with `first_program`, so that those programs start first."""
    # Not by a remainder: its code, which runs once, would hold a tenth of all registers throughout.
    program = tl.program_id(0) + first_program
    return tl.where(program < tl.num_programs(0), program, program - tl.num_programs(0))


@triton.jit
def _channels(
    first_pair, pad, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    AXES: tl.constexpr,
):  # fmt: skip
    """Channels of the first halves of all heads [heads, K / 2] and whether they exist.

    Of each one's angle also whether it turns anything, the axis and the frequency.
    """
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    lane = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS) & (lane < HALF)
    cols = head * (2 * HALF) + lane
    pair = first_pair + head * HALF + lane - pad
    is_turned = inside & (pair >= 0)
    return cols, inside, is_turned, pair % AXES, pair // AXES


@triton.jit
def _load_stored(ptr, cols, inside, HALF: tl.constexpr):
    """First and second halves of all heads [heads, K / 2], as stored; `cols` are the channels of the first."""
    return tl.load(ptr + cols, mask=inside, other=0.0), tl.load(ptr + cols + HALF, mask=inside, other=0.0)


@triton.jit
def _load_halves(ptr, cols, inside, HALF: tl.constexpr):
    """The same in float32."""
    first, second = _load_stored(ptr, cols, inside, HALF)
    return first.to(tl.float32), second.to(tl.float32)


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
    next_x1, next_x2 = _load_stored(x_ptr + first * stride_s, cols, inside, HALF)
    pairs_ptr, angles = angles_of_first(table_ptr, inside)
    rows_ptr += batch * AXES * tokens
    out_ptr += batch * tokens * D
    rstd_ptr += batch * tokens
    sum_ptr += batch * tokens
    for token in tl.range(first, last + 1, num_stages=1):
        x1, x2 = next_x1.to(tl.float32), next_x2.to(tl.float32)
        next_x1, next_x2 = _load_stored(x_ptr + (token + 1) * stride_s, cols, inside & (token < last), HALF)
        cos, sin = x1, x2
        if ROTATED:
            angles = angles_of_next(
                angles, pairs_ptr, rows_ptr + token, tokens, token == first, axis, frequency, is_turned, ROW, AXES
            )
            cos, sin = cos_sin(angles)
        squares = tl.load(sum_ptr + token) if SUMMED else _sum_of(x1 * x1 + x2 * x2)
        rstd = tl.rsqrt(squares / width + eps)
        w1, w2 = _load_halves(weight_ptr, cols, inside, HALF)
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
    program = _number_of_program(first_program)
    cols, inside, is_turned, axis, frequency = _channels(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    if SHARED:
        first = program * q_tokens_per_program
        last = tl.minimum(first + q_tokens_per_program, q_tokens) - 1
        q_ptr += batch * q_stride_b
        k_ptr += batch * k_stride_b
        rows_ptr = q_rows_ptr + batch * AXES * q_tokens
        pairs_ptr, angles = angles_of_first(q_table_ptr, inside)
        next_x1, next_x2 = _load_stored(q_ptr + first * q_stride_s, cols, inside, HALF)
        next_y1, next_y2 = _load_stored(k_ptr + first * k_stride_s, cols, inside, HALF)
        # The next token is on its way, in its own narrow dtype, while this one is worked on. That leaves registers for
        # two programs a multiprocessor, which the compiler's own pipeline, with angles and weights in it, does not.
        for token in tl.range(first, last + 1, num_stages=1):
            at = batch * q_tokens + token
            x1, x2, y1, y2 = (
                next_x1.to(tl.float32), next_x2.to(tl.float32), next_y1.to(tl.float32), next_y2.to(tl.float32)
            )  # fmt: skip
            coming = tl.minimum(token + 1, last)
            next_x1, next_x2 = _load_stored(q_ptr + coming * q_stride_s, cols, inside, HALF)
            next_y1, next_y2 = _load_stored(k_ptr + coming * k_stride_s, cols, inside, HALF)
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
            w1, w2 = _load_halves(q_weight_ptr, cols, inside, HALF)
            _store_turned(q_out_ptr + at * D, x1, x2, q_rstd, w1, w2, cos, sin, cols, inside, HALF, True)
            v1, v2 = _load_halves(k_weight_ptr, cols, inside, HALF)
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
    q_walk, k_walk, grid, shape = _divide(q, k, tables, rows, head_dim, launch)
    inputs = zip(
        (q, k),
        [weight.contiguous() for weight in weights],
        [total.contiguous() for total in sums] or rstds,
        _both(tables, q),
        _both(rows, q),
        outs,
        rstds,
        strict=True,
    )
    runnable(_qk_norm_rope_forward_kernel, q)[grid](
        *(tensor for tensors in inputs for tensor in tensors),
        q.shape[1],
        k.shape[1],
        q_walk.programs if k.shape[1] < q.shape[1] else 0,
        q_walk.programs,
        q_walk.tokens,
        k_walk.tokens,
        *q.stride()[:2],
        *k.stride()[:2],
        *_first_pair_and_padding(tables, rows, head_dim, width, first_head),
        width,
        eps,
        *shape,
        bool(sums),
        num_warps=launch.warps,
    )
    return [*outs, *rstds]


def _divide(
    q: Tensor, k: Tensor, tables: list[Tensor], rows: list[Tensor], head_dim: int, launch: Launch
) -> tuple[Walk, Walk, tuple[int, int], tuple[int | bool, ...]]:
    """Walks over queries and over keys, the grid, and the constants from D to SHARED that both kernels take."""
    width, half = q.shape[-1], head_dim // 2
    heads = width // head_dim
    is_shared = len(tables) == 1
    if is_shared:
        q_walk = k_walk = divide_tokens(q, launch.programs)
    else:
        # Every token of sound has angles of its own to wait for; those of video share them by the frame. So the shorter
        # one's programs also start first.
        q_walk, k_walk = divide_tokens_of_two(q, k, launch.programs, is_shorter_slower=bool(tables))
    shape = (
        width,
        heads,
        half,
        triton.next_power_of_2(heads),
        triton.next_power_of_2(half),
        tables[0].shape[1] if tables else 1,
        rows[0].shape[1] if rows else 1,
        bool(tables),
        is_shared,
    )
    programs = q_walk.programs if is_shared else q_walk.programs + k_walk.programs
    return q_walk, k_walk, (programs, q.shape[0]), shape


def _both(tensors: list[Tensor], filler: Tensor) -> list[Tensor]:
    """One for queries and one for keys; pointers that are never read where there is none."""
    return (tensors or [filler]) * (1 if len(tensors) == 2 else 2)


def _first_pair_and_padding(
    tables: list[Tensor], rows: list[Tensor], head_dim: int, width: int, first_head: int
) -> tuple[int, int]:
    turned = tables[0].shape[1] * rows[0].shape[1] if tables else 0
    return first_head * head_dim // 2, width // 2 - turned


@triton.jit
def _backward_token(
    grad_ptr, x_ptr, rstd_ptr, dx_ptr, dsum_ptr, w1, w2, dw1, dw2, cos, sin, cols, inside, width,
    HALF: tl.constexpr, SUMMED: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """One token of one tensor; returns the weight gradients with this token's part added."""
    g1 = tl.load(grad_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(grad_ptr + cols + HALF, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + cols + HALF, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr)
    d1, d2 = g1, g2
    if ROTATED:
        d1 = g1 * cos + g2 * sin
        d2 = g2 * cos - g1 * sin
    n1 = x1 * rstd
    n2 = x2 * rstd
    dw1 += d1 * n1
    dw2 += d2 * n2
    d1 *= w1
    d2 *= w2
    mean = _sum_of(d1 * n1 + d2 * n2) / width
    if SUMMED:
        tl.store(dsum_ptr, -0.5 * rstd * rstd * mean)
    else:
        d1 -= n1 * mean
        d2 -= n2 * mean
    tl.store(dx_ptr + cols, (d1 * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + cols + HALF, (d2 * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    return dw1, dw2


@triton.jit
def _backward_alone(
    grad_ptr, x_ptr, rstd_ptr, weight_ptr, table_ptr, rows_ptr, dx_ptr, dsum_ptr, partial_ptr,
    batch, first, tokens_per_program, tokens, grad_stride_s, x_stride_s, width,
    cols, inside, axis, frequency, is_turned,
    D: tl.constexpr, HALF: tl.constexpr, ROW: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr,
    SUMMED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program's tokens of queries or of keys, where they do not share their angles."""
    w1, w2 = _load_halves(weight_ptr, cols, inside, HALF)
    dw1 = tl.zeros(cols.shape, tl.float32)
    dw2 = tl.zeros(cols.shape, tl.float32)
    cos, sin = w1, w2
    pairs_ptr, angles = angles_of_first(table_ptr, inside)
    rows_ptr += batch * AXES * tokens
    dx_ptr += batch * tokens * D
    rstd_ptr += batch * tokens
    dsum_ptr += batch * tokens
    for token in tl.range(first, tl.minimum(first + tokens_per_program, tokens), num_stages=STAGES):
        if ROTATED:
            angles = angles_of_next(
                angles, pairs_ptr, rows_ptr + token, tokens, token == first, axis, frequency, is_turned, ROW, AXES
            )
            cos, sin = cos_sin(angles)
        dw1, dw2 = _backward_token(
            grad_ptr + token * grad_stride_s, x_ptr + token * x_stride_s, rstd_ptr + token, dx_ptr + token * D,
            dsum_ptr + token,
            w1, w2, dw1, dw2, cos, sin, cols, inside, width, HALF, SUMMED, ROTATED,
        )  # fmt: skip
    tl.store(partial_ptr + cols, dw1, mask=inside)
    tl.store(partial_ptr + cols + HALF, dw2, mask=inside)


@triton.jit
def _qk_norm_rope_backward_kernel(
    q_grad_ptr, q_ptr, q_rstd_ptr, q_weight_ptr, q_table_ptr, q_rows_ptr, dq_ptr, q_dsum_ptr,
    k_grad_ptr, k_ptr, k_rstd_ptr, k_weight_ptr, k_table_ptr, k_rows_ptr, dk_ptr, k_dsum_ptr,
    partial_ptr,
    q_tokens, k_tokens, first_program, q_programs, q_tokens_per_program, k_tokens_per_program, slots,
    q_grad_stride_b, q_grad_stride_s, k_grad_stride_b, k_grad_stride_s,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, first_pair, pad, width,
    D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    ROW: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr, SHARED: tl.constexpr, SUMMED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    program = _number_of_program(first_program)
    cols, inside, is_turned, axis, frequency = _channels(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    q_grad_ptr += batch * q_grad_stride_b
    k_grad_ptr += batch * k_grad_stride_b
    q_ptr += batch * q_stride_b
    k_ptr += batch * k_stride_b
    # Partial sums [B, slots, D]: those of programs that did queries, then those of programs that did keys.
    partial_ptr += (batch * slots + program) * D
    if SHARED:
        first = program * q_tokens_per_program
        rows_ptr = q_rows_ptr + batch * AXES * q_tokens
        w1, w2 = _load_halves(q_weight_ptr, cols, inside, HALF)
        v1, v2 = _load_halves(k_weight_ptr, cols, inside, HALF)
        dw1 = tl.zeros(cols.shape, tl.float32)
        dw2 = tl.zeros(cols.shape, tl.float32)
        dv1 = tl.zeros(cols.shape, tl.float32)
        dv2 = tl.zeros(cols.shape, tl.float32)
        for token in tl.range(first, tl.minimum(first + q_tokens_per_program, q_tokens), num_stages=STAGES):
            at = batch * q_tokens + token
            # Angles carried from token to token would stall the prefetch, which is deep here.
            cos, sin = angles_of_one(q_table_ptr, rows_ptr + token, q_tokens, axis, frequency, is_turned, ROW, AXES)
            dw1, dw2 = _backward_token(
                q_grad_ptr + token * q_grad_stride_s, q_ptr + token * q_stride_s, q_rstd_ptr + at, dq_ptr + at * D,
                q_dsum_ptr + at, w1, w2, dw1, dw2, cos, sin, cols, inside, width, HALF, SUMMED, True,
            )  # fmt: skip
            dv1, dv2 = _backward_token(
                k_grad_ptr + token * k_grad_stride_s, k_ptr + token * k_stride_s, k_rstd_ptr + at, dk_ptr + at * D,
                k_dsum_ptr + at, v1, v2, dv1, dv2, cos, sin, cols, inside, width, HALF, SUMMED, True,
            )  # fmt: skip
        tl.store(partial_ptr + cols, dw1, mask=inside)
        tl.store(partial_ptr + cols + HALF, dw2, mask=inside)
        partial_ptr += q_programs * D
        tl.store(partial_ptr + cols, dv1, mask=inside)
        tl.store(partial_ptr + cols + HALF, dv2, mask=inside)
    elif program < q_programs:
        _backward_alone(
            q_grad_ptr, q_ptr, q_rstd_ptr, q_weight_ptr, q_table_ptr, q_rows_ptr, dq_ptr, q_dsum_ptr, partial_ptr,
            batch, program * q_tokens_per_program, q_tokens_per_program, q_tokens, q_grad_stride_s, q_stride_s, width,
            cols, inside, axis, frequency, is_turned, D, HALF, ROW, AXES, ROTATED, SUMMED, STAGES,
        )  # fmt: skip
    else:
        _backward_alone(
            k_grad_ptr, k_ptr, k_rstd_ptr, k_weight_ptr, k_table_ptr, k_rows_ptr, dk_ptr, k_dsum_ptr, partial_ptr,
            batch, (program - q_programs) * k_tokens_per_program, k_tokens_per_program, k_tokens, k_grad_stride_s,
            k_stride_s, width, cols, inside, axis, frequency, is_turned,
            D, HALF, ROW, AXES, ROTATED, SUMMED, STAGES,
        )  # fmt: skip


@triton.jit
def _sum_weights_kernel(
    partial_ptr, weights_ptr, batch, q_programs, slots, D,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Weight gradients [2, D] of queries and keys, from the partial sums of the programs that did either."""
    cols = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < D
    of_keys = tl.program_id(1)
    first = tl.where(of_keys == 1, q_programs, 0)
    last = tl.where(of_keys == 1, slots, q_programs)
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for sample in range(0, batch):
        total += sum_over_programs(
            partial_ptr + sample * slots * D, partial_ptr, first, last, D, 0, cols, inside,
            BLOCK_PROGRAMS, BLOCK_WIDTH, False,
        )  # fmt: skip
    tl.store(weights_ptr + of_keys * D + cols, total.to(weights_ptr.dtype.element_ty), mask=inside)


def launch_backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    rstds: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor],
    rows: list[Tensor],
    is_summed: bool,
    head_dim: int,
    width: int,
    first_head: int,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the backward kernel; arguments as in `launch_forward`, `rstds` from it, `grads` of its two outputs.

    Returns:
        dq, dk, the weight gradients [2, D] of queries and of keys, and, where the sums of squares came from
        outside, their gradients [B, S] and [B, T] float32.
    """
    launch = launch or backward_launch(q.shape[-1], len(tables))
    q, k = with_unit_stride(q), with_unit_stride(k)
    grads = [with_unit_stride(grad) for grad in grads]
    q_walk, k_walk, grid, shape = _divide(q, k, tables, rows, head_dim, launch)
    slots = q_walk.programs + k_walk.programs
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    dsums = [torch.empty_like(rstd) for rstd in rstds] if is_summed else []
    partial = q.new_empty((q.shape[0], slots, q.shape[-1]), dtype=torch.float32)
    d_weights = weights[0].new_empty((2, q.shape[-1]))
    inputs = zip(
        grads,
        (q, k),
        rstds,
        [weight.contiguous() for weight in weights],
        _both(tables, q),
        _both(rows, q),
        dxs,
        dsums or rstds,
        strict=True,
    )
    runnable(_qk_norm_rope_backward_kernel, q)[grid](
        *(tensor for tensors in inputs for tensor in tensors),
        partial,
        q.shape[1],
        k.shape[1],
        q_walk.programs if k.shape[1] < q.shape[1] else 0,
        q_walk.programs,
        q_walk.tokens,
        k_walk.tokens,
        slots,
        *(stride for x in (*grads, q, k) for stride in x.stride()[:2]),
        *_first_pair_and_padding(tables, rows, head_dim, width, first_head),
        width,
        *shape,
        is_summed,
        launch.stages,
        num_warps=launch.warps,
    )
    runnable(_sum_weights_kernel, q)[(triton.cdiv(q.shape[-1], SUM_WIDTH), 2)](
        partial,
        d_weights,
        q.shape[0],
        q_walk.programs,
        slots,
        q.shape[-1],
        min(SUM_PROGRAMS, triton.next_power_of_2(slots)),
        SUM_WIDTH,
        num_warps=4,
    )
    return [*dxs, d_weights, *dsums]


def _fake_forward(q, k, weights, tables, rows, sums, head_dim, width, first_head, eps):
    return [
        *(x.new_empty(x.shape) for x in (q, k)),
        *(x.new_empty(x.shape[:2], dtype=torch.float32) for x in (q, k)),
    ]


@operator("qk_norm_rope", _fake_forward)
def _forward_op(
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
) -> list[Tensor]:
    return launch_forward(q, k, weights, tables, rows, sums, head_dim, width, first_head, eps)


def _fake_backward(grads, q, k, rstds, weights, tables, rows, is_summed, head_dim, width, first_head):
    return [
        *(x.new_empty(x.shape) for x in (q, k)),
        weights[0].new_empty((2, q.shape[-1])),
        *(rstd.new_empty(rstd.shape) for rstd in rstds if is_summed),
    ]


@operator("qk_norm_rope_backward", _fake_backward)
def _backward_op(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    rstds: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor],
    rows: list[Tensor],
    is_summed: bool,
    head_dim: int,
    width: int,
    first_head: int,
) -> list[Tensor]:
    return launch_backward(grads, q, k, rstds, weights, tables, rows, is_summed, head_dim, width, first_head)


def _setup_context(ctx, inputs, output) -> None:
    q, k, weights, tables, rows, sums, *ctx.sizes, _ = inputs
    ctx.save_for_backward(q, k, *output[2:], *weights, *tables, *rows)
    ctx.is_summed = bool(sums)
    ctx.tables = len(tables)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, grads: list[Tensor]) -> tuple:
    q, k, *rest = ctx.saved_tensors
    rstds, weights, rest = rest[:2], rest[2:4], rest[4:]
    tables, rows = rest[: ctx.tables], rest[ctx.tables :]
    dq, dk, d_weights, *d_sums = _backward_op(grads[:2], q, k, rstds, weights, tables, rows, ctx.is_summed, *ctx.sizes)
    d_weights = [d.to(weight.dtype) for d, weight in zip(d_weights.unbind(0), weights, strict=True)]
    nothing = [None] * ctx.tables
    return dq, dk, d_weights, nothing, nothing, d_sums, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rotation: PackedRotation | None,
    k_rotation: PackedRotation | None,
    *,
    head_dim: int,
    eps: float,
    interleaved: bool = False,
    share: HeadShare | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm with weight over the full inner width, then split rotation of each head.

    Args:
        q, k: projections [B, S, D] and [B, T, D], any strides; under tensor parallelism this rank's heads of them.
        q_weight, k_weight: weights of the two norms [D].
        q_rotation, k_rotation: angles of all heads; None rotates nothing.
        head_dim: width of a head, even.
        eps: added to the mean square.
        interleaved: must be False: a model with interleaved rotation is given the plain torch form (kernel_ops.py).
        share: which heads these are, where they are not all.

    Returns:
        Queries [B, heads, S, head_dim] and keys [B, heads, T, head_dim], as views of contiguous [B, S, D].
    """
    assert not interleaved, "interleaved rotation has no kernel"
    assert is_supported(q, ()), (q.dtype, q.shape)
    assert q.dtype == k.dtype, (q.dtype, k.dtype)
    rotations = [r for r in (q_rotation, k_rotation) if r is not None]
    if q_rotation is k_rotation and q.shape == k.shape:
        rotations = rotations[:1]
    sums = [] if share is None else [ops.sum_squares(x, share) for x in (q, k)]
    outputs = _forward_op(
        q,
        k,
        [q_weight, k_weight],
        [rotation.table for rotation in rotations],
        [rotation.rows for rotation in rotations],
        sums,
        head_dim,
        q.shape[-1] if share is None else share.width,
        0 if share is None else share.first,
        eps,
    )
    q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in outputs[:2])
    return q, k
