"""Angles of a token's pairs of channels, fetched inside a kernel from the small tables of `PackedRotation`.

Pairs are numbered over all heads, [heads, K / 2]; `axis` and `frequency` say where in the table each finds its angle,
`rows_ptr` points at the token's row of the first axis, and the other axes' follow `rows_stride` apart.
"""

import triton
import triton.language as tl


@triton.jit
def angles_of_one(table_ptr, rows_ptr, rows_stride, axis, frequency, is_turned, ROW: tl.constexpr, AXES: tl.constexpr):
    """Cosines and sines of one token's pairs [heads, K / 2], fetched whole, so that the fetch can be made ahead."""
    row = tl.load(rows_ptr)
    offset = frequency + row * ROW
    for other in tl.static_range(1, AXES):
        row = tl.load(rows_ptr + other * rows_stride)
        offset = tl.where(axis == other, frequency + row * ROW, offset)
    both = tl.arange(0, 2)[None, None, :]
    pointers = table_ptr + offset[:, :, None] * 2 + both
    cos, sin = tl.split(tl.load(pointers, mask=is_turned[:, :, None], other=0.0))
    return tl.where(is_turned, cos, 1.0), sin


@triton.jit
def angles_of_first(table_ptr, inside):
    """What `angles_of_next` starts from: pointers to pairs of cosine and sine, and pairs that turn nothing."""
    return table_ptr.to(tl.pointer_type(tl.int64)), tl.where(inside, 0x3F800000, 0).to(tl.int64)


@triton.jit
def angles_of_next(
    angles, pairs_ptr, rows_ptr, rows_stride, is_first, axis, frequency, is_turned,
    ROW: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """Angles of a token [heads, K / 2], from those of the token before it: only axes along which it moved are fetched.

    An angle is cosine (low half) and sine in 64 bits, so that one fetch brings both in the layout of the channels.
    Neighbours in a row of a frame differ on one axis of three; against the sound, whole frames have the same angles.
    """
    row = tl.load(rows_ptr)
    moved = (axis == 0) & (is_first | (row != tl.load(rows_ptr - 1, mask=is_first == 0, other=-1)))
    offset = frequency + row * ROW
    for other in tl.static_range(1, AXES):
        other_ptr = rows_ptr + other * rows_stride
        row = tl.load(other_ptr)
        moved |= (axis == other) & (is_first | (row != tl.load(other_ptr - 1, mask=is_first == 0, other=-1)))
        offset = tl.where(axis == other, frequency + row * ROW, offset)
    return tl.load(pairs_ptr + offset, mask=is_turned & moved, other=angles)


@triton.jit
def cos_sin(angles):
    """Cosines and sines, float32, of angles as `angles_of_next` returns them."""
    cos = angles.to(tl.int32).to(tl.float32, bitcast=True)
    return cos, (angles >> 32).to(tl.int32).to(tl.float32, bitcast=True)
