"""AdamW's update of many weights at once, such as a rank's shards of a whole model.

    G <- G / scale                              a clip factor, as its reciprocal
    M <- b1 M + (1 - b1) G                      V <- b2 V + (1 - b2) G^2
    W <- (1 - lr wd) W - lr / (1 - b1^t) M / (sqrt(V) / sqrt(1 - b2^t) + eps)

torch's fused update does the same, in launches of a hundred tensors or so, and stores the scaled gradients. Here one
launch takes all weights of a parameter group and reads their gradients only. A table on the device holds each weight's
addresses and size; a program updates a chunk of one weight, which it finds by its number. Weights that cannot be read
16 bytes at a time have a launch of their own.

The operations are those of torch's fused update on a GPU (2.13), in its order: float32, fused multiply-adds where it
has them, correctly rounded divisions and roots, where Triton's defaults are approximations. torch itself computes the
powers of the betas.

Step counts and the decision to skip are read from the device, so the host need not know them.

Bytes: 28 for each float32 weight (gradient, weight and both moments are read, all but the gradient are written), 14 for
each bfloat16 one. 2.32 billion float32 weights in 1,032 tensors: 16.1 ms, 4.0 TB/s, where torch takes 19.1 and
stores scaled gradients in 4.2 more; H200, torch 2.11.0 (docs/benchmarks/adamw.jsonl).
"""

from collections.abc import Sequence
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

# Weights whose steps one program counts.
_COUNTED = 256
# Addresses of gradients recur: the allocator returns the same ones, and CUDA graphs of micro-steps keep theirs.
_KEPT_TABLES = 32
# Elements of 16 bytes, by which aligned weights are loaded: 8 in bfloat16.
_ALIGNED_ELEMENTS = 8
_DTYPES = (torch.bfloat16, torch.float32)
# Offsets are 32-bit numbers, up to a chunk beyond the end.
_MOST_ELEMENTS = 2**30

# Columns of the table.
_WEIGHT = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_EXP_AVG = tl.constexpr(2)
_EXP_AVG_SQ = tl.constexpr(3)
_STEP = tl.constexpr(4)
_NUMEL = tl.constexpr(5)
_FIRST_CHUNK = tl.constexpr(6)
_FIELDS = tl.constexpr(7)


class Updater:
    """Updates weights of one parameter group after the other; remembers where their tensors are.

    Args:
        chunk: elements of a weight that one program updates.
        block: elements of them that it holds in registers at a time.
        warps: of a program.
    """

    def __init__(self, *, chunk: int = 1 << 12, block: int = 2048, warps: int = 8) -> None:
        self._shape = chunk, block, warps
        self._tables: dict[tuple[int, ...], _Table | None] = {}

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

        Returns:
            Whether the kernels take these tensors; if not, nothing has changed.
        """
        lists = weights, gradients, exp_avgs, exp_avg_sqs, steps
        addresses = tuple(map(Tensor.data_ptr, chain(*lists)))
        if addresses not in self._tables:
            if len(self._tables) == _KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[addresses] = _Table(self._shape[0], *lists) if _are_supported(*lists) else None
        table = self._tables[addresses]
        if table is None:
            return False
        like = weights[0], gradients[0], exp_avgs[0]
        count, chunk, block, warps = len(weights), *self._shape
        counts = torch.empty(count, dtype=torch.float32, device=weights[0].device)
        _count_kernel[(triton.cdiv(count, _COUNTED),)](table.rows, counts, skip, count, BLOCK=_COUNTED, num_warps=4)
        corrections = 1 - torch.pow(betas[0], counts), (1 - torch.pow(betas[1], counts)).sqrt_()
        for is_aligned, owners in table.owners.items():
            _update_kernel[(len(owners),)](
                table.rows, owners, *corrections, scale, skip, *like, lr, *betas, eps, weight_decay,
                CHUNK=chunk, BLOCK=block, ALIGNED=is_aligned, num_warps=warps,
            )  # fmt: skip
        # Autograd cannot see that they have changed.
        torch.autograd.graph.increment_version(weights)
        return True


def _are_supported(*lists: Sequence[Tensor]) -> bool:
    *values, steps = lists
    same = all(
        t.dtype == tensors[0].dtype and t.is_contiguous() and t.numel() <= _MOST_ELEMENTS
        for tensors in values
        for t in tensors
    )
    # The moments' dtype is one, not two.
    dtypes = [tensors[0].dtype for tensors in values]
    return (
        same
        and set(dtypes) <= set(_DTYPES)
        and dtypes[2] == dtypes[3]
        and all(step.dtype == torch.float32 for step in steps)
        and all(t.device == steps[0].device for t in chain(*lists))
    )


class _Table:
    """Addresses and sizes on the device.

    Attributes:
        rows: of each weight [weights, _FIELDS].
        owners: the weight of each chunk, of aligned weights (True) and of the others (False).
    """

    def __init__(
        self,
        chunk: int,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
    ) -> None:
        rows: list[list[int]] = []
        chunks = torch.tensor([triton.cdiv(weight.numel(), chunk) for weight in weights])
        aligned = []
        next_chunk = {True: 0, False: 0}
        for count, step, *tensors in zip(
            chunks.tolist(), steps, weights, gradients, exp_avgs, exp_avg_sqs, strict=True
        ):
            addresses = [t.data_ptr() for t in tensors]
            numel = tensors[0].numel()
            is_aligned = numel % _ALIGNED_ELEMENTS == 0 and all(address % 16 == 0 for address in addresses)
            rows.append([*addresses, step.data_ptr(), numel, next_chunk[is_aligned]])
            aligned.append(is_aligned)
            next_chunk[is_aligned] += count
        device = weights[0].device
        self.rows = _on_device(torch.tensor(rows, dtype=torch.int64), device)
        self.owners: dict[bool, Tensor] = {}
        numbers, is_in = torch.arange(len(rows), dtype=torch.int32), torch.tensor(aligned)
        for is_aligned, count in next_chunk.items():
            if count > 0:
                owners = numbers.repeat_interleave(torch.where(is_in == is_aligned, chunks, 0))
                self.owners[is_aligned] = _on_device(owners, device)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _count_kernel(table_ptr, counts_ptr, skip_ptr, tensors, BLOCK: tl.constexpr):
    """The step of each weight, counted from 1, and the stored steps after it."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < tensors
    step_ptr = tl.load(table_ptr + number * _FIELDS + _STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
    tl.store(counts_ptr + number, step, mask=inside)
    if skip_ptr is not None:
        step -= tl.load(skip_ptr)
    tl.store(step_ptr, step, mask=inside)


@triton.jit
def _pointers(entry, FIELD: tl.constexpr, like_ptr, offsets, ALIGNED: tl.constexpr):
    first = tl.load(entry + FIELD).to(like_ptr.dtype)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first + offsets


@triton.jit
def _update_kernel(
    table_ptr, owners_ptr, first_ptr, second_ptr, scale_ptr, skip_ptr, weights_ptr, gradients_ptr, moments_ptr,
    lr, beta1, beta2, eps, weight_decay,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    number = tl.load(owners_ptr + tl.program_id(0))
    entry = table_ptr + number * _FIELDS
    begin = (tl.program_id(0) - tl.load(entry + _FIRST_CHUNK).to(tl.int32)) * CHUNK
    numel = tl.load(entry + _NUMEL).to(tl.int32)
    if skip_ptr is not None:
        numel = tl.where(tl.load(skip_ptr) == 1.0, 0, numel)
    if ALIGNED:
        # So that a mask of elements that exist is one for 16 bytes.
        numel = tl.multiple_of(numel, 8)
    correction1 = tl.load(first_ptr + number)
    correction2_sqrt = tl.load(second_ptr + number)
    step_size = tl.div_rn(lr, correction1)
    decay = lr * weight_decay
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    for start in range(0, tl.minimum(numel - begin, CHUNK), BLOCK):
        offsets = begin + start + tl.arange(0, BLOCK)
        inside = offsets < numel
        weight_ptrs = _pointers(entry, _WEIGHT, weights_ptr, offsets, ALIGNED)
        exp_avg_ptrs = _pointers(entry, _EXP_AVG, moments_ptr, offsets, ALIGNED)
        exp_avg_sq_ptrs = _pointers(entry, _EXP_AVG_SQ, moments_ptr, offsets, ALIGNED)
        gradient_ptrs = _pointers(entry, _GRADIENT, gradients_ptr, offsets, ALIGNED)
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
        tl.store(weight_ptrs, weight.to(weights_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_ptrs, exp_avg.to(moments_ptr.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq_ptrs, exp_avg_sq.to(moments_ptr.dtype.element_ty), mask=inside)
