"""Updates of many weights by one launch: a table on the device of where they are, and of the chunks they consist of.

A row has a weight's step, size, first chunk and seed, and the addresses of the tensors that its update reads and
writes. A program updates a chunk of one weight, which it finds by its number. Weights that cannot be read 16 bytes at a
time have a launch of their own.

Step counts and the decision to skip are read from the device, so the host need not know them.
"""

from collections.abc import Callable, Sequence
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

# Columns of the table; from `TENSORS` on, addresses.
_STEP = tl.constexpr(0)
_NUMEL = tl.constexpr(1)
_FIRST_CHUNK = tl.constexpr(2)
SEED = tl.constexpr(3)
TENSORS = tl.constexpr(4)


class Tables:
    """The tables of a parameter group's updates, by the addresses of their tensors.

    Args:
        chunk: elements of a weight that one program updates.
        are_supported: whether a kernel takes the weights, gradients and state that it is called with.
    """

    def __init__(self, chunk: int, are_supported: Callable[..., bool]) -> None:
        self._chunk = chunk
        self._are_supported = are_supported
        self._tables: dict[tuple[int | torch.dtype, ...], WeightTable | None] = {}

    def __call__(
        self, steps: Sequence[Tensor], seeds: Sequence[int] | None, *lists: Sequence[Tensor]
    ) -> "WeightTable | None":
        """The table of these tensors, weights first; None if the kernel does not take them.

        Args:
            steps: updates before this one, float32 scalars.
            seeds: of rounding at random, below 2^31, always the same for a weight; None without.
            lists: weights, gradients and state, one tensor of each for every weight.
        """
        # What else lies at an address may change with a gradient's dtype.
        addresses = (*map(Tensor.data_ptr, chain(steps, *lists)), *(tensors[0].dtype for tensors in lists))
        if addresses not in self._tables:
            if len(self._tables) == _KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            is_taken = (
                all(step.dtype == torch.float32 for step in steps)
                and all(t.device == steps[0].device and t.is_contiguous() for t in chain(steps, *lists))
                and self._are_supported(*lists)
            )
            self._tables[addresses] = WeightTable(self._chunk, steps, seeds, *lists) if is_taken else None
        return self._tables[addresses]


class WeightTable:
    """Addresses and sizes on the device.

    Attributes:
        rows: of each weight, [weights, TENSORS + tensors of a weight].
        owners: the weight of each chunk, of aligned weights (True) and of the others (False).
    """

    def __init__(
        self, chunk: int, steps: Sequence[Tensor], seeds: Sequence[int] | None, *lists: Sequence[Tensor]
    ) -> None:
        rows: list[list[int]] = []
        chunks = torch.tensor([triton.cdiv(weight.numel(), chunk) for weight in lists[0]])
        aligned = []
        next_chunk = {True: 0, False: 0}
        for count, step, seed, *tensors in zip(chunks.tolist(), steps, seeds or [0] * len(steps), *lists, strict=True):
            addresses = [t.data_ptr() for t in tensors]
            numel = tensors[0].numel()
            is_aligned = numel % _ALIGNED_ELEMENTS == 0 and all(address % 16 == 0 for address in addresses)
            rows.append([step.data_ptr(), numel, next_chunk[is_aligned], seed, *addresses])
            aligned.append(is_aligned)
            next_chunk[is_aligned] += count
        device = steps[0].device
        self.rows = _on_device(torch.tensor(rows, dtype=torch.int64), device)
        self.owners: dict[bool, Tensor] = {}
        numbers, is_in = torch.arange(len(rows), dtype=torch.int32), torch.tensor(aligned)
        for is_aligned, count in next_chunk.items():
            if count > 0:
                owners = numbers.repeat_interleave(torch.where(is_in == is_aligned, chunks, 0))
                self.owners[is_aligned] = _on_device(owners, device)

    def count_step(self, betas: tuple[float, float], skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Counts this update unless it is skipped; returns t, 1 - b1^t and sqrt(1 - b2^t) of each weight."""
        count = len(self.rows)
        counts = torch.empty(count, dtype=torch.float32, device=self.rows.device)
        _count_kernel[(triton.cdiv(count, _COUNTED),)](
            self.rows, counts, skip, count, FIELDS=self.rows.shape[1], BLOCK=_COUNTED, num_warps=4
        )
        return counts, 1 - torch.pow(betas[0], counts), (1 - torch.pow(betas[1], counts)).sqrt_()


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _count_kernel(table_ptr, counts_ptr, skip_ptr, tensors, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    """The step of each weight, counted from 1, and the stored steps after it."""
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < tensors
    step_ptr = tl.load(table_ptr + number * FIELDS + _STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr, mask=inside, other=0.0) + 1.0
    tl.store(counts_ptr + number, step, mask=inside)
    if skip_ptr is not None:
        step -= tl.load(skip_ptr)
    tl.store(step_ptr, step, mask=inside)


@triton.jit
def chunk_of(
    table_ptr, owners_ptr, skip_ptr, FIELDS: tl.constexpr, CHUNK: tl.constexpr, MULTIPLE: tl.constexpr
):  # fmt: skip
    """The program's weight: its number and its row; where the chunk begins, and the weight's size, 0 if skipped.

    The size is a multiple of MULTIPLE, so that a mask of elements that exist is one for as many. (Said here: of what a
    function returns, Triton forgets what its caller adds.)
    """
    number = tl.load(owners_ptr + tl.program_id(0))
    entry = table_ptr + number * FIELDS
    begin = (tl.program_id(0) - tl.load(entry + _FIRST_CHUNK).to(tl.int32)) * CHUNK
    numel = tl.load(entry + _NUMEL).to(tl.int32)
    if skip_ptr is not None:
        numel = tl.where(tl.load(skip_ptr) == 1.0, 0, numel)
    numel = tl.multiple_of(numel, MULTIPLE)
    return number, entry, begin, numel


@triton.jit
def address_of(entry, TENSOR: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """The first element of a tensor of the row; KIND is the type of pointers to it."""
    first = tl.load(entry + TENSORS + TENSOR).to(KIND)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    return first
