"""Modulation rows inside kernels: picking a token's row, and reducing the gradients of rows without atomics.

A row of a sample is `table [D] + embedding [B, K, D]`, and each token names one of the K by its index. A program walks
over consecutive tokens of one sample in runs of equal index, which neighbours nearly always have, and keeps the row of
the run in registers. The loop over a run has no branches, so that the compiler can fetch coming tokens ahead.

Row gradients are sums over tokens. Each program accumulates those of a run in float32 registers and then adds them to
a slot of its own: partial sums [B, programs, K, n, D]. A bit per slot says whether it was written, so that nothing
needs clearing. A second small kernel adds the programs in a fixed order: no atomics, the same bits on every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# One bit per row in an int32; a sample of a training batch has one or two distinct timesteps.
MAX_ROWS = 31
# A row lives in the registers of one program.
MAX_WIDTH = 16384
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Few tokens (audio): fewer programs, so that the partial sums stay small beside the tensors themselves.
_LEAST_TOKENS = 4


@dataclass(frozen=True)
class Launch:
    """How a kernel is spread over the device.

    Attributes:
        warps: warps per program; a program holds whole rows.
        programs: programs per multiprocessor.
        stages: depth of the prefetch of coming tokens; 1 has none.
    """

    warps: int
    programs: int
    stages: int


@dataclass(frozen=True)
class Walk:
    """Division of [B, S] tokens over programs: `programs` per sample, `tokens` consecutive tokens each."""

    programs: int
    tokens: int


def divide_tokens(x: Tensor, programs_per_multiprocessor: int) -> Walk:
    """Spreads the tokens of `x` [B, S, D] evenly over about as many programs as the device runs at once."""
    batch, tokens = x.shape[:2]
    wanted = max(1, _multiprocessors(x.device) * programs_per_multiprocessor // batch)
    each = max(min(_LEAST_TOKENS, tokens), triton.cdiv(tokens, wanted))
    return Walk(triton.cdiv(tokens, each), each)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3  # the interpreter: enough to have several partial sums


def is_supported(x: Tensor, rows: Sequence[Tensor]) -> bool:
    """Whether the kernels take these tokens [B, S, D] and rows [B, K, D]."""
    return x.dtype in _DTYPES and x.shape[-1] <= MAX_WIDTH and all(row.shape[1] <= MAX_ROWS for row in rows)


def with_unit_stride(x: Tensor) -> Tensor:
    """`x` itself where its channels are adjacent, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_equal_strides(rows: Sequence[Tensor]) -> list[Tensor]:
    """Rows [B, K, D] with the same strides, adjacent channels; copied only where they differ."""
    if all(row.stride() == rows[0].stride() and row.stride(-1) == 1 for row in rows):
        return list(rows)
    return [row.contiguous() for row in rows]


@triton.jit
def load_row(row_ptr, table_ptr, offset, cols, inside):
    """Table + embedding of one row in float32, 0 beyond the width."""
    row = tl.load(row_ptr + offset + cols, mask=inside, other=0.0).to(tl.float32)
    return row + tl.load(table_ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_indices(index_ptr, first, last, BLOCK_TOKENS: tl.constexpr):
    """The numbers of a program's tokens and which row each has, -1 beyond the last."""
    token = first + tl.arange(0, BLOCK_TOKENS)
    return token, tl.load(index_ptr + token, mask=token < last, other=-1).to(tl.int32)


@triton.jit
def run_at(token, index, start, last):
    """The row of the run that begins at `start`, and where the run ends."""
    k = tl.sum(tl.where(token == start, index, 0), 0)
    return k, tl.min(tl.where((token > start) & (index != k), tl.minimum(token, last), last), 0)


@triton.jit
def store_partial(slot_ptr, value, cols, inside, is_written):
    """Writes a partial sum to its slot, or adds it to what this program has written there before."""
    if is_written:
        # Another thread of this program may have written the element that this one reads.
        tl.debug_barrier()
        value += tl.load(slot_ptr + cols, mask=inside, other=0.0)
    tl.store(slot_ptr + cols, value, mask=inside)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,
    written_ptr,
    out_ptr,
    programs,
    K,
    width,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    batch = tl.program_id(1) // K
    k = tl.program_id(1) % K
    cols = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    total = tl.zeros([BLOCK_WIDTH], tl.float32)
    for start in range(0, programs, BLOCK_PROGRAMS):
        program = start + tl.arange(0, BLOCK_PROGRAMS)
        written = tl.load(written_ptr + batch * programs + program, mask=program < programs, other=0)
        is_written = ((written >> k) & 1) != 0
        slots = ((batch * programs + program) * K + k) * width
        values = tl.load(
            partial_ptr + slots[:, None] + cols[None, :], mask=is_written[:, None] & inside[None, :], other=0.0
        )
        total += tl.sum(values, 0)
    tl.store(out_ptr + (batch * K + k) * width + cols, total, mask=inside)


def sum_partials(partial: Tensor, written: Tensor) -> Tensor:
    """Adds partial sums over programs.

    Args:
        partial: [B, programs, K, n, D] float32; slots that were not written hold anything.
        written: [B, programs] int32, bit k set where slot k was written.

    Returns:
        [B, K, n, D] float32.
    """
    batch, programs, k, n, width = partial.shape
    out = partial.new_empty(batch, k, n, width)
    block_width = 128
    grid = (triton.cdiv(n * width, block_width), batch * k)
    _sum_partials_kernel[grid](partial, written, out, programs, k, n * width, 32, block_width, num_warps=4)
    return out
