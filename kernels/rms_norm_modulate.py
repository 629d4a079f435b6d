"""RMS norm without weight, then scale and shift: what every sub-layer of a block reads.

    h = x / sqrt(mean(x ** 2) + eps) * (1 + scale[i]) + shift[i]        i = index of the token's timestep
    scale, shift = table [D] + embedding [B, K, D]

x, h [B, S, D]; index [B, S]. Statistics and modulation in float32, one rounding at the end. The forward pass reads x
and writes h; the backward pass reads dh and x and writes dx, and sums dscale and dshift per (B, K) on the way
(modulation_rows.py). torch.compile needs a second pass over dh and x for those sums: that is what is won.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.ops import Row, split_row
from ltx_titan_kernels.launches import (
    Launch,
    divide_tokens,
    index_arguments,
    is_supported,
    operator,
    runnable,
    with_equal_strides,
    with_unit_stride,
)
from ltx_titan_kernels.modulation_rows import load_indices, load_row, run_at, store_partial, sum_partials

reference = ops.norm_modulate
"""The same in plain torch operations; given float32 or float64 it is what the kernel is held against."""


FORWARD = Launch(warps=4, programs=32, stages=3)
BACKWARD = Launch(warps=8, programs=1, stages=3)
"""Launches at width 4096, the fastest measured on an H100 (docs/benchmarks)."""


@triton.jit
def _norm_modulate_forward_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    scale_table_ptr,
    shift_table_ptr,
    index_ptr,
    out_ptr,
    rstd_ptr,
    tokens,
    tokens_per_program,
    x_stride_b,
    x_stride_s,
    row_stride_b,
    row_stride_k,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INDEXED: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first = tl.program_id(0) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, tokens)
    x_ptr += batch * x_stride_b
    out_ptr += batch * tokens * D
    if INDEXED:
        token_numbers, indices = load_indices(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    while first < last:
        if INDEXED:
            k, end = run_at(token_numbers, indices, first, last)
        row = batch * row_stride_b + k * row_stride_k
        scale = 1 + load_row(scale_ptr, scale_table_ptr, row, cols, inside)
        shift = load_row(shift_ptr, shift_table_ptr, row, cols, inside)
        for token in tl.range(first, end, num_stages=STAGES):
            x = tl.load(x_ptr + token * x_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            h = (x * rstd * scale + shift).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + token * D + cols, h, mask=inside)
            tl.store(rstd_ptr + batch * tokens + token, rstd)
        first = end


def launch_forward(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor,
    shift_table: Tensor,
    index: Tensor | None,
    eps: float,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the forward kernel: h [B, S, D] and 1 / rms [B, S] float32. `launch` overrides the choice, to measure it."""
    batch, tokens, width = x.shape
    launch = launch or FORWARD.at(width)
    x = with_unit_stride(x)
    scale, shift = with_equal_strides([scale, shift])
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    walk = divide_tokens(x, launch.programs)
    index_ptr, looked_at, is_indexed = index_arguments(index, walk, x)
    runnable(_norm_modulate_forward_kernel, x)[(walk.programs, batch)](
        x,
        scale,
        shift,
        scale_table.contiguous(),
        shift_table.contiguous(),
        index_ptr,
        out,
        rstd,
        tokens,
        walk.tokens,
        x.stride(0),
        x.stride(1),
        scale.stride(0),
        scale.stride(1),
        eps,
        width,
        triton.next_power_of_2(width),
        looked_at,
        is_indexed,
        launch.stages,
        num_warps=launch.warps,
    )
    return out, rstd


@triton.jit
def _norm_modulate_backward_kernel(
    grad_ptr,
    x_ptr,
    rstd_ptr,
    scale_ptr,
    scale_table_ptr,
    index_ptr,
    dx_ptr,
    partial_ptr,
    written_ptr,
    tokens,
    tokens_per_program,
    K,
    grad_stride_b,
    grad_stride_s,
    x_stride_b,
    x_stride_s,
    row_stride_b,
    row_stride_k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    INDEXED: tl.constexpr,
    STAGES: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first = tl.program_id(0) * tokens_per_program
    last = tl.minimum(first + tokens_per_program, tokens)
    program = batch * tl.num_programs(0) + tl.program_id(0)
    partial_ptr += program * K * 2 * D
    grad_ptr += batch * grad_stride_b
    x_ptr += batch * x_stride_b
    dx_ptr += batch * tokens * D
    if INDEXED:
        token_numbers, indices = load_indices(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    written = 0
    while first < last:
        if INDEXED:
            k, end = run_at(token_numbers, indices, first, last)
        row = batch * row_stride_b + k * row_stride_k
        scale = 1 + load_row(scale_ptr, scale_table_ptr, row, cols, inside)
        d_scale = tl.zeros([BLOCK], tl.float32)
        d_shift = tl.zeros([BLOCK], tl.float32)
        for token in tl.range(first, end, num_stages=STAGES):
            grad = tl.load(grad_ptr + token * grad_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + token * x_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            rstd = tl.load(rstd_ptr + batch * tokens + token)
            normed = x * rstd
            d_normed = grad * scale
            mean = tl.sum(d_normed * normed, 0) / D
            dx = (d_normed - normed * mean) * rstd
            tl.store(dx_ptr + token * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            d_scale += grad * normed
            d_shift += grad
        is_written = ((written >> k) & 1) != 0
        store_partial(partial_ptr + k * 2 * D, d_scale, cols, inside, is_written)
        store_partial(partial_ptr + k * 2 * D + D, d_shift, cols, inside, is_written)
        written = written | (1 << k)
        first = end
    if INDEXED:
        tl.store(written_ptr + program, written)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale_table: Tensor,
    index: Tensor | None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the backward kernel: dx [B, S, D], then (dscale, dshift) of embeddings [B, K, 2, D] and of tables [2, D]."""
    batch, tokens, width = x.shape
    k = scale.shape[1]
    launch = launch or BACKWARD.at(width)
    grad, x = with_unit_stride(grad), with_unit_stride(x)
    (scale,) = with_equal_strides([scale])
    walk = divide_tokens(x, launch.programs)
    dx = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    partial = torch.empty((batch, walk.programs, k, 2, width), dtype=torch.float32, device=x.device)
    written = torch.empty((batch, walk.programs), dtype=torch.int32, device=x.device)
    index_ptr, looked_at, is_indexed = index_arguments(index, walk, x)
    runnable(_norm_modulate_backward_kernel, x)[(walk.programs, batch)](
        grad,
        x,
        rstd,
        scale,
        scale_table.contiguous(),
        index_ptr,
        dx,
        partial,
        written,
        tokens,
        walk.tokens,
        k,
        grad.stride(0),
        grad.stride(1),
        x.stride(0),
        x.stride(1),
        scale.stride(0),
        scale.stride(1),
        width,
        triton.next_power_of_2(width),
        looked_at,
        is_indexed,
        launch.stages,
        num_warps=launch.warps,
    )
    return dx, *sum_partials(partial, written if is_indexed else None, scale.dtype, scale_table.dtype)


def _fake_forward(x, scale, shift, scale_table, shift_table, index, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@operator("rms_norm_modulate", _fake_forward)
def _forward_op(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale_table: Tensor,
    shift_table: Tensor,
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, scale, shift, scale_table, shift_table, index, eps)


def _fake_backward(grad, x, rstd, scale, scale_table, index):
    batch, k, width = scale.shape
    return x.new_empty(x.shape), scale.new_empty((batch, k, 2, width)), scale_table.new_empty((2, width))


@operator("rms_norm_modulate_backward", _fake_backward)
def _backward_op(
    grad: Tensor, x: Tensor, rstd: Tensor, scale: Tensor, scale_table: Tensor, index: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_backward(grad, x, rstd, scale, scale_table, index)


def _setup_context(ctx, inputs, output) -> None:
    x, scale, shift, scale_table, shift_table, index, _ = inputs
    ctx.save_for_backward(x, output[1], scale, scale_table, index)
    ctx.dtypes = (scale.dtype, shift.dtype, scale_table.dtype, shift_table.dtype)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, d_rows, d_tables = _backward_op(grad, *ctx.saved_tensors)
    gradients = (*d_rows.unbind(2), *d_tables.unbind(0))
    return dx, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def rms_norm_modulate(x: Tensor, scale: Row, shift: Row, index: Tensor | None, eps: float) -> Tensor:
    """RMS norm without weight, then `* (1 + scale) + shift`.

    Args:
        x: tokens [B, S, D], any strides.
        scale, shift: rows of the K distinct timesteps of each sample.
        index: which of them each token has [B, S]; None takes the first.
        eps: added to the mean square.

    Returns:
        [B, S, D] in the dtype of `x`. Widths and row counts beyond the kernel's take the plain torch form.
    """
    if not is_supported(x, (scale.embedding, shift.embedding)):
        return reference(x, scale, shift, index, eps)
    scale_rows, scale_table = split_row(scale, x, index)
    shift_rows, shift_table = split_row(shift, x, index)
    if scale_rows.shape[1] == 1:
        index = None
    return _forward_op(x, scale_rows, shift_rows, scale_table, shift_table, index, eps)[0]
