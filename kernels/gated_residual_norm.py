"""Gated residual, and the norm + modulation that the next sub-layers read, in one pass over the tokens.

    r   = x + gate[i] * y                                               i = index of the token's timestep
    h_j = r / sqrt(mean(r ** 2) + eps) * (1 + scale_j[i]) + shift_j[i]  j = 0 .. n - 1,  n = 0, 1 or 2
    gate, scale, shift = table [D] + embedding [B, K, D]

x, y, r, h [B, S, D]; index [B, S]. n is 2 before the attention between the streams, which reads a stream once as
queries and once as keys, and 0 at the end of a block, where only the backward pass is worth a kernel. The gate may have
a single row where scale and shift have K. r is rounded before the norm reads it, as if the two were separate.

Forward: reads x, y, writes r and n times h. Backward: reads dr, n times dh, r, y, writes dx, dy; all row gradients are
summed on the way (modulation_rows.py). torch.compile needs separate passes for those sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.ops import Modulation, Row, split_row
from ltx_titan_kernels.launches import (
    Launch,
    divide_tokens,
    filled,
    index_arguments,
    is_supported,
    operator,
    runnable,
    with_equal_strides,
    with_unit_stride,
)
from ltx_titan_kernels.modulation_rows import load_indices, load_row, run_at, store_partial, sum_partials

reference = ops.gated_residual_norm
"""The same in plain torch operations; given float32 or float64 it is what the kernel is held against."""


FORWARD = (Launch(8, 32, 2), Launch(8, 32, 1), Launch(8, 32, 1))
BACKWARD = (Launch(8, 1, 3), Launch(8, 1, 3), Launch(8, 1, 3))
"""Launches at width 4096 for 0, 1 and 2 norms, the fastest measured on an H100 (docs/benchmarks)."""


@triton.jit
def _residual_norm_forward_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    gate_table_ptr,
    scale0_ptr,
    shift0_ptr,
    scale0_table_ptr,
    shift0_table_ptr,
    scale1_ptr,
    shift1_ptr,
    scale1_table_ptr,
    shift1_table_ptr,
    index_ptr,
    r_ptr,
    h0_ptr,
    h1_ptr,
    rstd_ptr,
    tokens,
    tokens_per_program,
    x_stride_b,
    x_stride_s,
    y_stride_b,
    y_stride_s,
    gate_stride_b,
    gate_stride_k,
    row_stride_b,
    row_stride_k,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
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
    y_ptr += batch * y_stride_b
    r_ptr += batch * tokens * D
    h0_ptr += batch * tokens * D
    h1_ptr += batch * tokens * D
    if INDEXED:
        token_numbers, indices = load_indices(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    while first < last:
        if INDEXED:
            k, end = run_at(token_numbers, indices, first, last)
        gate = load_row(gate_ptr, gate_table_ptr, batch * gate_stride_b + k * gate_stride_k, cols, inside)
        row = batch * row_stride_b + k * row_stride_k
        if NORMS > 0:
            scale0 = 1 + load_row(scale0_ptr, scale0_table_ptr, row, cols, inside)
            shift0 = load_row(shift0_ptr, shift0_table_ptr, row, cols, inside)
        if NORMS > 1:
            scale1 = 1 + load_row(scale1_ptr, scale1_table_ptr, row, cols, inside)
            shift1 = load_row(shift1_ptr, shift1_table_ptr, row, cols, inside)
        for token in tl.range(first, end, num_stages=STAGES):
            x = tl.load(x_ptr + token * x_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + token * y_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
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
    rows: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
    eps: float,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the forward kernel. `launch` overrides the choice, to measure it.

    Args:
        x, y: [B, S, D].
        rows: gate [B, 1 | K, D], then scale and shift [B, K, D] of each norm.
        tables: [D] of each of the rows.
        index: [B, S], or None where K is 1.
        eps: of the norm.
        launch: see above.

    Returns:
        r, each h, and 1 / rms(r) [B, S] float32, without the last where there is no norm.
    """
    batch, tokens, width = x.shape
    norms = len(rows) // 2
    launch = launch or FORWARD[norms].at(width)
    x, y = with_unit_stride(x), with_unit_stride(y)
    gate = with_unit_stride(rows[0])
    pairs = with_equal_strides(rows[1:]) if norms else []
    outs = [torch.empty((batch, tokens, width), dtype=x.dtype, device=x.device) for _ in range(1 + norms)]
    rstd = torch.empty((batch, tokens), dtype=torch.float32, device=x.device) if norms else None
    walk = divide_tokens(x, launch.programs)
    index_ptr, looked_at, is_indexed = index_arguments(index, walk, x)
    runnable(_residual_norm_forward_kernel, x)[(walk.programs, batch)](
        x,
        y,
        gate,
        tables[0].contiguous(),
        *filled(pairs[:2], 2, gate),
        *filled([t.contiguous() for t in tables[1:3]], 2, gate),
        *filled(pairs[2:], 2, gate),
        *filled([t.contiguous() for t in tables[3:]], 2, gate),
        index_ptr,
        *filled(outs, 3, outs[0]),
        outs[0] if rstd is None else rstd,
        tokens,
        walk.tokens,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        gate.stride(0),
        _row_stride(gate),
        *(pairs[0].stride()[:2] if norms else (0, 0)),
        eps,
        width,
        triton.next_power_of_2(width),
        norms,
        looked_at,
        is_indexed,
        launch.stages,
        num_warps=launch.warps,
    )
    return outs if rstd is None else [*outs, rstd]


def _row_stride(gate: Tensor) -> int:
    """A single row is every token's, whatever its index."""
    return gate.stride(1) if gate.shape[1] > 1 else 0


@triton.jit
def _residual_norm_backward_kernel(
    dr_ptr,
    dh0_ptr,
    dh1_ptr,
    r_ptr,
    y_ptr,
    rstd_ptr,
    gate_ptr,
    gate_table_ptr,
    scale0_ptr,
    scale0_table_ptr,
    scale1_ptr,
    scale1_table_ptr,
    index_ptr,
    dx_ptr,
    dy_ptr,
    partial_ptr,
    written_ptr,
    tokens,
    tokens_per_program,
    K,
    dr_stride_b,
    dr_stride_s,
    dh0_stride_b,
    dh0_stride_s,
    dh1_stride_b,
    dh1_stride_s,
    y_stride_b,
    y_stride_s,
    gate_stride_b,
    gate_stride_k,
    row_stride_b,
    row_stride_k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
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
    partial_ptr += program * K * (1 + 2 * NORMS) * D
    dr_ptr += batch * dr_stride_b
    dh0_ptr += batch * dh0_stride_b
    dh1_ptr += batch * dh1_stride_b
    y_ptr += batch * y_stride_b
    r_ptr += batch * tokens * D
    dx_ptr += batch * tokens * D
    dy_ptr += batch * tokens * D
    if INDEXED:
        token_numbers, indices = load_indices(index_ptr + batch * tokens, first, last, BLOCK_TOKENS)
    k = 0
    end = last
    written = 0
    while first < last:
        if INDEXED:
            k, end = run_at(token_numbers, indices, first, last)
        gate = load_row(gate_ptr, gate_table_ptr, batch * gate_stride_b + k * gate_stride_k, cols, inside)
        row = batch * row_stride_b + k * row_stride_k
        d_gate = tl.zeros([BLOCK], tl.float32)
        if NORMS > 0:
            scale0 = 1 + load_row(scale0_ptr, scale0_table_ptr, row, cols, inside)
            d_scale0 = tl.zeros([BLOCK], tl.float32)
            d_shift0 = tl.zeros([BLOCK], tl.float32)
        if NORMS > 1:
            scale1 = 1 + load_row(scale1_ptr, scale1_table_ptr, row, cols, inside)
            d_scale1 = tl.zeros([BLOCK], tl.float32)
            d_shift1 = tl.zeros([BLOCK], tl.float32)
        for token in tl.range(first, end, num_stages=STAGES):
            total = tl.load(dr_ptr + token * dr_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(y_ptr + token * y_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
            if NORMS > 0:
                dh0 = tl.load(dh0_ptr + token * dh0_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
                r = tl.load(r_ptr + token * D + cols, mask=inside, other=0.0).to(tl.float32)
                rstd = tl.load(rstd_ptr + batch * tokens + token)
                normed = r * rstd
                d_normed = dh0 * scale0
                d_scale0 += dh0 * normed
                d_shift0 += dh0
                if NORMS > 1:
                    dh1 = tl.load(dh1_ptr + token * dh1_stride_s + cols, mask=inside, other=0.0).to(tl.float32)
                    d_normed += dh1 * scale1
                    d_scale1 += dh1 * normed
                    d_shift1 += dh1
                mean = tl.sum(d_normed * normed, 0) / D
                total += (d_normed - normed * mean) * rstd
                tl.store(dx_ptr + token * D + cols, total.to(dx_ptr.dtype.element_ty), mask=inside)
            tl.store(dy_ptr + token * D + cols, (total * gate).to(dy_ptr.dtype.element_ty), mask=inside)
            d_gate += total * y
        slot = partial_ptr + k * (1 + 2 * NORMS) * D
        is_written = ((written >> k) & 1) != 0
        store_partial(slot, d_gate, cols, inside, is_written)
        if NORMS > 0:
            store_partial(slot + D, d_scale0, cols, inside, is_written)
            store_partial(slot + 2 * D, d_shift0, cols, inside, is_written)
        if NORMS > 1:
            store_partial(slot + 3 * D, d_scale1, cols, inside, is_written)
            store_partial(slot + 4 * D, d_shift1, cols, inside, is_written)
        written = written | (1 << k)
        first = end
    if INDEXED:
        tl.store(written_ptr + program, written)


def launch_backward(
    grads: list[Tensor],
    saved: list[Tensor],
    y: Tensor,
    rows: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the backward kernel.

    Args:
        grads: dr, then each dh [B, S, D].
        saved: r and 1 / rms(r); empty where there is no norm.
        y: [B, S, D].
        rows: gate [B, 1 | K, D], then the scale [B, K, D] of each norm.
        tables: [D] of each of the rows.
        index: [B, S], or None where K is 1.
        launch: overrides the choice, to measure it.

    Returns:
        dy, the gradients of embeddings [B, K, 1 + 2 n, D] and of tables [1 + 2 n, D] in the order gate, scale, shift,
        ..., and dx where there is a norm (without one it is dr).
    """
    batch, tokens, width = y.shape
    norms = len(rows) - 1
    launch = launch or BACKWARD[norms].at(width)
    grads, y = [with_unit_stride(grad) for grad in grads], with_unit_stride(y)
    gate = with_unit_stride(rows[0])
    scales = with_equal_strides(rows[1:]) if norms else []
    k = scales[0].shape[1] if norms else gate.shape[1]
    walk = divide_tokens(y, launch.programs)
    dy = torch.empty((batch, tokens, width), dtype=y.dtype, device=y.device)
    dx = torch.empty_like(dy) if norms else None
    partial = torch.empty((batch, walk.programs, k, 1 + 2 * norms, width), dtype=torch.float32, device=y.device)
    written = torch.empty((batch, walk.programs), dtype=torch.int32, device=y.device)
    padded = filled(grads, 3, grads[0])
    scale_args = [tensor for pair in zip(scales, tables[1:], strict=True) for tensor in (pair[0], pair[1].contiguous())]
    index_ptr, looked_at, is_indexed = index_arguments(index, walk, y)
    runnable(_residual_norm_backward_kernel, y)[(walk.programs, batch)](
        *padded,
        saved[0] if norms else y,
        y,
        saved[1] if norms else y,
        gate,
        tables[0].contiguous(),
        *filled(scale_args, 4, gate),
        index_ptr,
        dx if norms else dy,
        dy,
        partial,
        written,
        tokens,
        walk.tokens,
        k,
        *(stride for grad in padded for stride in grad.stride()[:2]),
        y.stride(0),
        y.stride(1),
        gate.stride(0),
        _row_stride(gate),
        *(scales[0].stride()[:2] if norms else (0, 0)),
        width,
        triton.next_power_of_2(width),
        norms,
        looked_at,
        is_indexed,
        launch.stages,
        num_warps=launch.warps,
    )
    d_rows = sum_partials(partial, written if is_indexed else None, rows[0].dtype, tables[0].dtype)
    return [dy, *d_rows] if dx is None else [dy, *d_rows, dx]


def _fake_forward(x, y, rows, tables, index, eps):
    norms = len(rows) // 2
    outs = [x.new_empty(x.shape) for _ in range(1 + norms)]
    return [*outs, x.new_empty(x.shape[:2], dtype=torch.float32)] if norms else outs


@operator("gated_residual_norm", _fake_forward)
def _forward_op(
    x: Tensor, y: Tensor, rows: list[Tensor], tables: list[Tensor], index: Tensor | None, eps: float
) -> list[Tensor]:
    return launch_forward(x, y, rows, tables, index, eps)


def _fake_backward(grads, saved, y, rows, tables, index):
    norms = len(rows) - 1
    k = rows[-1].shape[1]
    d_rows = rows[0].new_empty((y.shape[0], k, 1 + 2 * norms, y.shape[2]))
    d_tables = tables[0].new_empty((1 + 2 * norms, y.shape[2]))
    return [y.new_empty(y.shape), d_rows, d_tables, *([y.new_empty(y.shape)] if norms else [])]


@operator("gated_residual_norm_backward", _fake_backward)
def _backward_op(
    grads: list[Tensor],
    saved: list[Tensor],
    y: Tensor,
    rows: list[Tensor],
    tables: list[Tensor],
    index: Tensor | None,
) -> list[Tensor]:
    return launch_backward(grads, saved, y, rows, tables, index)


def _setup_context(ctx, inputs, output) -> None:
    _, y, rows, tables, index, _ = inputs
    norms = len(rows) // 2
    saved = (output[0], output[-1]) if norms else ()
    # Shifts are not read again.
    ctx.save_for_backward(index, y, *saved, *rows[:1], *rows[1::2], *tables[:1], *tables[1::2])
    ctx.norms = norms
    ctx.dtypes = [(row.dtype, table.dtype) for row, table in zip(rows, tables, strict=True)]
    ctx.single_gate = rows[0].shape[1] == 1
    if norms:
        ctx.mark_non_differentiable(output[-1])


def _differentiate(ctx, grads: list[Tensor]) -> tuple:
    norms = ctx.norms
    index, y, *rest = ctx.saved_tensors
    saved, rest = rest[: 2 * (norms > 0)], rest[2 * (norms > 0) :]
    rows, tables = rest[: 1 + norms], rest[1 + norms :]
    dy, d_rows, d_tables, *dx = _backward_op(grads[: 1 + norms], saved, y, rows, tables, index)
    d_tables = [g.to(dtype) for g, (_, dtype) in zip(d_tables.unbind(0), ctx.dtypes, strict=True)]
    gradients = list(d_rows.unbind(2))
    if ctx.single_gate:
        gradients[0] = gradients[0].sum(1, keepdim=True)
    d_rows = [g.to(dtype) for g, (dtype, _) in zip(gradients, ctx.dtypes, strict=True)]
    return dx[0] if norms else grads[0], dy, d_rows, d_tables, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Row | None,
    modulations: Sequence[Modulation | None],
    index: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """The new tokens `x + gate * y`, then one normed and modulated [B, S, D] for each of at most two modulations.

    Args:
        x, y: tokens and what a sub-layer adds to them [B, S, D], any strides, the same dtype.
        gate: factor on `y`, of one row or of K; None is 1.
        modulations: scale and shift pairs of K rows each; None is the bare norm.
        index: which of the K rows each token has [B, S]; None takes the first.
        eps: added to the mean square.

    Widths and row counts beyond the kernel's, and more modulations, take the plain torch form.
    """
    given = [gate, *(row for pair in modulations if pair is not None for row in pair)]
    embeddings = [row.embedding for row in given if row is not None]
    if len(modulations) > 2 or x.dtype != y.dtype or not is_supported(x, embeddings):
        return reference(x, y, gate, modulations, index, eps)
    if all(embedding.shape[1] == 1 for embedding in embeddings):
        index = None
    count = 1 if index is None else max(embedding.shape[1] for embedding in embeddings)
    flat = [Row(x.new_ones(1, 1, x.shape[-1])) if gate is None else gate]
    for pair in modulations:
        flat.extend((Row(x.new_zeros(1, 1, x.shape[-1])),) * 2 if pair is None else pair)
    split = [split_row(row, x, index) for row in flat]
    rows = [split[0][0], *(row.expand(-1, count, -1) for row, _ in split[1:])]
    outputs = _forward_op(x, y, rows, [table for _, table in split], index, eps)
    return tuple(outputs[: 1 + len(modulations)])


def gated_residual(x: Tensor, y: Tensor, gate: Row | None, index: Tensor | None) -> Tensor:
    """`x + gate * y`; see `gated_residual_norm`. Without a gate there is nothing to fuse."""
    return x + y if gate is None else gated_residual_norm(x, y, gate, (), index, 0.0)[0]
