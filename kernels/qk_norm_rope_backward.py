"""Backward kernel of `qk_norm_rope`: reads gradients and inputs and writes input gradients once.

Weight gradients are summed on the way, per program, then over programs by a small kernel, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.angles import angles_of_first, angles_of_next, angles_of_one, cos_sin
from ltx_titan_kernels.launches import Launch, runnable, with_unit_stride
from ltx_titan_kernels.modulation_rows import SUM_PROGRAMS, SUM_WIDTH, sum_over_programs
from ltx_titan_kernels.qk_layout import (
    both,
    channels,
    divide,
    first_pair_and_padding,
    load_halves,
    number_of_program,
    sum_of,
)

TOGETHER = Launch(warps=8, programs=1, stages=3)
WITHOUT_ROTATION = Launch(warps=16, programs=2, stages=3)
"""Launches at inner width 4096, measured on an H100 (docs/benchmarks)."""

APART = Launch(warps=4, programs=3, stages=3)
"""The same at 2048, the width of the attention between the streams, where queries and keys have angles of their own."""


def backward_launch(width: int, rotations: int) -> Launch:
    """Launch of the backward kernel at this inner width; `rotations` is 0, 1 that queries and keys share, or 2."""
    if rotations == 2:
        return APART.at(width, measured_at=2048)
    return (WITHOUT_ROTATION, TOGETHER)[rotations].at(width)


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
    mean = sum_of(d1 * n1 + d2 * n2) / width
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
    w1, w2 = load_halves(weight_ptr, cols, inside, HALF)
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
    program = number_of_program(first_program)
    cols, inside, is_turned, axis, frequency = channels(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    q_grad_ptr += batch * q_grad_stride_b
    k_grad_ptr += batch * k_grad_stride_b
    q_ptr += batch * q_stride_b
    k_ptr += batch * k_stride_b
    # Partial sums [B, slots, D]: those of programs that did queries, then those of programs that did keys.
    partial_ptr += (batch * slots + program) * D
    if SHARED:
        first = program * q_tokens_per_program
        rows_ptr = q_rows_ptr + batch * AXES * q_tokens
        w1, w2 = load_halves(q_weight_ptr, cols, inside, HALF)
        v1, v2 = load_halves(k_weight_ptr, cols, inside, HALF)
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
    work = divide(q, k, tables, rows, head_dim, launch)
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    dsums = [torch.empty_like(rstd) for rstd in rstds] if is_summed else []
    partial = q.new_empty((q.shape[0], work.slots, q.shape[-1]), dtype=torch.float32)
    d_weights = weights[0].new_empty((2, q.shape[-1]))
    inputs = zip(
        grads,
        (q, k),
        rstds,
        [weight.contiguous() for weight in weights],
        both(tables, q),
        both(rows, q),
        dxs,
        dsums or rstds,
        strict=True,
    )
    runnable(_qk_norm_rope_backward_kernel, q)[work.grid](
        *(tensor for tensors in inputs for tensor in tensors),
        partial,
        *work.programs,
        work.slots,
        *(stride for x in (*grads, q, k) for stride in x.stride()[:2]),
        *first_pair_and_padding(tables, rows, head_dim, width, first_head),
        width,
        *work.constants,
        is_summed,
        launch.stages,
        num_warps=launch.warps,
    )
    runnable(_sum_weights_kernel, q)[(triton.cdiv(q.shape[-1], SUM_WIDTH), 2)](
        partial,
        d_weights,
        q.shape[0],
        work.q_slots,
        work.slots,
        q.shape[-1],
        min(SUM_PROGRAMS, triton.next_power_of_2(work.slots)),
        SUM_WIDTH,
        num_warps=4,
    )
    return [*dxs, d_weights, *dsums]
