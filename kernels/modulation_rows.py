"""Modulation rows inside kernels: picking a token's row, and reducing the gradients of rows without atomics.

A row of a sample is `table [D] + embedding [B, K, D]`, and each token names one of the K by its index. A program walks
over consecutive tokens of one sample in runs of equal index, which neighbours nearly always have, and keeps the row of
the run in registers. The loop over a run has no branches, so that the compiler can fetch coming tokens ahead.

Row gradients are sums over tokens. Each program accumulates those of a run in float32 registers and then adds them to
a slot of its own: partial sums [B, programs, K, n, D]. A bit per slot says whether it was written, so that nothing
needs clearing. A second small kernel adds the programs in a fixed order: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.launches import runnable

# Partial sums are added in blocks of so many programs and columns. Narrow columns: there must be enough of them to fill
# the device, and each should fetch all that it adds at once.
SUM_PROGRAMS = 64
SUM_WIDTH = 16


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
def sum_over_programs(
    slots_ptr, written_ptr, first, last, stride, k, cols, inside,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum [BLOCK_WIDTH] of the slots of programs `first` to `last`, `stride` apart, or of those with bit k written."""
    # One sum per lane and program of a block; adding them up, where threads wait for each other, is left to the end.
    sums = tl.zeros([BLOCK_PROGRAMS, BLOCK_WIDTH], tl.float32)
    for start in tl.range(first, last, BLOCK_PROGRAMS, num_stages=3):
        program = start + tl.arange(0, BLOCK_PROGRAMS)
        is_written = program < last
        if MASKED:
            is_written &= ((tl.load(written_ptr + program, mask=is_written, other=0) >> k) & 1) != 0
        sums += tl.load(
            slots_ptr + program[:, None] * stride + cols[None, :],
            mask=is_written[:, None] & inside[None, :],
            other=0.0,
        )
    return tl.sum(sums, 0)


@triton.jit
def _sum_partials_kernel(
    partial_ptr,
    written_ptr,
    rows_ptr,
    table_ptr,
    batch,
    programs,
    K,
    width,
    BLOCK_PROGRAMS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    of_table = tl.zeros([BLOCK_WIDTH], tl.float32)
    for row in range(0, batch * K):
        sample = row // K
        k = row % K
        of_row = sum_over_programs(
            partial_ptr + (sample * programs * K + k) * width, written_ptr + sample * programs, 0, programs, K * width,
            k, cols, inside, BLOCK_PROGRAMS, BLOCK_WIDTH, MASKED,
        )  # fmt: skip
        tl.store(rows_ptr + row * width + cols, of_row.to(rows_ptr.dtype.element_ty), mask=inside)
        of_table += of_row
    tl.store(table_ptr + cols, of_table.to(table_ptr.dtype.element_ty), mask=inside)


def sum_partials(
    partial: Tensor, written: Tensor | None, rows_dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Adds partial sums over programs, in float32, to the gradients of embeddings and tables in their own dtypes.

    Args:
        partial: [B, programs, K, n, D] float32; slots that were not written hold anything.
        written: [B, programs] int32, bit k set where slot k was written; None where all were.
        rows_dtype: of the embeddings.
        table_dtype: of the tables.

    Returns:
        Per sample and row [B, K, n, D], and in all [n, D].
    """
    batch, programs, k, n, width = partial.shape
    rows = partial.new_empty((batch, k, n, width), dtype=rows_dtype)
    table = partial.new_empty((n, width), dtype=table_dtype)
    runnable(_sum_partials_kernel, partial)[(triton.cdiv(n * width, SUM_WIDTH),)](
        partial,
        partial if written is None else written,
        rows,
        table,
        batch,
        programs,
        k,
        n * width,
        min(SUM_PROGRAMS, triton.next_power_of_2(programs)),
        SUM_WIDTH,
        written is not None,
        num_warps=4,
    )
    return rows, table
