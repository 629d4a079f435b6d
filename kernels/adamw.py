"""AdamW's update of many weights at once, such as a rank's shards of a whole model.

    G <- G / scale                              a clip factor, as its reciprocal
    M <- b1 M + (1 - b1) G                      V <- b2 V + (1 - b2) G^2
    W <- (1 - lr wd) W - lr / (1 - b1^t) M / (sqrt(V) / sqrt(1 - b2^t) + eps)

torch's fused update does the same, in launches of a hundred tensors or so, and stores the scaled gradients. Here one
launch takes all weights of a parameter group (weight_table.py) and reads their gradients only.

The operations are those of torch's fused update on a GPU (2.13), in its order: float32, fused multiply-adds where it
has them, correctly rounded divisions and roots, where Triton's defaults are approximations. torch itself computes the
powers of the betas.

Bytes: 28 for each float32 weight (gradient, weight and both moments are read, all but the gradient are written), 14 for
each bfloat16 one. 2.32 billion float32 weights in 1,032 tensors: 16.1 ms, 4.0 TB/s, where torch takes 19.1 and
stores scaled gradients in 4.2 more; H200, torch 2.11.0 (docs/benchmarks/adamw.jsonl).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.stochastic import round_at_random
from ltx_titan_kernels.weight_table import SEED, Tables, address_of, chunk_of

_DTYPES = (torch.bfloat16, torch.float32)
# Offsets are 32-bit numbers, up to a chunk beyond the end.
_MOST_ELEMENTS = 2**30

# Tensors of a weight.
_WEIGHT = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)


class Updater:
    """Updates weights of one parameter group after the other; remembers where their tensors are.

    Args:
        chunk: elements of a weight that one program updates.
        block: elements of them that it holds in registers at a time.
        warps: of a program.
    """

    def __init__(self, *, chunk: int = 1 << 12, block: int = 2048, warps: int = 8) -> None:
        self._shape = chunk, block, warps
        self._tables = Tables(chunk, _are_supported)

    def __call__(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
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
            weights: plain tensors of one dtype, of any shape, also empty.
            gradients: of the same shapes, of one dtype.
            exp_avgs, exp_avg_sqs: moments, of the same shapes, of one dtype.
            steps: updates before this one, float32 scalars.
            lr, betas, eps, weight_decay: as in torch's AdamW.
            scale: divides the gradients, a float32 scalar on the device; None for 1.
            skip: 1.0 changes nothing, 0.0 updates; a float32 scalar on the device; None to update.
            seeds: round bfloat16 weights up or down at random (stochastic.py); below 2^31, always the same for a
                weight. None to round to nearest.

        Returns:
            Whether the kernels take these tensors; if not, nothing has changed.
        """
        table = self._tables(steps, seeds, weights, gradients, exp_avgs, exp_avg_sqs)
        if table is None:
            return False
        like = weights[0], gradients[0], exp_avgs[0]
        chunk, block, warps = self._shape
        counts = table.count_step(betas, skip)
        rounds = seeds is not None and weights[0].dtype == torch.bfloat16
        for is_aligned, owners in table.owners.items():
            _update_kernel[(len(owners),)](
                table.rows, owners, *counts, scale, skip, *like, lr, *betas, eps, weight_decay,
                FIELDS=table.rows.shape[1], CHUNK=chunk, BLOCK=block, ALIGNED=is_aligned, ROUNDS=rounds,
                num_warps=warps,
            )  # fmt: skip
        # Autograd cannot see that they have changed.
        torch.autograd.graph.increment_version(weights)
        return True


def _are_supported(*lists: Sequence[Tensor]) -> bool:
    same = all(t.dtype == tensors[0].dtype and t.numel() <= _MOST_ELEMENTS for tensors in lists for t in tensors)
    # The moments' dtype is one, not two.
    dtypes = [tensors[0].dtype for tensors in lists]
    return same and set(dtypes) <= set(_DTYPES) and dtypes[2] == dtypes[3]


@triton.jit
def _update_kernel(
    table_ptr, owners_ptr, steps_ptr, first_ptr, second_ptr, scale_ptr, skip_ptr, weights_ptr, gradients_ptr,
    moments_ptr, lr, beta1, beta2, eps, weight_decay,
    FIELDS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    # 16 bytes, in bfloat16.
    number, entry, begin, numel = chunk_of(table_ptr, owners_ptr, skip_ptr, FIELDS, CHUNK, 8 if ALIGNED else 1)
    correction1 = tl.load(first_ptr + number)
    correction2_sqrt = tl.load(second_ptr + number)
    step_size = tl.div_rn(lr, correction1)
    decay = lr * weight_decay
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    for start in range(0, tl.minimum(numel - begin, CHUNK), BLOCK):
        offsets = begin + start + tl.arange(0, BLOCK)
        inside = offsets < numel
        weight_ptrs = address_of(entry, _WEIGHT, weights_ptr.dtype, ALIGNED) + offsets
        exp_avg_ptrs = address_of(entry, _EXP_AVG, moments_ptr.dtype, ALIGNED) + offsets
        exp_avg_sq_ptrs = address_of(entry, _EXP_AVG_SQ, moments_ptr.dtype, ALIGNED) + offsets
        gradient_ptrs = address_of(entry, _GRADIENT, gradients_ptr.dtype, ALIGNED) + offsets
        gradient = tl.load(gradient_ptrs, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptrs, mask=inside, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptrs, mask=inside, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            gradient = tl.div_rn(gradient, scale)
        square = gradient * gradient
        weight = tl.fma(-decay, weight, weight)
        exp_avg = tl.fma(beta1, exp_avg, tl.fma(-beta1, gradient, gradient))
        exp_avg_sq = tl.fma(beta2, exp_avg_sq, tl.fma(-beta2, square, square))
        denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction2_sqrt) + eps
        weight -= tl.div_rn(step_size * exp_avg, denominator)
        if ROUNDS:
            weight = round_at_random(weight, offsets, tl.load(steps_ptr + number), tl.load(entry + SEED))
        tl.store(weight_ptrs, weight.to(weights_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_ptrs, exp_avg.to(moments_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq_ptrs, exp_avg_sq.to(moments_ptr.dtype.element_ty), mask=inside)
