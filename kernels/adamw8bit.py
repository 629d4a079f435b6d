"""AdamW's update of many weights at once with moments of 8 bits, in torchao's format and with its operations.

    M <- M + (1 - b1) (G - M)                   V <- V + (1 - b2) (G^2 - V)          of the decoded moments
    W <- W - lr wd W                            W <- W - lr (M / (1 - b1^t)) / (sqrt(V) / sqrt(1 - b2^t) + eps)

A moment of 128 neighbors is a byte each, an index of a table of 256 values from 5.5e-7 to 1 and, for the first moment,
their negatives, and their largest magnitude, by which they were divided. One launch takes all weights of a parameter
group (weight_table.py): torchao's compiled update takes one weight, and a model has thousands, whose launches take
longer than the updates.

Bytes: 16 for each float32 weight with a float32 gradient, 10 in bfloat16, and 0.125 for the scales.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.stochastic import round_at_random
from ltx_titan_kernels.weight_table import SEED, Tables, address_of, chunk_of

SCALED = 128
"""Neighbors that share a scale."""
_SCALED = tl.constexpr(SCALED)
_DTYPES = (torch.bfloat16, torch.float32)
# Offsets are 32-bit numbers, up to a chunk beyond the end.
_MOST_ELEMENTS = 2**30
# As torchao has it: the scale of a moment that is zero.
_SMALLEST_SCALE = tl.constexpr(1e-12)

# Tensors of a weight.
_WEIGHT = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SCALE = tl.constexpr(3)
_EXP_AVG_SQ = tl.constexpr(4)
_EXP_AVG_SQ_SCALE = tl.constexpr(5)


class Updater:
    """Updates weights of one parameter group after the other; remembers where their tensors are.

    Args:
        signed, unsigned: torchao's tables of the value of each code, float32 [256], of the first and second moment.
        chunk: elements of a weight that one program updates.
        block: elements of them that it holds in registers at a time.
        warps: of a program.

    Attributes:
        levels: the two tables.
    """

    def __init__(
        self, signed: Tensor, unsigned: Tensor, *, chunk: int = 1 << 12, block: int = 1024, warps: int = 8
    ) -> None:
        assert signed.shape == unsigned.shape == (256,), (signed.shape, unsigned.shape)
        self.levels = signed, unsigned
        self._shape = chunk, block, warps
        self._tables = Tables(chunk, _are_supported)

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_scales: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        exp_avg_sq_scales: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scale: Tensor | None = None,
        skip: Tensor | None = None,
        seeds: Sequence[int] | None = None,
    ) -> bool:
        """Updates weights, moments and steps in place, on the current stream.

        Args:
            weights: plain tensors of one dtype, rounded to nearest, of any shape whose last dim is a multiple of
                `SCALED`, also empty.
            gradients: of the same shapes, of one dtype.
            exp_avgs, exp_avg_sqs: codes, uint8, of the same shapes.
            exp_avg_scales, exp_avg_sq_scales: float32, one for `SCALED` neighbors.
            steps: updates before this one, float32 scalars.
            lr, betas, eps, weight_decay: as in torch's AdamW.
            scale: divides the gradients, a float32 scalar on the device; None for 1.
            skip: 1.0 changes nothing, 0.0 updates; a float32 scalar on the device; None to update.
            seeds: round bfloat16 weights up or down at random (stochastic.py); below 2^31, always the same for a
                weight. None to round to nearest.

        Returns:
            Whether the kernels take these tensors; if not, nothing has changed.
        """
        table = self._tables(steps, seeds, weights, gradients, exp_avgs, exp_avg_scales, exp_avg_sqs, exp_avg_sq_scales)
        if table is None:
            return False
        chunk, block, warps = self._shape
        counts = table.count_step(betas, skip)
        rounds = seeds is not None and weights[0].dtype == torch.bfloat16
        # In float64: 1 - 0.999 in float32 is 1.3e-5 of it away.
        shares = 1 - betas[0], 1 - betas[1]
        for is_aligned, owners in table.owners.items():
            _update_kernel[(len(owners),)](
                table.rows, owners, *counts, scale, skip, weights[0], gradients[0], *self.levels,
                lr, lr * weight_decay, *shares, eps,
                FIELDS=table.rows.shape[1], CHUNK=chunk, BLOCK=block, ALIGNED=is_aligned, ROUNDS=rounds,
                num_warps=warps,
            )  # fmt: skip
        # Autograd cannot see that they have changed.
        torch.autograd.graph.increment_version(weights)
        return True


def _are_supported(*lists: Sequence[Tensor]) -> bool:
    weights, gradients, *moments = lists
    same = all(t.dtype == tensors[0].dtype for tensors in lists for t in tensors)
    wanted = [torch.uint8, torch.float32] * 2
    return (
        same
        and {weights[0].dtype, gradients[0].dtype} <= set(_DTYPES)
        and [tensors[0].dtype for tensors in moments] == wanted
        and all(w.ndim > 0 and w.shape[-1] % SCALED == 0 and w.numel() <= _MOST_ELEMENTS for w in weights)
    )


@triton.jit
def _encode(x, levels_ptr, SIGNED: tl.constexpr):
    """Codes of the table's values that are nearest to values from -1 to 1; in the middle between two, the upper one.

    The table has 7 decades from 1e-7 to 1, of 1, 2, 4 ... 64 cells of equal width, or twice as many without a sign, and
    the cells' centers for values: a value's cell tells its neighbors in the table. 0 and 1 are values, too.
    """
    size = tl.abs(x)
    decade = (size >= 1e-6).to(tl.int32)
    unit = tl.where(size >= 1e-6, 1e5, 1e6)
    for exponent in tl.static_range(5):
        is_above = size >= 10.0 ** (exponent - 5)
        decade += is_above.to(tl.int32)
        unit = tl.where(is_above, 10.0 ** (4 - exponent), unit)
    if SIGNED:
        cells = tl.full(decade.shape, 1, tl.int32) << decade
        skipped = cells - 1  # cells of the decades below
    else:
        cells = tl.full(decade.shape, 2, tl.int32) << decade
        skipped = cells - 2
    cell = ((size * unit - 0.1) * (cells.to(tl.float32) * (1 / 0.9))).to(tl.int32)
    cell = tl.minimum(tl.maximum(cell, 0), cells - 1) + skipped
    code = tl.where(x < 0, 126 - cell, 128 + cell) if SIGNED else 1 + cell
    value = tl.load(levels_ptr + code)
    is_below = value <= x
    other = tl.minimum(tl.maximum(tl.where(is_below, code + 1, code - 1), 0), 255)
    other_value = tl.load(levels_ptr + other)
    lower, upper = tl.where(is_below, value, other_value), tl.where(is_below, other_value, value)
    is_upper = x - lower >= (upper - lower) * 0.5
    return tl.where(is_upper == is_below, other, code).to(tl.uint8)


@triton.jit
def _load_moment(codes_ptrs, scale_ptrs, levels_ptr, inside, is_block):
    codes = tl.load(codes_ptrs, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scale_ptrs, mask=is_block, other=0.0)
    return tl.load(levels_ptr + codes) * scale[:, None]


@triton.jit
def _store_moment(moment, codes_ptrs, scale_ptrs, levels_ptr, inside, is_block, SIGNED: tl.constexpr):
    # Magnitudes as integers are in the same order, with NaN, which a maximum of numbers would ignore, as the largest.
    magnitudes = moment.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(magnitudes, 1).to(tl.float32, bitcast=True)
    scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
    codes = _encode(tl.div_rn(moment, tl.broadcast_to(scale[:, None], moment.shape)), levels_ptr, SIGNED)
    tl.store(codes_ptrs, codes, mask=inside)
    tl.store(scale_ptrs, scale, mask=is_block)


@triton.jit
def _update_kernel(
    table_ptr, owners_ptr, steps_ptr, first_ptr, second_ptr, scale_ptr, skip_ptr, weights_ptr, gradients_ptr,
    signed_ptr, unsigned_ptr, lr, decay, share1, share2, eps,
    FIELDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    number, entry, begin, numel = chunk_of(table_ptr, owners_ptr, skip_ptr, FIELDS, CHUNK, _SCALED)
    correction1 = tl.load(first_ptr + number)
    correction2_sqrt = tl.load(second_ptr + number)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    row, column = tl.arange(0, BLOCK // _SCALED), tl.arange(0, _SCALED)
    for start in range(0, tl.minimum(numel - begin, CHUNK), BLOCK):
        blocks = (begin + start) // _SCALED + row
        is_block = blocks * _SCALED < numel
        offsets = blocks[:, None] * _SCALED + column[None, :]
        inside = tl.broadcast_to(is_block[:, None], offsets.shape)
        weight_ptrs = address_of(entry, _WEIGHT, weights_ptr.dtype, ALIGNED) + offsets
        exp_avg_ptrs = address_of(entry, _EXP_AVG, tl.pointer_type(tl.uint8), ALIGNED) + offsets
        exp_avg_sq_ptrs = address_of(entry, _EXP_AVG_SQ, tl.pointer_type(tl.uint8), ALIGNED) + offsets
        exp_avg_scales = address_of(entry, _EXP_AVG_SCALE, tl.pointer_type(tl.float32), ALIGNED) + blocks
        exp_avg_sq_scales = address_of(entry, _EXP_AVG_SQ_SCALE, tl.pointer_type(tl.float32), ALIGNED) + blocks
        gradient = tl.load(address_of(entry, _GRADIENT, gradients_ptr.dtype, ALIGNED) + offsets, mask=inside, other=0.0)
        gradient = gradient.to(tl.float32)
        if scale_ptr is not None:
            gradient = tl.div_rn(gradient, scale)
        exp_avg = _load_moment(exp_avg_ptrs, exp_avg_scales, signed_ptr, inside, is_block)
        exp_avg_sq = _load_moment(exp_avg_sq_ptrs, exp_avg_sq_scales, unsigned_ptr, inside, is_block)
        exp_avg += share1 * (gradient - exp_avg)
        exp_avg_sq += share2 * (gradient * gradient - exp_avg_sq)
        _store_moment(exp_avg, exp_avg_ptrs, exp_avg_scales, signed_ptr, inside, is_block, True)
        _store_moment(exp_avg_sq, exp_avg_sq_ptrs, exp_avg_sq_scales, unsigned_ptr, inside, is_block, False)
        weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
        weight -= decay * weight
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2_sqrt) + eps
        weight -= tl.div_rn(lr * tl.div_rn(exp_avg, correction1), denominator)
        if ROUNDS:
            weight = round_at_random(weight, offsets, tl.load(steps_ptr + number), tl.load(entry + SEED))
        tl.store(weight_ptrs, weight.to(weights_ptr.dtype.element_ty), mask=inside)
