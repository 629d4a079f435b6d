"""RMS norm without weight, then AdaLN modulation: what every sub-layer of a block reads.

    h = x / sqrt(mean(x ** 2) + eps) * (1 + scale[i]) + shift[i]        i = index of the token's timestep
    scale, shift = table [D] + embedding [B, K, D]

Shapes: x, h [B, S, D]; index [B, S]. Statistics and modulation in float32, one rounding at the end.

Bytes: forward reads x and writes h, 2 S D elements; backward reads dh and x and writes dx, 3 S D, and adds dscale and
dshift of each (B, K) on the way (launches.py).

Wins: backward, because torch.compile needs a second pass over dh and x for those sums; forward with two timesteps,
because torch.compile selects the modulation of each token instead of each segment. Loses: nowhere by more than 1 %;
forward with one timestep is level with torch.compile at 32,256 tokens.

us forward / backward as an operation, D = 4096, bfloat16, one sample; H100 80GB HBM3, torch 2.11.0, triton 3.6.0
(docs/benchmarks/kernels.jsonl, run 6; a copy reaches 3.00 TB/s):

    tokens    case                       kernel           torch.compile    share of copy
     4,032    norm_modulate              25.2 / 49.2      27.8 / 82.8      0.87 / 0.67
     4,032    norm_modulate, 2 timesteps 25.8 / 52.4      31.7 / 100.9     0.85 / 0.63
    16,128    norm_modulate              94.1 / 157.7     96.4 / 229.2     0.94 / 0.84
    16,128    norm_modulate, 2 timesteps 92.5 / 161.7     107.5 / 379.5    0.95 / 0.82
    32,256    norm_modulate              188.3 / 306.3    187.7 / 350.9    0.93 / 0.86
    32,256    norm_modulate, 2 timesteps 187.4 / 313.2    210.6 / 544.3    0.94 / 0.84
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import AdaLN, modulate, rms_norm, upcast
from ltx_titan_kernels.launches import (
    Launch,
    embedding_and_table,
    index_arguments,
    is_supported,
    load_modulation,
    load_timesteps,
    load_token,
    operator,
    requires_grad,
    segment_at,
    store_partial,
    sum_modulation_partials,
    tile_of_program,
    tile_tokens,
    with_equal_strides,
    with_unit_stride,
    wrap_if_traced,
)

FORWARD = Launch(warps=4, programs=32, stages=3)
BACKWARD = Launch(warps=8, programs=1, stages=3)
"""Launches at width 4096, the fastest measured on an H100 (docs/benchmarks)."""


def reference(x: Tensor, scale: AdaLN, shift: AdaLN, index: Tensor | None, eps: float) -> Tensor:
    """`rms_norm_modulate` in plain PyTorch: in float32, or in float64 for float64 inputs."""
    return modulate(rms_norm(upcast(x), eps), scale, shift, index).to(x.dtype)


@triton.jit
def _norm_modulate_forward_kernel(
    x_ptr, scale_ptr, shift_ptr, scale_table_ptr, shift_table_ptr, index_ptr, out_ptr, rstd_ptr,
    tokens, tokens_per_program, x_stride_b, x_stride_s, embedding_stride_b, embedding_stride_k, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, INDEXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # int64: offsets within a batch of long clips can exceed 2^31 elements.
    batch = tl.program_id(1).to(tl.int64)
    # The whole width in one block, padded to a power of two. Loads fill the padding with 0, which changes no sum.
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    x_ptr += batch * x_stride_b
    out_ptr += batch * tokens * D
    if INDEXED:
        token_ids, timesteps = load_timesteps(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    while first < last:
        if INDEXED:
            k, end = segment_at(token_ids, timesteps, first, last)
        offset = batch * embedding_stride_b + k * embedding_stride_k
        scale = 1 + load_modulation(scale_ptr, scale_table_ptr, offset, cols, inside)
        shift = load_modulation(shift_ptr, shift_table_ptr, offset, cols, inside)
        # No branches inside: the compiler loads the coming tokens of the segment ahead, STAGES deep.
        for token in tl.range(first, end, num_stages=STAGES):
            x = load_token(x_ptr + token * x_stride_s, cols, inside)
            rstd = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            h = (x * rstd * scale + shift).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + token * D + cols, h, mask=inside)
            # Saved for backward: one number per token instead of a second reduction over its channels.
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
    """Runs the forward kernel: h [B, S, D] and 1 / rms [B, S] float32. `launch` overrides the default, for sweeps."""
    batch, tokens, width = x.shape
    launch = launch or FORWARD.scaled_to(width)
    x = with_unit_stride(x)
    scale, shift = with_equal_strides([scale, shift])
    out = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device)
    tiles = tile_tokens(x, launch.programs)
    wrap_if_traced(_norm_modulate_forward_kernel, x)[(tiles.programs, batch)](
        x_ptr=x,
        scale_ptr=scale,
        shift_ptr=shift,
        scale_table_ptr=scale_table.contiguous(),
        shift_table_ptr=shift_table.contiguous(),
        out_ptr=out,
        rstd_ptr=rstd,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        x_stride_b=x.stride(0),
        x_stride_s=x.stride(1),
        embedding_stride_b=scale.stride(0),
        embedding_stride_k=scale.stride(1),
        eps=eps,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        STAGES=launch.stages,
        num_warps=launch.warps,
        **index_arguments(index, tiles, placeholder=x),
    )
    return out, rstd


@triton.jit
def _norm_modulate_backward_kernel(
    grad_ptr, x_ptr, rstd_ptr, scale_ptr, scale_table_ptr, index_ptr, dx_ptr, partial_ptr, valid_ptr,
    tokens, tokens_per_program, K, grad_stride_b, grad_stride_s, x_stride_b, x_stride_s,
    embedding_stride_b, embedding_stride_k,
    D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_TOKENS: tl.constexpr, INDEXED: tl.constexpr, SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    # Partials [B, programs, K, 2, D]: dscale, dshift.
    program = batch * tl.num_programs(0) + tl.program_id(0)
    partial_ptr += program * K * 2 * D
    grad_ptr += batch * grad_stride_b
    x_ptr += batch * x_stride_b
    dx_ptr += batch * tokens * D
    if INDEXED:
        token_ids, timesteps = load_timesteps(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    valid = 0
    while first < last:
        if INDEXED:
            k, end = segment_at(token_ids, timesteps, first, last)
        offset = batch * embedding_stride_b + k * embedding_stride_k
        scale = 1 + load_modulation(scale_ptr, scale_table_ptr, offset, cols, inside)
        d_scale = tl.zeros([BLOCK], tl.float32)
        d_shift = tl.zeros([BLOCK], tl.float32)
        for token in tl.range(first, end, num_stages=STAGES):
            grad = load_token(grad_ptr + token * grad_stride_s, cols, inside)
            x = load_token(x_ptr + token * x_stride_s, cols, inside)
            rstd = tl.load(rstd_ptr + batch * tokens + token)
            normed = x * rstd
            d_normed = grad * scale
            # Gradient of x * rstd: the part of d_normed along x cancels, because scaling x does not change h.
            mean = tl.sum(d_normed * normed, 0) / D
            dx = (d_normed - normed * mean) * rstd
            tl.store(dx_ptr + token * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            if SUMS:
                d_scale += grad * normed
                d_shift += grad
        if SUMS:
            # A timestep can come in several segments of a tile: the first stores its partial, later ones add to it.
            is_valid = ((valid >> k) & 1) != 0
            store_partial(partial_ptr + k * 2 * D, d_scale, cols, inside, is_valid)
            store_partial(partial_ptr + k * 2 * D + D, d_shift, cols, inside, is_valid)
            valid = valid | (1 << k)
        first = end
    # With one timestep every slot holds a partial, and nobody reads the bits.
    if INDEXED and SUMS:
        tl.store(valid_ptr + program, valid)


def launch_backward(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale_table: Tensor,
    index: Tensor | None,
    launch: Launch | None = None,
    modulation_grads: bool = True,
) -> list[Tensor]:
    """Runs the backward kernel: dx [B, S, D], then (dscale, dshift) of embeddings [B, K, 2, D] and of tables [2, D].

    Without `modulation_grads` only dx.
    """
    batch, tokens, width = x.shape
    k = scale.shape[1]
    launch = launch or BACKWARD.scaled_to(width)
    grad, x = with_unit_stride(grad), with_unit_stride(x)
    (scale,) = with_equal_strides([scale])
    tiles = tile_tokens(x, launch.programs)
    dx = torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device)
    # Pointers that are never written without `modulation_grads`; any output serves.
    partial = valid = dx
    if modulation_grads:
        # Not cleared: `valid` records which slots hold a partial.
        partial = torch.empty((batch, tiles.programs, k, 2, width), dtype=torch.float32, device=x.device)
        valid = torch.empty((batch, tiles.programs), dtype=torch.int32, device=x.device)
    wrap_if_traced(_norm_modulate_backward_kernel, x)[(tiles.programs, batch)](
        grad_ptr=grad,
        x_ptr=x,
        rstd_ptr=rstd,
        scale_ptr=scale,
        scale_table_ptr=scale_table.contiguous(),
        dx_ptr=dx,
        partial_ptr=partial,
        valid_ptr=valid,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        K=k,
        grad_stride_b=grad.stride(0),
        grad_stride_s=grad.stride(1),
        x_stride_b=x.stride(0),
        x_stride_s=x.stride(1),
        embedding_stride_b=scale.stride(0),
        embedding_stride_k=scale.stride(1),
        D=width,
        BLOCK=triton.next_power_of_2(width),
        SUMS=modulation_grads,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **index_arguments(index, tiles, placeholder=x),
    )
    if not modulation_grads:
        return [dx]
    valid_or_all = valid if index is not None else None
    return [dx, *sum_modulation_partials(partial, valid_or_all, scale.dtype, scale_table.dtype)]


def _fake_forward(x, scale, shift, scale_table, shift_table, index, eps, modulation_grads):
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
    modulation_grads: bool,
) -> tuple[Tensor, Tensor]:
    return launch_forward(x, scale, shift, scale_table, shift_table, index, eps)


def _fake_backward(grad, x, rstd, scale, scale_table, index, modulation_grads):
    batch, k, width = scale.shape
    dx = x.new_empty(x.shape)
    if not modulation_grads:
        return [dx]
    return [dx, scale.new_empty((batch, k, 2, width)), scale_table.new_empty((2, width))]


@operator("rms_norm_modulate_backward", _fake_backward)
def _backward_op(
    grad: Tensor,
    x: Tensor,
    rstd: Tensor,
    scale: Tensor,
    scale_table: Tensor,
    index: Tensor | None,
    modulation_grads: bool,
) -> list[Tensor]:
    return launch_backward(grad, x, rstd, scale, scale_table, index, modulation_grads=modulation_grads)


def _setup_context(ctx, inputs, output) -> None:
    # The gradients do not depend on the shift.
    x, scale, shift, scale_table, shift_table, index, _, ctx.modulation_grads = inputs
    ctx.save_for_backward(x, output[1], scale, scale_table, index)
    ctx.dtypes = (scale.dtype, shift.dtype, scale_table.dtype, shift_table.dtype)
    # 1 / rms is an output only to be saved; its gradient is part of that of x.
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, *others = _backward_op(grad, *ctx.saved_tensors, ctx.modulation_grads)
    if not others:
        return dx, *[None] * 7
    embedding_grads, table_grads = others
    # In the order of the inputs: scale and shift embedding, then their tables.
    gradients = (*embedding_grads.unbind(2), *table_grads.unbind(0))
    return dx, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)), *[None] * 3


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def rms_norm_modulate(x: Tensor, scale: AdaLN, shift: AdaLN, index: Tensor | None, eps: float) -> Tensor:
    """RMS norm without weight, then AdaLN modulation: `norm(x) * (1 + scale) + shift`.

    Args:
        x: tokens [B, S, D], any strides.
        scale, shift: embedding [B, K, D] and table [D] of each, for the K distinct timesteps of a sample.
        index: timestep of each token [B, S]; None uses the first for all.
        eps: added to the mean square.

    Returns:
        [B, S, D] in the dtype of `x`. Dtypes, widths and K that the kernel does not support use `reference`.
    """
    if not is_supported(x, (scale, shift)):
        return reference(x, scale, shift, index, eps)
    scale_embedding, scale_table = embedding_and_table(scale, x, index)
    shift_embedding, shift_table = embedding_and_table(shift, x, index)
    # With one timestep per sample the kernel without an index is faster: one segment per tile, known at compile time.
    if scale_embedding.shape[1] == 1:
        index = None
    grads = requires_grad([scale, shift])
    return _forward_op(x, scale_embedding, shift_embedding, scale_table, shift_table, index, eps, grads)[0]
