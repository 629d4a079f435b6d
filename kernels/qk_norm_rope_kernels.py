"""Triton kernels of `qk_norm_rope`; the operation, its formulas and its launches are in qk_norm_rope.py.

A program holds whole tokens, as the first and the second halves of all heads, [heads, head_dim / 2] each: a pair of
channels that is rotated together is then two elements of the same thread.

The signatures list the arguments of queries and of keys, because one launch does both. A launch for each would halve
the signature and double the launches: at 4,032 tokens a step waits for the host, which needs 25 us for each of them
(1.2 ms for the 48 of a layer under a profiler, docs/benchmarks/log.md, third round), where the forward takes 12 us at
width 2048; 126 audio tokens alone would leave multiprocessors idle; and self-attention would load cosines and sines
twice.
What is done to one tensor is written once: `_forward_one`, `_backward_one`, `_backward_token` and `_store_rotated` are
compiled for queries and for keys.
"""

import triton
import triton.language as tl


@triton.jit
def _program_number(first_program):
    """Program number, counted from `first_program` around, so that the programs from there on start first."""
    # Not by a remainder: its code, which runs once, would hold a tenth of all registers throughout.
    program = tl.program_id(0) + first_program
    return tl.where(program < tl.num_programs(0), program, program - tl.num_programs(0))


@triton.jit
def _layout(
    first_pair, pad, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    AXES: tl.constexpr,
):  # fmt: skip
    """Channels of the first halves of all heads [heads, head_dim / 2], and whether they exist.

    Then, of each pair, whether it is rotated, and its axis and frequency. Pairs are numbered over the heads of all
    ranks; the first `pad` are not rotated.
    """
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    lane = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS) & (lane < HALF)
    cols = head * (2 * HALF) + lane
    pair = first_pair + head * HALF + lane - pad
    is_rotated = inside & (pair >= 0)
    return cols, inside, is_rotated, pair % AXES, pair // AXES


@triton.jit
def _load_halves(ptr, cols, inside, HALF: tl.constexpr):
    """First and second halves of all heads [heads, head_dim / 2], in the dtype of memory."""
    return tl.load(ptr + cols, mask=inside, other=0.0), tl.load(ptr + cols + HALF, mask=inside, other=0.0)


@triton.jit
def _load_halves_float32(ptr, cols, inside, HALF: tl.constexpr):
    first, second = _load_halves(ptr, cols, inside, HALF)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _sum(a):
    """Sum of all elements."""
    return tl.sum(tl.reshape(a, [a.numel], can_reorder=True), 0)


@triton.jit
def _add_pairs(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _sum_two(a, b):
    """Sums of all elements of two tensors in one reduction, which synchronizes threads once."""
    a = tl.reshape(a, [a.numel], can_reorder=True)
    b = tl.reshape(b, [b.numel], can_reorder=True)
    return tl.reduce((a, b), 0, _add_pairs)


# Cosines and sines come from a small table [N, FREQUENCIES, 2] of the distinct coordinates of all axes. `index_ptr`
# points at the token's row for the first axis; those for the other axes are `index_stride` apart.


@triton.jit
def _load_cos_sin(
    table_ptr, index_ptr, index_stride, axis, frequency, is_rotated, FREQUENCIES: tl.constexpr, AXES: tl.constexpr
):
    """Cosines and sines of one token's pairs [heads, head_dim / 2]; a plain load, which the compiler can prefetch."""
    row = tl.load(index_ptr)
    offset = frequency + row * FREQUENCIES
    for other in tl.static_range(1, AXES):
        row = tl.load(index_ptr + other * index_stride)
        offset = tl.where(axis == other, frequency + row * FREQUENCIES, offset)
    cos_or_sin = tl.arange(0, 2)[None, None, :]
    pointers = table_ptr + offset[:, :, None] * 2 + cos_or_sin
    cos, sin = tl.split(tl.load(pointers, mask=is_rotated[:, :, None], other=0.0))
    return tl.where(is_rotated, cos, 1.0), sin


@triton.jit
def _init_packed(table_ptr, inside):
    """Initial state of `_update_packed`: pointers to pairs of cosine and sine, and pairs that rotate nothing (1, 0)."""
    return table_ptr.to(tl.pointer_type(tl.int64)), tl.where(inside, 0x3F800000, 0).to(tl.int64)


@triton.jit
def _update_packed(
    packed, pairs_ptr, index_ptr, index_stride, is_first, axis, frequency, is_rotated,
    FREQUENCIES: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Cosines and sines of a token, from those of the token before it: loads only axes along which it moved.

    A pair is packed into 64 bits, cosine (low half) and sine, so that one load brings both in the layout of the
    channels. Neighbors in a row of a frame differ on one axis of three; in cross-modal attention all tokens of a frame
    have the same cosines and sines.
    """
    row = tl.load(index_ptr)
    moved = (axis == 0) & (is_first | (row != tl.load(index_ptr - 1, mask=is_first == 0, other=-1)))
    offset = frequency + row * FREQUENCIES
    for other in tl.static_range(1, AXES):
        other_ptr = index_ptr + other * index_stride
        row = tl.load(other_ptr)
        moved |= (axis == other) & (is_first | (row != tl.load(other_ptr - 1, mask=is_first == 0, other=-1)))
        offset = tl.where(axis == other, frequency + row * FREQUENCIES, offset)
    return tl.load(pairs_ptr + offset, mask=is_rotated & moved, other=packed)


@triton.jit
def _unpack(packed):
    """Cosines and sines, float32."""
    cos = packed.to(tl.int32).to(tl.float32, bitcast=True)
    return cos, (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _store_rotated(out_ptr, x1, x2, rstd, w1, w2, cos, sin, cols, inside, HALF: tl.constexpr, ROTATED: tl.constexpr):
    z1 = x1 * rstd * w1
    z2 = x2 * rstd * w2
    o1, o2 = z1, z2
    if ROTATED:
        o1 = z1 * cos - z2 * sin
        o2 = z2 * cos + z1 * sin
    tl.store(out_ptr + cols, o1.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + cols + HALF, o2.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _forward_one(
    x_ptr, weight_ptr, sum_ptr, table_ptr, index_ptr, out_ptr, rstd_ptr,
    batch, first, tokens_per_program, tokens, stride_s, width, eps, cols, inside, axis, frequency, is_rotated,
    D: tl.constexpr, HALF: tl.constexpr, FREQUENCIES: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr,
    SUMMED: tl.constexpr,
):  # fmt: skip
    """A tile of queries or of keys that do not share cosines and sines; prefetched as in the kernel."""
    last = tl.minimum(first + tokens_per_program, tokens) - 1
    next_x1, next_x2 = _load_halves(x_ptr + first * stride_s, cols, inside, HALF)
    pairs_ptr, packed = _init_packed(table_ptr, inside)
    index_ptr += batch * AXES * tokens
    out_ptr += batch * tokens * D
    rstd_ptr += batch * tokens
    sum_ptr += batch * tokens
    for token in tl.range(first, last + 1, num_stages=1):
        x1, x2 = next_x1.to(tl.float32), next_x2.to(tl.float32)
        # The next token, as in the kernel; the last one has none, and its mask loads nothing.
        next_x1, next_x2 = _load_halves(x_ptr + (token + 1) * stride_s, cols, inside & (token < last), HALF)
        cos, sin = x1, x2  # unused without rotation, but Triton needs a type
        if ROTATED:
            packed = _update_packed(
                packed,
                pairs_ptr,
                index_ptr + token,
                tokens,
                token == first,
                axis,
                frequency,
                is_rotated,
                FREQUENCIES,
                AXES,
            )
            cos, sin = _unpack(packed)
        squares = tl.load(sum_ptr + token) if SUMMED else _sum(x1 * x1 + x2 * x2)
        rstd = tl.rsqrt(squares / width + eps)
        w1, w2 = _load_halves_float32(weight_ptr, cols, inside, HALF)
        _store_rotated(out_ptr + token * D, x1, x2, rstd, w1, w2, cos, sin, cols, inside, HALF, ROTATED)
        tl.store(rstd_ptr + token, rstd)


@triton.jit
def qk_norm_rope_forward_kernel(
    q_ptr, q_weight_ptr, q_sum_ptr, q_table_ptr, q_index_ptr, q_out_ptr, q_rstd_ptr,
    k_ptr, k_weight_ptr, k_sum_ptr, k_table_ptr, k_index_ptr, k_out_ptr, k_rstd_ptr,
    q_tokens, k_tokens, first_program, q_programs, q_tokens_per_program, k_tokens_per_program,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, first_pair, pad, width, eps,
    D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    FREQUENCIES: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr, SHARED: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Reads and writes queries and keys once.

    ROTATED: there are cosines and sines. SHARED: queries and keys have the same, so each program does its tokens of
    both. SUMMED: the sums of squares are inputs (tensor parallelism).
    """
    batch = tl.program_id(1).to(tl.int64)
    program = _program_number(first_program)
    cols, inside, is_rotated, axis, frequency = _layout(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    if SHARED:
        first = program * q_tokens_per_program
        last = tl.minimum(first + q_tokens_per_program, q_tokens) - 1
        q_ptr += batch * q_stride_b
        k_ptr += batch * k_stride_b
        index_ptr = q_index_ptr + batch * AXES * q_tokens
        pairs_ptr, packed = _init_packed(q_table_ptr, inside)
        next_x1, next_x2 = _load_halves(q_ptr + first * q_stride_s, cols, inside, HALF)
        next_y1, next_y2 = _load_halves(k_ptr + first * k_stride_s, cols, inside, HALF)
        # The next token is loaded, in its own narrow dtype, while this one is computed. That leaves registers for two
        # programs per multiprocessor; the compiler's own pipeline, with cosines and weights in it, does not.
        for token in tl.range(first, last + 1, num_stages=1):
            at = batch * q_tokens + token
            x1, x2, y1, y2 = (
                next_x1.to(tl.float32), next_x2.to(tl.float32), next_y1.to(tl.float32), next_y2.to(tl.float32)
            )  # fmt: skip
            coming = tl.minimum(token + 1, last)
            next_x1, next_x2 = _load_halves(q_ptr + coming * q_stride_s, cols, inside, HALF)
            next_y1, next_y2 = _load_halves(k_ptr + coming * k_stride_s, cols, inside, HALF)
            packed = _update_packed(
                packed,
                pairs_ptr,
                index_ptr + token,
                q_tokens,
                token == first,
                axis,
                frequency,
                is_rotated,
                FREQUENCIES,
                AXES,
            )
            cos, sin = _unpack(packed)
            if SUMMED:
                q_squares = tl.load(q_sum_ptr + at)
                k_squares = tl.load(k_sum_ptr + at)
            else:
                q_squares, k_squares = _sum_two(x1 * x1 + x2 * x2, y1 * y1 + y2 * y2)
            q_rstd = tl.rsqrt(q_squares / width + eps)
            k_rstd = tl.rsqrt(k_squares / width + eps)
            # Weights are loaded from the cache for each token: keeping them in registers would halve the occupancy.
            w1, w2 = _load_halves_float32(q_weight_ptr, cols, inside, HALF)
            _store_rotated(q_out_ptr + at * D, x1, x2, q_rstd, w1, w2, cos, sin, cols, inside, HALF, True)
            v1, v2 = _load_halves_float32(k_weight_ptr, cols, inside, HALF)
            _store_rotated(k_out_ptr + at * D, y1, y2, k_rstd, v1, v2, cos, sin, cols, inside, HALF, True)
            tl.store(q_rstd_ptr + at, q_rstd)
            tl.store(k_rstd_ptr + at, k_rstd)
    elif program < q_programs:
        _forward_one(
            q_ptr + batch * q_stride_b, q_weight_ptr, q_sum_ptr, q_table_ptr, q_index_ptr, q_out_ptr, q_rstd_ptr,
            batch, program * q_tokens_per_program, q_tokens_per_program, q_tokens, q_stride_s, width, eps,
            cols, inside, axis, frequency, is_rotated, D, HALF, FREQUENCIES, AXES, ROTATED, SUMMED,
        )  # fmt: skip
    else:
        _forward_one(
            k_ptr + batch * k_stride_b, k_weight_ptr, k_sum_ptr, k_table_ptr, k_index_ptr, k_out_ptr, k_rstd_ptr,
            batch, (program - q_programs) * k_tokens_per_program, k_tokens_per_program, k_tokens, k_stride_s, width,
            eps, cols, inside, axis, frequency, is_rotated, D, HALF, FREQUENCIES, AXES, ROTATED, SUMMED,
        )  # fmt: skip


@triton.jit
def _backward_token(
    grad_ptr, x_ptr, rstd_ptr, dx_ptr, dsum_ptr, w1, w2, dw1, dw2, cos, sin, cols, inside, width,
    HALF: tl.constexpr, SUMMED: tl.constexpr, ROTATED: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """One token of one tensor; returns the weight gradients with this token's part added."""
    g1 = tl.load(grad_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    g2 = tl.load(grad_ptr + cols + HALF, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + cols + HALF, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr)
    # The inverse rotation, by the negative angle.
    d1, d2 = g1, g2
    if ROTATED:
        d1 = g1 * cos + g2 * sin
        d2 = g2 * cos - g1 * sin
    n1 = x1 * rstd
    n2 = x2 * rstd
    if WEIGHTS:
        dw1 += d1 * n1
        dw2 += d2 * n2
    d1 *= w1
    d2 *= w2
    # Gradient of x * rstd: the part of d along x cancels, because scaling x does not change z.
    mean = _sum(d1 * n1 + d2 * n2) / width
    if SUMMED:
        # The other ranks' part of the mean arrives through the gradient of the sum of squares.
        tl.store(dsum_ptr, -0.5 * rstd * rstd * mean)
    else:
        d1 -= n1 * mean
        d2 -= n2 * mean
    tl.store(dx_ptr + cols, (d1 * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + cols + HALF, (d2 * rstd).to(dx_ptr.dtype.element_ty), mask=inside)
    return dw1, dw2


@triton.jit
def _store_halves(ptr, first, second, cols, inside, HALF: tl.constexpr):
    tl.store(ptr + cols, first, mask=inside)
    tl.store(ptr + cols + HALF, second, mask=inside)


@triton.jit
def _backward_one(
    grad_ptr, x_ptr, rstd_ptr, weight_ptr, table_ptr, index_ptr, dx_ptr, dsum_ptr, partial_ptr,
    batch, first, tokens_per_program, tokens, grad_stride_s, x_stride_s, width,
    cols, inside, axis, frequency, is_rotated,
    D: tl.constexpr, HALF: tl.constexpr, FREQUENCIES: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr,
    SUMMED: tl.constexpr, WEIGHTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of queries or of keys that do not share cosines and sines."""
    w1, w2 = _load_halves_float32(weight_ptr, cols, inside, HALF)
    dw1 = tl.zeros(cols.shape, tl.float32)
    dw2 = tl.zeros(cols.shape, tl.float32)
    cos, sin = w1, w2  # unused without rotation, but Triton needs a type
    pairs_ptr, packed = _init_packed(table_ptr, inside)
    index_ptr += batch * AXES * tokens
    dx_ptr += batch * tokens * D
    rstd_ptr += batch * tokens
    dsum_ptr += batch * tokens
    for token in tl.range(first, tl.minimum(first + tokens_per_program, tokens), num_stages=STAGES):
        if ROTATED:
            packed = _update_packed(
                packed,
                pairs_ptr,
                index_ptr + token,
                tokens,
                token == first,
                axis,
                frequency,
                is_rotated,
                FREQUENCIES,
                AXES,
            )
            cos, sin = _unpack(packed)
        dw1, dw2 = _backward_token(
            grad_ptr + token * grad_stride_s, x_ptr + token * x_stride_s, rstd_ptr + token, dx_ptr + token * D,
            dsum_ptr + token,
            w1, w2, dw1, dw2, cos, sin, cols, inside, width, HALF, SUMMED, ROTATED, WEIGHTS,
        )  # fmt: skip
    if WEIGHTS:
        _store_halves(partial_ptr, dw1, dw2, cols, inside, HALF)


@triton.jit
def qk_norm_rope_backward_kernel(
    q_grad_ptr, q_ptr, q_rstd_ptr, q_weight_ptr, q_table_ptr, q_index_ptr, dq_ptr, q_dsum_ptr,
    k_grad_ptr, k_ptr, k_rstd_ptr, k_weight_ptr, k_table_ptr, k_index_ptr, dk_ptr, k_dsum_ptr,
    partial_ptr,
    q_tokens, k_tokens, first_program, q_programs, q_tokens_per_program, k_tokens_per_program, slots,
    q_grad_stride_b, q_grad_stride_s, k_grad_stride_b, k_grad_stride_s,
    q_stride_b, q_stride_s, k_stride_b, k_stride_s, first_pair, pad, width,
    D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    FREQUENCIES: tl.constexpr, AXES: tl.constexpr, ROTATED: tl.constexpr, SHARED: tl.constexpr, SUMMED: tl.constexpr,
    WEIGHTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Reads gradients and inputs and writes input gradients once; weight gradients go to partials [B, slots, D]."""
    batch = tl.program_id(1).to(tl.int64)
    program = _program_number(first_program)
    cols, inside, is_rotated, axis, frequency = _layout(first_pair, pad, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, AXES)
    q_grad_ptr += batch * q_grad_stride_b
    k_grad_ptr += batch * k_grad_stride_b
    q_ptr += batch * q_stride_b
    k_ptr += batch * k_stride_b
    # First the slots of programs that did queries, then those of programs that did keys.
    partial_ptr += (batch * slots + program) * D
    if SHARED:
        first = program * q_tokens_per_program
        index_ptr = q_index_ptr + batch * AXES * q_tokens
        w1, w2 = _load_halves_float32(q_weight_ptr, cols, inside, HALF)
        v1, v2 = _load_halves_float32(k_weight_ptr, cols, inside, HALF)
        dw1 = tl.zeros(cols.shape, tl.float32)
        dw2 = tl.zeros(cols.shape, tl.float32)
        dv1 = tl.zeros(cols.shape, tl.float32)
        dv2 = tl.zeros(cols.shape, tl.float32)
        for token in tl.range(first, tl.minimum(first + q_tokens_per_program, q_tokens), num_stages=STAGES):
            at = batch * q_tokens + token
            # Not `_update_packed`: what is carried from token to token would stall the prefetch, which is deep here.
            cos, sin = _load_cos_sin(
                q_table_ptr, index_ptr + token, q_tokens, axis, frequency, is_rotated, FREQUENCIES, AXES
            )  # fmt: skip
            dw1, dw2 = _backward_token(
                q_grad_ptr + token * q_grad_stride_s, q_ptr + token * q_stride_s, q_rstd_ptr + at, dq_ptr + at * D,
                q_dsum_ptr + at, w1, w2, dw1, dw2, cos, sin, cols, inside, width, HALF, SUMMED, True, WEIGHTS,
            )  # fmt: skip
            dv1, dv2 = _backward_token(
                k_grad_ptr + token * k_grad_stride_s, k_ptr + token * k_stride_s, k_rstd_ptr + at, dk_ptr + at * D,
                k_dsum_ptr + at, v1, v2, dv1, dv2, cos, sin, cols, inside, width, HALF, SUMMED, True, WEIGHTS,
            )  # fmt: skip
        if WEIGHTS:
            _store_halves(partial_ptr, dw1, dw2, cols, inside, HALF)
            _store_halves(partial_ptr + q_programs * D, dv1, dv2, cols, inside, HALF)
    elif program < q_programs:
        _backward_one(
            q_grad_ptr, q_ptr, q_rstd_ptr, q_weight_ptr, q_table_ptr, q_index_ptr, dq_ptr, q_dsum_ptr, partial_ptr,
            batch, program * q_tokens_per_program, q_tokens_per_program, q_tokens, q_grad_stride_s, q_stride_s, width,
            cols, inside, axis, frequency, is_rotated, D, HALF, FREQUENCIES, AXES, ROTATED, SUMMED, WEIGHTS, STAGES,
        )  # fmt: skip
    else:
        _backward_one(
            k_grad_ptr, k_ptr, k_rstd_ptr, k_weight_ptr, k_table_ptr, k_index_ptr, dk_ptr, k_dsum_ptr, partial_ptr,
            batch, (program - q_programs) * k_tokens_per_program, k_tokens_per_program, k_tokens, k_grad_stride_s,
            k_stride_s, width, cols, inside, axis, frequency, is_rotated,
            D, HALF, FREQUENCIES, AXES, ROTATED, SUMMED, WEIGHTS, STAGES,
        )  # fmt: skip
