"""Gated residual, then the norm + AdaLN modulation that the next sub-layers read, in one pass over the tokens.

    r   = x + gate[i] * y                                               i = index of the token's timestep
    h_j = r / sqrt(mean(r ** 2) + eps) * (1 + scale_j[i]) + shift_j[i]  j = 0 .. n - 1,  n = 0, 1 or 2
    gate, scale, shift = table [D] + embedding [B, K, D]

Shapes: x, y, r, h [B, S, D]; index [B, S]. n is 2 before the cross-modal attention, which reads a stream once as
queries and once as keys, and 0 at the end of a block. The gate may have K = 1 when scale and shift have more. r is
rounded before the norm reads it, as if the two were separate operations.

Bytes: forward reads x, y and writes r and n times h, (3 + n) S D elements; backward reads dr, n times dh, r, y and
writes dx, dy, (5 + n) S D (3 S D for n = 0), and adds all modulation gradients on the way (launches.py).

Wins: backward, because torch.compile needs separate passes for those sums. Loses: forward, by 1 to 4 % from 16,128
tokens on. Both directions together win at every shape measured.

us forward / backward as an operation, D = 4096, bfloat16, one sample; H100 80GB HBM3, torch 2.11.0, triton 3.6.0
(docs/benchmarks/kernels.jsonl, run 6; a copy reaches 3.00 TB/s):

    tokens    case                       kernel           torch.compile    share of copy
     4,032    residual                   36.0 / 46.3      36.4 / 63.3      0.92 / 0.71
     4,032    residual_norm              50.7 / 88.1      51.7 / 165.0     0.87 / 0.75
     4,032    residual_norm, 2 norms     63.3 / 101.2     65.6 / 190.7     0.87 / 0.76
    32,256    residual                   271.7 / 291.6    262.4 / 452.3    0.97 / 0.91
    32,256    residual_norm              376.5 / 572.7    365.9 / 1009.1   0.93 / 0.92
    32,256    residual_norm, 2 norms     477.5 / 659.1    461.8 / 1152.6   0.92 / 0.93
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels import formulas
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

FORWARD = (Launch(8, 32, 2), Launch(8, 32, 1), Launch(8, 32, 1))
BACKWARD = (Launch(8, 1, 3), Launch(8, 1, 3), Launch(8, 1, 3))
"""Launches at width 4096 for 0, 1 and 2 norms, the fastest measured on an H100 (docs/benchmarks)."""


def reference(
    x: Tensor,
    y: Tensor,
    gate: AdaLN | None,
    modulations: Sequence[tuple[AdaLN, AdaLN] | None],
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """`gated_residual_norm` in plain PyTorch: in float32, or in float64 for float64 inputs."""
    r = formulas.gated_residual(x, y, gate, index)
    normed = rms_norm(upcast(r), eps)
    return (r, *((normed if m is None else modulate(normed, *m, index)).to(r.dtype) for m in modulations))


@triton.jit
def _residual_norm_forward_kernel(
    x_ptr, y_ptr, gate_ptr, gate_table_ptr,
    scale0_ptr, shift0_ptr, scale0_table_ptr, shift0_table_ptr,
    scale1_ptr, shift1_ptr, scale1_table_ptr, shift1_table_ptr,
    index_ptr, r_ptr, h0_ptr, h1_ptr, rstd_ptr,
    tokens, tokens_per_program, x_stride_b, x_stride_s, y_stride_b, y_stride_s,
    gate_stride_b, gate_stride_k, embedding_stride_b, embedding_stride_k, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, INDEXED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # int64: offsets within a batch of long clips can exceed 2^31 elements.
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    x_ptr += batch * x_stride_b
    y_ptr += batch * y_stride_b
    r_ptr += batch * tokens * D
    h0_ptr += batch * tokens * D
    h1_ptr += batch * tokens * D
    if INDEXED:
        token_ids, timesteps = load_timesteps(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    while first < last:
        if INDEXED:
            k, end = segment_at(token_ids, timesteps, first, last)
        gate = load_modulation(gate_ptr, gate_table_ptr, batch * gate_stride_b + k * gate_stride_k, cols, inside)
        offset = batch * embedding_stride_b + k * embedding_stride_k
        # NORMS is a constant of the compiled kernel: branches on it cost nothing, and absent norms take no registers.
        if NORMS > 0:
            scale0 = 1 + load_modulation(scale0_ptr, scale0_table_ptr, offset, cols, inside)
            shift0 = load_modulation(shift0_ptr, shift0_table_ptr, offset, cols, inside)
        if NORMS > 1:
            scale1 = 1 + load_modulation(scale1_ptr, scale1_table_ptr, offset, cols, inside)
            shift1 = load_modulation(shift1_ptr, shift1_table_ptr, offset, cols, inside)
        for token in tl.range(first, end, num_stages=STAGES):
            x = load_token(x_ptr + token * x_stride_s, cols, inside)
            y = load_token(y_ptr + token * y_stride_s, cols, inside)
            # Rounded first: backward recomputes `normed` from the r in memory, and must find the same numbers.
            rounded = (x + gate * y).to(r_ptr.dtype.element_ty)
            tl.store(r_ptr + token * D + cols, rounded, mask=inside)
            if NORMS > 0:
                r = rounded.to(tl.float32)
                rstd = tl.rsqrt(tl.sum(r * r, 0) / D + eps)
                normed = r * rstd
                tl.store(rstd_ptr + batch * tokens + token, rstd)
                h0 = (normed * scale0 + shift0).to(h0_ptr.dtype.element_ty)
                tl.store(h0_ptr + token * D + cols, h0, mask=inside)
                if NORMS > 1:
                    h1 = (normed * scale1 + shift1).to(h1_ptr.dtype.element_ty)
                    tl.store(h1_ptr + token * D + cols, h1, mask=inside)
        first = end


def launch_forward(
    x: Tensor,
    y: Tensor,
    embeddings: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
    eps: float,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the forward kernel. `launch` overrides the default, for sweeps.

    Args:
        x, y: [B, S, D].
        embeddings: gate [B, 1 | K, D], then scale and shift [B, K, D] of each norm.
        tables: [D] of each of the embeddings.
        index: [B, S], or None if K is 1.
        eps: of the norm.
        launch: see above.

    Returns:
        r, each h and, if there is a norm, 1 / rms(r) [B, S] float32.
    """
    batch, tokens, width = x.shape
    norms = len(embeddings) // 2
    launch = launch or FORWARD[norms].scaled_to(width)
    x, y = with_unit_stride(x), with_unit_stride(y)
    gate = with_unit_stride(embeddings[0])
    modulation = with_equal_strides(embeddings[1:]) if norms else []
    gate_table, *modulation_tables = [table.contiguous() for table in tables]
    # Pointers of absent norms are never read; any tensor serves.
    scale0, shift0, scale1, shift1 = [*modulation, *[gate] * (4 - 2 * norms)]
    scale0_table, shift0_table, scale1_table, shift1_table = [*modulation_tables, *[gate] * (4 - 2 * norms)]
    outs = [torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device) for _ in range(1 + norms)]
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device) if norms else None
    tiles = tile_tokens(x, launch.programs)
    wrap_if_traced(_residual_norm_forward_kernel, x)[(tiles.programs, batch)](
        x_ptr=x,
        y_ptr=y,
        gate_ptr=gate,
        gate_table_ptr=gate_table,
        scale0_ptr=scale0,
        shift0_ptr=shift0,
        scale0_table_ptr=scale0_table,
        shift0_table_ptr=shift0_table,
        scale1_ptr=scale1,
        shift1_ptr=shift1,
        scale1_table_ptr=scale1_table,
        shift1_table_ptr=shift1_table,
        r_ptr=outs[0],
        h0_ptr=outs[1] if norms > 0 else outs[0],
        h1_ptr=outs[2] if norms > 1 else outs[0],
        rstd_ptr=outs[0] if rstd is None else rstd,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        x_stride_b=x.stride(0),
        x_stride_s=x.stride(1),
        y_stride_b=y.stride(0),
        y_stride_s=y.stride(1),
        gate_stride_b=gate.stride(0),
        gate_stride_k=_timestep_stride(gate),
        embedding_stride_b=scale0.stride(0) if norms else 0,
        embedding_stride_k=scale0.stride(1) if norms else 0,
        eps=eps,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        NORMS=norms,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **index_arguments(index, tiles, placeholder=x),
    )
    return outs if rstd is None else [*outs, rstd]


def _timestep_stride(gate: Tensor) -> int:
    """Stride from timestep to timestep: 0 for a gate with K = 1, which applies to every token."""
    return gate.stride(1) if gate.shape[1] > 1 else 0


@triton.jit
def _residual_norm_backward_kernel(
    dr_ptr, dh0_ptr, dh1_ptr, r_ptr, y_ptr, rstd_ptr, gate_ptr, gate_table_ptr,
    scale0_ptr, scale0_table_ptr, scale1_ptr, scale1_table_ptr, index_ptr, dx_ptr, dy_ptr, partial_ptr, valid_ptr,
    tokens, tokens_per_program, K,
    dr_stride_b, dr_stride_s, dh0_stride_b, dh0_stride_s, dh1_stride_b, dh1_stride_s, y_stride_b, y_stride_s,
    gate_stride_b, gate_stride_k, embedding_stride_b, embedding_stride_k,
    D: tl.constexpr, BLOCK: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, INDEXED: tl.constexpr, SUMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < D
    first, last = tile_of_program(tokens, tokens_per_program)
    # Partials [B, programs, K, 1 + 2 n, D]: dgate, then dscale and dshift of each norm.
    program = batch * tl.num_programs(0) + tl.program_id(0)
    partial_ptr += program * K * (1 + 2 * NORMS) * D
    dr_ptr += batch * dr_stride_b
    dh0_ptr += batch * dh0_stride_b
    dh1_ptr += batch * dh1_stride_b
    y_ptr += batch * y_stride_b
    r_ptr += batch * tokens * D
    dx_ptr += batch * tokens * D
    dy_ptr += batch * tokens * D
    if INDEXED:
        token_ids, timesteps = load_timesteps(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    valid = 0
    while first < last:
        if INDEXED:
            k, end = segment_at(token_ids, timesteps, first, last)
        gate = load_modulation(gate_ptr, gate_table_ptr, batch * gate_stride_b + k * gate_stride_k, cols, inside)
        offset = batch * embedding_stride_b + k * embedding_stride_k
        d_gate = tl.zeros([BLOCK], tl.float32)
        if NORMS > 0:
            scale0 = 1 + load_modulation(scale0_ptr, scale0_table_ptr, offset, cols, inside)
            d_scale0 = tl.zeros([BLOCK], tl.float32)
            d_shift0 = tl.zeros([BLOCK], tl.float32)
        if NORMS > 1:
            scale1 = 1 + load_modulation(scale1_ptr, scale1_table_ptr, offset, cols, inside)
            d_scale1 = tl.zeros([BLOCK], tl.float32)
            d_shift1 = tl.zeros([BLOCK], tl.float32)
        for token in tl.range(first, end, num_stages=STAGES):
            # dx, which is also the gradient of r: what arrives directly and what arrives through the norms.
            total = load_token(dr_ptr + token * dr_stride_s, cols, inside)
            if NORMS > 0:
                dh0 = load_token(dh0_ptr + token * dh0_stride_s, cols, inside)
                r = load_token(r_ptr + token * D, cols, inside)
                rstd = tl.load(rstd_ptr + batch * tokens + token)
                normed = r * rstd
                d_normed = dh0 * scale0
                if SUMS:
                    d_scale0 += dh0 * normed
                    d_shift0 += dh0
                if NORMS > 1:
                    dh1 = load_token(dh1_ptr + token * dh1_stride_s, cols, inside)
                    d_normed += dh1 * scale1
                    if SUMS:
                        d_scale1 += dh1 * normed
                        d_shift1 += dh1
                # Both norms share one reduction: they normalize the same r, so their gradients add up before it.
                mean = tl.sum(d_normed * normed, 0) / D
                total += (d_normed - normed * mean) * rstd
                tl.store(dx_ptr + token * D + cols, total.to(dx_ptr.dtype.element_ty), mask=inside)
            # The float32 sum, not the rounded dx: one rounding per output.
            tl.store(dy_ptr + token * D + cols, (total * gate).to(dy_ptr.dtype.element_ty), mask=inside)
            if SUMS:
                d_gate += total * load_token(y_ptr + token * y_stride_s, cols, inside)
        if SUMS:
            slot_ptr = partial_ptr + k * (1 + 2 * NORMS) * D
            # A timestep can come in several segments of a tile: the first stores its partial, later ones add to it.
            is_valid = ((valid >> k) & 1) != 0
            store_partial(slot_ptr, d_gate, cols, inside, is_valid)
            if NORMS > 0:
                store_partial(slot_ptr + D, d_scale0, cols, inside, is_valid)
                store_partial(slot_ptr + 2 * D, d_shift0, cols, inside, is_valid)
            if NORMS > 1:
                store_partial(slot_ptr + 3 * D, d_scale1, cols, inside, is_valid)
                store_partial(slot_ptr + 4 * D, d_shift1, cols, inside, is_valid)
            valid = valid | (1 << k)
        first = end
    # With one timestep every slot holds a partial, and nobody reads the bits.
    if INDEXED and SUMS:
        tl.store(valid_ptr + program, valid)


def launch_backward(
    grads: list[Tensor],
    saved: list[Tensor],
    y: Tensor | None,
    embeddings: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the backward kernel.

    Args:
        grads: dr, then each dh [B, S, D].
        saved: r and 1 / rms(r); empty without a norm.
        y: [B, S, D]; None computes no gradients of modulation.
        embeddings: gate [B, 1 | K, D], then the scale [B, K, D] of each norm.
        tables: [D] of each of the embeddings.
        index: [B, S], or None if K is 1.
        launch: overrides the default, for sweeps.

    Returns:
        dy; if there is a norm, dx (without one it equals dr); and the gradients of embeddings [B, K, 1 + 2 n, D] and of
        tables [1 + 2 n, D] in the order gate, scale, shift, ...
    """
    batch, tokens, width = grads[0].shape
    norms = len(embeddings) - 1
    launch = launch or BACKWARD[norms].scaled_to(width)
    grads = [with_unit_stride(grad) for grad in grads]
    gate = with_unit_stride(embeddings[0])
    scales = with_equal_strides(embeddings[1:]) if norms else []
    k = scales[0].shape[1] if norms else gate.shape[1]
    gate_table, *scale_tables = [table.contiguous() for table in tables]
    # Pointers of absent norms are never read; any tensor serves.
    dr, dh0, dh1 = [*grads, *[grads[0]] * (2 - norms)]
    scale0, scale1 = [*scales, *[gate] * (2 - norms)]
    scale0_table, scale1_table = [*scale_tables, *[gate] * (2 - norms)]
    r, rstd = saved if norms else (dr, dr)
    tiles = tile_tokens(dr, launch.programs)
    dy = torch.empty((batch, tokens, width), dtype=dr.dtype, device=dr.device)
    dx = torch.empty_like(dy) if norms else None
    # Pointers that are never read and written without gradients of modulation; any input and any output serve.
    partial = valid = dy
    if y is not None:
        # Not cleared: `valid` records which slots hold a partial.
        partial = torch.empty((batch, tiles.programs, k, 1 + 2 * norms, width), dtype=torch.float32, device=dr.device)
        valid = torch.empty((batch, tiles.programs), dtype=torch.int32, device=dr.device)
    read = dr if y is None else with_unit_stride(y)
    wrap_if_traced(_residual_norm_backward_kernel, dr)[(tiles.programs, batch)](
        dr_ptr=dr,
        dh0_ptr=dh0,
        dh1_ptr=dh1,
        r_ptr=r,
        y_ptr=read,
        rstd_ptr=rstd,
        gate_ptr=gate,
        gate_table_ptr=gate_table,
        scale0_ptr=scale0,
        scale0_table_ptr=scale0_table,
        scale1_ptr=scale1,
        scale1_table_ptr=scale1_table,
        dx_ptr=dy if dx is None else dx,
        dy_ptr=dy,
        partial_ptr=partial,
        valid_ptr=valid,
        tokens=tokens,
        tokens_per_program=tiles.tokens,
        K=k,
        dr_stride_b=dr.stride(0),
        dr_stride_s=dr.stride(1),
        dh0_stride_b=dh0.stride(0),
        dh0_stride_s=dh0.stride(1),
        dh1_stride_b=dh1.stride(0),
        dh1_stride_s=dh1.stride(1),
        y_stride_b=read.stride(0),
        y_stride_s=read.stride(1),
        gate_stride_b=gate.stride(0),
        gate_stride_k=_timestep_stride(gate),
        embedding_stride_b=scale0.stride(0) if norms else 0,
        embedding_stride_k=scale0.stride(1) if norms else 0,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        NORMS=norms,
        SUMS=y is not None,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **index_arguments(index, tiles, placeholder=dr),
    )
    gradients = [dy] if dx is None else [dy, dx]
    if y is None:
        return gradients
    valid_or_all = valid if index is not None else None
    return [*gradients, *sum_modulation_partials(partial, valid_or_all, gate.dtype, tables[0].dtype)]


def _fake_forward(x, y, embeddings, tables, index, eps, modulation_grads):
    norms = len(embeddings) // 2
    outs = [x.new_empty(x.shape) for _ in range(1 + norms)]
    return [*outs, x.new_empty(x.shape[:2], dtype=torch.float32)] if norms else outs


@operator("gated_residual_norm", _fake_forward)
def _forward_op(
    x: Tensor,
    y: Tensor,
    embeddings: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
    eps: float,
    modulation_grads: bool,
) -> list[Tensor]:
    return launch_forward(x, y, embeddings, tables, index, eps)


def _fake_backward(grads, saved, y, embeddings, tables, index):
    norms = len(embeddings) - 1
    k = embeddings[-1].shape[1]
    batch, _, width = grads[0].shape
    gradients = [grads[0].new_empty(grads[0].shape) for _ in range(2 if norms else 1)]
    if y is None:
        return gradients
    embedding_grads = embeddings[0].new_empty((batch, k, 1 + 2 * norms, width))
    return [*gradients, embedding_grads, tables[0].new_empty((1 + 2 * norms, width))]


@operator("gated_residual_norm_backward", _fake_backward)
def _backward_op(
    grads: list[Tensor],
    saved: list[Tensor],
    y: Tensor | None,
    embeddings: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
) -> list[Tensor]:
    return launch_backward(grads, saved, y, embeddings, tables, index)


def _setup_context(ctx, inputs, output) -> None:
    _, y, embeddings, tables, index, _, modulation_grads = inputs
    norms = len(embeddings) // 2
    # r instead of x: the gradients do not need x, and the block keeps r anyway, as its new tokens.
    saved = (output[0], output[-1]) if norms else ()
    if not modulation_grads:
        y = None  # that of the gate alone depends on it
    # The gradients do not depend on the shifts.
    ctx.save_for_backward(index, y, *saved, *embeddings[:1], *embeddings[1::2], *tables[:1], *tables[1::2])
    ctx.norms = norms
    ctx.dtypes = [(embedding.dtype, table.dtype) for embedding, table in zip(embeddings, tables, strict=True)]
    ctx.single_gate = embeddings[0].shape[1] == 1
    if norms:
        ctx.mark_non_differentiable(output[-1])


def _differentiate(ctx, grads: list[Tensor]) -> tuple:
    norms = ctx.norms
    index, y, *rest = ctx.saved_tensors
    saved = []
    if norms:
        saved, rest = rest[:2], rest[2:]
    embeddings, tables = rest[: 1 + norms], rest[1 + norms :]
    dy, *others = _backward_op(grads[: 1 + norms], saved, y, embeddings, tables, index)
    # Without a norm the gradient of x is dr itself.
    dx = others.pop(0) if norms else grads[0]
    if not others:
        nothing = [None] * len(ctx.dtypes)
        return dx, dy, nothing, nothing, None, None, None
    embedding_grads, table_grads = others
    table_grads = [g.to(dtype) for g, (_, dtype) in zip(table_grads.unbind(0), ctx.dtypes, strict=True)]
    embedding_grads = list(embedding_grads.unbind(2))
    if ctx.single_gate:
        # The kernel summed by the tokens' timesteps, of which the gate has only one.
        embedding_grads[0] = embedding_grads[0].sum(1, keepdim=True)
    embedding_grads = [g.to(dtype) for g, (dtype, _) in zip(embedding_grads, ctx.dtypes, strict=True)]
    return dx, dy, embedding_grads, table_grads, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: AdaLN | None,
    modulations: Sequence[tuple[AdaLN, AdaLN] | None],
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The new tokens `r = x + gate * y`, then one normed and modulated [B, S, D] for each of at most two modulations.

    Args:
        x, y: tokens and what a sub-layer adds to them [B, S, D], any strides, the same dtype.
        gate: embedding [B, 1 | K, D] and table [D] of the factor on `y`; None is 1.
        modulations: scale and shift of each norm, K timesteps each; None is the norm alone.
        index: timestep of each token [B, S]; None uses the first for all.
        eps: added to the mean square.

    Returns:
        Tensors [B, S, D] in the dtype of `x`. Dtypes, widths and K that the kernel does not support, and more
        modulations, use `reference`.
    """
    parameters = [] if gate is None else [gate]
    for pair in modulations:
        if pair is not None:
            parameters.extend(pair)
    if len(modulations) > 2 or x.dtype != y.dtype or not is_supported(x, parameters):
        return reference(x, y, gate, modulations, index, eps)
    timesteps = [embedding.shape[1] for embedding, _ in parameters]
    if all(k == 1 for k in timesteps):
        index = None
    k = 1 if index is None else max(timesteps)
    # Ones for an absent gate and zeros for an absent modulation, read once per program, instead of more kernels.
    flat: list[AdaLN] = [(x.new_ones(1, 1, x.shape[-1]), None) if gate is None else gate]
    for pair in modulations:
        if pair is None:
            zero = (x.new_zeros(1, 1, x.shape[-1]), None)
            pair = (zero, zero)
        flat.extend(pair)
    pairs = [embedding_and_table(parameter, x, index) for parameter in flat]
    # Norms share two strides, so their embeddings are expanded to the same K; the gate has its own.
    embeddings = [pairs[0][0], *(embedding.expand(-1, k, -1) for embedding, _ in pairs[1:])]
    outputs = _forward_op(x, y, embeddings, [table for _, table in pairs], index, eps, requires_grad(parameters))
    return tuple(outputs[: 1 + len(modulations)])


def gated_residual(x: Tensor, y: Tensor, gate: AdaLN | None, index: Tensor | None) -> Tensor:
    """`x + gate * y`; see `gated_residual_norm`. Without a gate there is nothing to fuse."""
    if gate is None:
        return x + y
    if torch.is_grad_enabled() and not requires_grad([gate]):
        # As with LoRA. The kernel reads y again for the gate's gradient, so that autograd would save y for nothing;
        # without that sum torch.compile is as fast.
        return formulas.gated_residual(x, y, gate, index)
    return gated_residual_norm(x, y, gate, (), index, 0.0)[0]
