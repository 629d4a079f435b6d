"""Adafactor's update of many whole weights at once, such as those of a transformer block.

    R <- R + s (mean_row(G^2) - R)      C <- C + s (mean_column(G^2) - C)      s = t^-0.8
    U = G / sqrt(max(R C / mean(R), 1e-30))                                    vectors: R / mean(R) = 1
    W <- (1 - lr wd) W - min(lr, 1 / sqrt(t)) max(1e-3, rms(W)) U / max(1, rms(U))

In PyTorch each of thousands of weights takes dozens of launches and float32 copies of itself. Here a group of weights
takes five launches, and nothing of a weight's size is allocated. A table on the device holds each weight's addresses
and sizes; a program finds its weight by its number.

    sums        partial sums of G^2 over rows and columns of a tile, and of W^2
    averages    R and C; partial sums of R
    clipping    partial sums of U^2
    sizes       the factor of U of each weight; t <- t + 1
    apply       W, with stochastic rounding if it is bfloat16

Sums are added in a fixed order, without atomics: the same bits in every run. Step, learning rate and with them the
random numbers are read from the device, so that the launches can be part of a CUDA graph.

Bytes: G is read three times, W twice, and W is written: 12 for each bfloat16 weight.

A block of LTX-2.3, 387 M weights in 86 tensors, bfloat16: 2.24 ms as a CUDA graph, 3.96 ms eager, 89.8 ms in PyTorch;
H100 80GB HBM3, torch 2.11.0, triton 3.6.0 (docs/benchmarks/adafactor.jsonl). Over several ranks PyTorch updates shards
(ltx_titan/optim/adafactor.py, the same formula).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.formulas import ADAFACTOR_DECAY, SMALLEST_RMS, SMALLEST_VARIANCE
from ltx_titan_kernels.stochastic import round_at_random

# Elements of a tile, held in the registers of one program.
_TILE_ROWS = tl.constexpr(64)
_TILE_COLUMNS = tl.constexpr(128)
# Rows or columns whose averages one program computes, and partial sums that it loads at a time.
_CHUNK = tl.constexpr(128)
_PARTS = tl.constexpr(32)
# Partial sums over tiles that the program of a weight loads at a time.
_BLOCK = tl.constexpr(1024)
_WARPS = 8
# Tables of a group that are kept, since CUDA graphs read them: which weights have gradients depends on the batch.
_KEPT_TABLES = 32

# Columns of the table.
_WEIGHT = tl.constexpr(0)
_GRADIENT = tl.constexpr(1)
_ROW_VAR = tl.constexpr(2)
_COL_VAR = tl.constexpr(3)
_STEP = tl.constexpr(4)
_LR = tl.constexpr(5)
_ROWS = tl.constexpr(6)
_COLUMNS = tl.constexpr(7)
_FIRST_TILE = tl.constexpr(8)
_FIRST_ROW_CHUNK = tl.constexpr(9)
_FIRST_COLUMN_CHUNK = tl.constexpr(10)
_ROW_PARTS = tl.constexpr(11)
_COLUMN_PARTS = tl.constexpr(12)
_WEIGHT_PARTS = tl.constexpr(13)
_CLIP_PARTS = tl.constexpr(14)
_MEAN_PARTS = tl.constexpr(15)
_SEED = tl.constexpr(16)
_FIELDS = tl.constexpr(17)


@dataclass(frozen=True)
class Update:
    """One weight and what its update reads and writes.

    Attributes:
        weight: [N, K] or [K], bfloat16 or float32, contiguous, whole.
        gradient: of the same shape.
        row_var: averages [N, 1] float32; None for a vector.
        col_var: averages [1, K] float32, or [K] for a vector.
        step: updates before this one, a float32 scalar on the device.
        lr: learning rate, a float32 scalar on the device.
        weight_decay: as in AdamW.
        seed: of stochastic rounding, 31 bits.
    """

    weight: Tensor
    gradient: Tensor
    row_var: Tensor | None
    col_var: Tensor
    step: Tensor
    lr: Tensor
    weight_decay: float
    seed: int


def is_supported(weight: Tensor, gradient: Tensor) -> bool:
    """Whether the kernels take a weight: a vector or matrix whose rows can be read 16 bytes at a time."""
    # Offsets are 32-bit numbers.
    if not 1 <= weight.ndim <= 2 or not 0 < weight.numel() < 2**31:
        return False
    tensors = (weight, gradient)
    return weight.shape[-1] % 8 == 0 and all(
        t.dtype in (torch.bfloat16, torch.float32) and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors
    )


class Updater:
    """Updates groups of weights, all of one dtype, as are their gradients; remembers where their tensors are.

    Args:
        stochastic_rounding: of bfloat16 weights; otherwise to the nearest value.
    """

    def __init__(self, *, stochastic_rounding: bool) -> None:
        self._stochastic_rounding = stochastic_rounding
        self._tables: dict[tuple[int, ...], _Table] = {}

    def __call__(self, updates: Sequence[Update]) -> None:
        """Updates the weights, their averages and steps in place.

        Raises:
            RuntimeError: a tensor has moved while a CUDA graph is recorded.
        """
        # FSDP2 reduces the gradients of a block into one tensor, so that their distances are the same in every step.
        base = min((update.gradient for update in updates), key=Tensor.data_ptr)
        start, size = base.data_ptr(), base.element_size()
        addresses = tuple(
            address
            for u in updates
            for address in (
                u.weight.data_ptr(),
                u.gradient.data_ptr() - start,
                0 if u.row_var is None else u.row_var.data_ptr(),
                u.col_var.data_ptr(),
                u.step.data_ptr(),
                u.lr.data_ptr(),
            )
        )
        table = self._tables.get(addresses)
        if table is None:
            if base.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError("Adafactor: a weight, gradient or average has moved since the last step.")
            if len(self._tables) == _KEPT_TABLES:
                del self._tables[next(iter(self._tables))]
            table = self._tables[addresses] = _Table(updates, start, size)
        table.launch(base, updates[0].weight, self._stochastic_rounding)


class _Table:
    """Addresses and sizes of a group on the device, and the shape of its launches."""

    def __init__(self, updates: Sequence[Update], start: int, size: int) -> None:
        device = updates[0].weight.device
        tiles: list[int] = []  # of each weight
        chunks: list[int] = []
        rows_of_table: list[list[int]] = []
        self.scratch = len(updates)  # floats: first the sizes
        self.mean_parts = 1
        for number, u in enumerate(updates):
            columns = u.weight.shape[-1]
            rows = u.weight.numel() // columns
            tile_rows, tile_columns = triton.cdiv(rows, _TILE_ROWS.value), triton.cdiv(columns, _TILE_COLUMNS.value)
            count = tile_rows * tile_columns
            # A vector has no averages of rows.
            row_chunks = 0 if u.row_var is None else triton.cdiv(rows, _CHUNK.value)
            row_parts = self.scratch
            column_parts = row_parts + rows * tile_columns
            weight_parts = column_parts + columns * tile_rows
            clip_parts = weight_parts + count
            mean_parts = clip_parts + count
            self.scratch = mean_parts + row_chunks
            self.mean_parts = max(self.mean_parts, row_chunks)
            row_var = 0 if u.row_var is None else u.row_var.data_ptr()
            entry = [u.weight.data_ptr(), (u.gradient.data_ptr() - start) // size, row_var, u.col_var.data_ptr()]
            entry += [u.step.data_ptr(), u.lr.data_ptr(), rows, columns]
            entry += [sum(tiles), len(chunks), len(chunks) + row_chunks]
            rows_of_table.append([*entry, row_parts, column_parts, weight_parts, clip_parts, mean_parts, u.seed])
            tiles.append(count)
            # Even numbers are chunks of rows, odd ones of columns.
            chunks += [2 * number] * row_chunks + [2 * number + 1] * triton.cdiv(columns, _CHUNK.value)
        self.table = _on_device(torch.tensor(rows_of_table, dtype=torch.int64), device)
        owners = torch.arange(len(tiles), dtype=torch.int32).repeat_interleave(torch.tensor(tiles))
        self.tiles = _on_device(owners, device)
        self.chunks = _on_device(torch.tensor(chunks, dtype=torch.int32), device)
        self.decay = _on_device(torch.tensor([u.weight_decay for u in updates], dtype=torch.float32), device)

    def launch(self, gradients: Tensor, weights: Tensor, stochastic_rounding: bool) -> None:
        scratch = torch.empty(self.scratch, dtype=torch.float32, device=weights.device)
        rounds = stochastic_rounding and weights.dtype == torch.bfloat16
        means = {"MEAN_PARTS": triton.next_power_of_2(self.mean_parts)}
        tiles, chunks = (len(self.tiles),), (len(self.chunks),)
        _sums_kernel[tiles](self.table, self.tiles, gradients, weights, scratch, num_warps=_WARPS)
        _averages_kernel[chunks](self.table, self.chunks, scratch, ADAFACTOR_DECAY, num_warps=4)
        _clipping_kernel[tiles](
            self.table, self.tiles, gradients, scratch, SMALLEST_VARIANCE, **means, num_warps=_WARPS
        )
        _sizes_kernel[(len(self.table),)](self.table, scratch, SMALLEST_RMS, num_warps=4)
        _apply_kernel[tiles](
            self.table, self.tiles, gradients, weights, self.decay, scratch, SMALLEST_VARIANCE,
            ROUNDS=rounds, **means, num_warps=_WARPS,
        )  # fmt: skip


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    # From pinned memory, so that the host does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@triton.jit
def _tile_of(table_ptr, tiles_ptr):
    """The program's weight, its number, and the rows and columns of its tile."""
    number = tl.load(tiles_ptr + tl.program_id(0))
    entry = table_ptr + number * _FIELDS
    columns = tl.load(entry + _COLUMNS).to(tl.int32)
    tile = tl.program_id(0) - tl.load(entry + _FIRST_TILE).to(tl.int32)
    across = tl.cdiv(columns, _TILE_COLUMNS)
    row = tile // across * _TILE_ROWS + tl.arange(0, _TILE_ROWS)
    column = tile % across * _TILE_COLUMNS + tl.arange(0, _TILE_COLUMNS)
    return entry, number, tile, row, column


@triton.jit
def _offsets_of(entry, row, column):
    """Offsets of a tile's elements, and which of them exist; both tell the compiler that rows are aligned."""
    rows = tl.load(entry + _ROWS).to(tl.int32)
    columns = tl.multiple_of(tl.load(entry + _COLUMNS).to(tl.int32), 8)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return row[:, None] * columns + column[None, :], inside


@triton.jit
def _address(entry, FIELD: tl.constexpr, like_ptr):
    return tl.multiple_of(tl.load(entry + FIELD).to(like_ptr.dtype), 16)


@triton.jit
def _gradient_of(entry, gradients_ptr, offsets, inside):
    first = tl.multiple_of(tl.load(entry + _GRADIENT), 8)
    return tl.load(gradients_ptr + first + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums_kernel(
    table_ptr, tiles_ptr, gradients_ptr, weights_ptr, scratch_ptr,
):  # fmt: skip
    entry, _, tile, row, column = _tile_of(table_ptr, tiles_ptr)
    offsets, inside = _offsets_of(entry, row, column)
    gradient = _gradient_of(entry, gradients_ptr, offsets, inside)
    weight = tl.load(_address(entry, _WEIGHT, weights_ptr) + offsets, mask=inside, other=0.0).to(tl.float32)
    squares = gradient * gradient
    rows, columns = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS)
    across = tl.cdiv(columns, _TILE_COLUMNS)
    # [tiles across, rows] and [tiles down, columns], so that both are added over their first dim.
    row_parts = scratch_ptr + tl.load(entry + _ROW_PARTS) + (tile % across) * rows
    column_parts = scratch_ptr + tl.load(entry + _COLUMN_PARTS) + (tile // across) * columns
    tl.store(row_parts + row, tl.sum(squares, 1), mask=row < rows)
    tl.store(column_parts + column, tl.sum(squares, 0), mask=column < columns)
    tl.store(scratch_ptr + tl.load(entry + _WEIGHT_PARTS) + tile, tl.sum(weight * weight))


@triton.jit
def _averages_kernel(table_ptr, chunks_ptr, scratch_ptr, decay):
    number = tl.load(chunks_ptr + tl.program_id(0))
    is_columns = number % 2 == 1
    entry = table_ptr + number // 2 * _FIELDS
    rows, columns = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS)
    length = tl.where(is_columns, columns, rows)
    summed = tl.where(is_columns, rows, columns)
    # As many partial sums as there are tiles in the other direction.
    parts = tl.where(is_columns, tl.cdiv(rows, _TILE_ROWS), tl.cdiv(columns, _TILE_COLUMNS)).to(tl.int32)
    first = tl.load(entry + tl.where(is_columns, _FIRST_COLUMN_CHUNK, _FIRST_ROW_CHUNK)).to(tl.int32)
    parts_ptr = scratch_ptr + tl.load(entry + tl.where(is_columns, _COLUMN_PARTS, _ROW_PARTS))
    average_ptr = tl.load(entry + tl.where(is_columns, _COL_VAR, _ROW_VAR)).to(tl.pointer_type(tl.float32))
    chunk = tl.program_id(0) - first
    index = chunk * _CHUNK + tl.arange(0, _CHUNK)
    inside = index < length
    sums = tl.zeros([_PARTS, _CHUNK], tl.float32)
    for start in range(0, parts, _PARTS):
        part = start + tl.arange(0, _PARTS)
        mask = (part < parts)[:, None] & inside[None, :]
        sums += tl.load(parts_ptr + part[:, None] * length + index[None, :], mask=mask, other=0.0)
    step = tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32))) + 1.0
    share = tl.exp2(decay * tl.log2(step))
    average = tl.load(average_ptr + index, mask=inside, other=0.0)
    average += share * (tl.sum(sums, 0) / summed.to(tl.float32) - average)
    tl.store(average_ptr + index, average, mask=inside)
    if not is_columns:
        tl.store(scratch_ptr + tl.load(entry + _MEAN_PARTS) + chunk, tl.sum(tl.where(inside, average, 0.0)))


@triton.jit
def _normalized(entry, scratch_ptr, gradient, row, column, smallest, MEAN_PARTS: tl.constexpr):
    """The update of a tile before its size: the gradient divided by the root of its average square."""
    rows, columns = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS)
    row_ptr = tl.load(entry + _ROW_VAR)
    is_matrix = row_ptr != 0
    part = tl.arange(0, MEAN_PARTS)
    parts = scratch_ptr + tl.load(entry + _MEAN_PARTS) + part
    mean = tl.sum(tl.load(parts, mask=is_matrix & (part < tl.cdiv(rows, _CHUNK)), other=0.0)) / rows.to(tl.float32)
    mean = tl.where(is_matrix, tl.maximum(mean, smallest), 1.0)
    row_var = tl.load(row_ptr.to(tl.pointer_type(tl.float32)) + row, mask=is_matrix & (row < rows), other=1.0)
    col_ptr = tl.load(entry + _COL_VAR).to(tl.pointer_type(tl.float32))
    col_var = tl.load(col_ptr + column, mask=column < columns, other=1.0)
    # Divided first: the product of two small averages could underflow.
    variance = (row_var / mean)[:, None] * col_var[None, :]
    return gradient * tl.rsqrt(tl.maximum(variance, smallest))


@triton.jit
def _clipping_kernel(
    table_ptr, tiles_ptr, gradients_ptr, scratch_ptr, smallest,
    MEAN_PARTS: tl.constexpr,
):  # fmt: skip
    entry, _, tile, row, column = _tile_of(table_ptr, tiles_ptr)
    offsets, inside = _offsets_of(entry, row, column)
    gradient = _gradient_of(entry, gradients_ptr, offsets, inside)
    update = _normalized(entry, scratch_ptr, gradient, row, column, smallest, MEAN_PARTS)
    tl.store(scratch_ptr + tl.load(entry + _CLIP_PARTS) + tile, tl.sum(update * update))


@triton.jit
def _sizes_kernel(table_ptr, scratch_ptr, smallest_rms):
    number = tl.program_id(0)
    entry = table_ptr + number * _FIELDS
    rows, columns = tl.load(entry + _ROWS), tl.load(entry + _COLUMNS)
    tiles = (tl.cdiv(rows, _TILE_ROWS) * tl.cdiv(columns, _TILE_COLUMNS)).to(tl.int32)
    weight_parts = scratch_ptr + tl.load(entry + _WEIGHT_PARTS)
    clip_parts = scratch_ptr + tl.load(entry + _CLIP_PARTS)
    weights = tl.zeros([_BLOCK], tl.float32)
    updates = tl.zeros([_BLOCK], tl.float32)
    for start in range(0, tiles, _BLOCK):
        tile = start + tl.arange(0, _BLOCK)
        weights += tl.load(weight_parts + tile, mask=tile < tiles, other=0.0)
        updates += tl.load(clip_parts + tile, mask=tile < tiles, other=0.0)
    elements = (rows * columns).to(tl.float32)
    weight_rms = tl.sqrt(tl.sum(weights) / elements)
    update_rms = tl.sqrt(tl.sum(updates) / elements)
    step_ptr = tl.load(entry + _STEP).to(tl.pointer_type(tl.float32))
    step = tl.load(step_ptr) + 1.0
    lr = tl.load(tl.load(entry + _LR).to(tl.pointer_type(tl.float32)))
    # Steps relative to the weight's own scale, with the update clipped to an RMS of 1.
    size = tl.minimum(lr, tl.rsqrt(step)) * tl.maximum(weight_rms, smallest_rms) / tl.maximum(update_rms, 1.0)
    tl.store(scratch_ptr + number, size)
    tl.store(step_ptr, step)


@triton.jit
def _apply_kernel(
    table_ptr, tiles_ptr, gradients_ptr, weights_ptr, decay_ptr, scratch_ptr, smallest,
    ROUNDS: tl.constexpr, MEAN_PARTS: tl.constexpr,
):  # fmt: skip
    entry, number, _, row, column = _tile_of(table_ptr, tiles_ptr)
    offsets, inside = _offsets_of(entry, row, column)
    gradient = _gradient_of(entry, gradients_ptr, offsets, inside)
    update = _normalized(entry, scratch_ptr, gradient, row, column, smallest, MEAN_PARTS)
    weight_ptrs = _address(entry, _WEIGHT, weights_ptr) + offsets
    lr = tl.load(tl.load(entry + _LR).to(tl.pointer_type(tl.float32)))
    weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    weight = weight * (1.0 - lr * tl.load(decay_ptr + number)) - update * tl.load(scratch_ptr + number)
    if ROUNDS:
        step = tl.load(tl.load(entry + _STEP).to(tl.pointer_type(tl.float32)))
        weight = round_at_random(weight, offsets, step, tl.load(entry + _SEED))
    tl.store(weight_ptrs, weight.to(weights_ptr.dtype.element_ty), mask=inside)
