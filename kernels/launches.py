"""Shared code of the kernels: launch shapes, persistent grid, modulation, sums without atomics, registration.

Persistent grid: about as many programs as the device runs at once. Each takes a tile, consecutive tokens of one
sample, so that modulation and weights are read once per program and sums over tokens stay in registers.

Modulation: a scale, shift or gate of a sample is `table [D] + embedding [B, K, D]`, and each token's `index` selects
one of the K timesteps. A program splits its tile into segments of equal timestep, which are long, because neighbors
nearly always have the same one, and keeps the segment's modulation in registers. The loop over a segment has no
branches, so that the compiler can prefetch the coming tokens.

Sums over tokens, for the gradients of modulation and weights: each program accumulates in float32 registers and stores
partials to a slot of its own. A second small kernel adds the slots in a fixed order: no atomics, the same bits in every
run. Slots are not cleared beforehand; one bit per timestep records which of them hold a partial.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ltx_titan_kernels.formulas import MAX_WIDTH, AdaLN

# One bit per timestep in an int32; a sample of a training batch has one or two distinct timesteps.
MAX_TIMESTEPS = 31
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program reads modulation and weights once; with fewer tokens they would cost as much as the tokens. If there are
# fewer tokens than multiprocessors (audio), each gets a program.
_MIN_TOKENS = 4
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Partials are added in blocks of this many programs and columns. Narrow columns: there must be enough blocks to fill
# the device, and each should load all its slots at once.
_SUM_PROGRAMS = 64
_SUM_WIDTH = 512 if _IS_INTERPRETED else 16  # the interpreter runs one program after the other


@dataclass(frozen=True)
class Launch:
    """Launch shape of a kernel, measured on an H100 and scaled by width.

    There is no autotuning: its choice, and with it the order of sums, could differ between ranks and runs. On other
    GPUs these launches are untested for speed, and `kernels.backend = "auto"` takes plain PyTorch there. `ltx-titan
    bench kernels` sweeps launches.

    Attributes:
        warps: warps per program; a program holds whole tokens.
        programs: programs per multiprocessor.
        stages: depth of the compiler's prefetch of coming tokens, 1 for none; None if the kernel prefetches by itself.
    """

    warps: int
    programs: int
    stages: int | None

    def scaled_to(self, width: int, measured_at: int = 4096) -> "Launch":
        """Launch for another width than the measured one, with as many channels per thread."""
        padded = triton.next_power_of_2(width)
        return Launch(
            min(16, max(1, self.warps * padded // measured_at)),
            max(1, self.programs * measured_at // max(padded, 512)),
            self.stages,
        )


@dataclass(frozen=True)
class Tiles:
    """Division of the tokens of [B, S, D]: `programs` per sample, with `tokens` consecutive tokens each."""

    programs: int
    tokens: int


def tile_tokens(x: Tensor, programs_per_multiprocessor: int) -> Tiles:
    """Divides the tokens of `x` [B, S, D] evenly over about as many programs as the device runs at once."""
    batch, tokens = x.shape[:2]
    each = max(_min_tokens(x), triton.cdiv(tokens, _resident_programs(x, programs_per_multiprocessor)))
    return Tiles(triton.cdiv(tokens, each), each)


def tile_two(
    x: Tensor, y: Tensor, programs_per_multiprocessor: int, is_shorter_slower: bool = False
) -> tuple[Tiles, Tiles]:
    """Divides the tokens of two tensors [B, S, D] and [B, T, D] over the programs of one launch.

    Both together take no more programs than run at once: a few in a second wave would double the time.

    Args:
        x, y: the tokens.
        programs_per_multiprocessor: how many run at once.
        is_shorter_slower: whether a token of the shorter tensor takes longer. Its programs then take as few tokens as a
            quarter of all programs allows, so that they finish before those of the longer one.

    Returns:
        The tiles of `x` and of `y`.
    """
    short, long = sorted((x.shape[1], y.shape[1]))
    wanted = max(2, _resident_programs(x, programs_per_multiprocessor))
    least = max(_min_tokens(x), _min_tokens(y))
    each = max(least, triton.cdiv(short + long, wanted))
    while triton.cdiv(short, each) + triton.cdiv(long, each) > wanted:
        each += 1
    each_short = each
    if is_shorter_slower:
        each_short = min(each, max(least, triton.cdiv(short, max(1, wanted // 4))))
        each = max(least, triton.cdiv(long, wanted - triton.cdiv(short, each_short)))
    tiles = Tiles(triton.cdiv(short, each_short), each_short), Tiles(triton.cdiv(long, each), each)
    return tiles if x.shape[1] == short else tiles[::-1]


def _resident_programs(x: Tensor, per_multiprocessor: int) -> int:
    """Programs of each sample that the device runs at once."""
    return max(1, _multiprocessors(x.device) * per_multiprocessor // x.shape[0])


def _min_tokens(x: Tensor) -> int:
    """Fewest tokens of `x` in a tile."""
    return min(_MIN_TOKENS, triton.cdiv(x.shape[0] * x.shape[1], _multiprocessors(x.device)))


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 3  # the interpreter: enough for several partials


def is_supported(x: Tensor, parameters: Sequence[AdaLN]) -> bool:
    """Whether the kernels take tokens [B, S, D] of this dtype and width, and modulation of so many timesteps."""
    return x.dtype in _DTYPES and x.shape[-1] <= MAX_WIDTH and all(e.shape[1] <= MAX_TIMESTEPS for e, _ in parameters)


def requires_grad(parameters: Sequence[AdaLN]) -> bool:
    """Whether modulation is trained, directly or through its embedding; with LoRA it is frozen."""
    return any(part is not None and part.requires_grad for parameter in parameters for part in parameter)


def embedding_and_table(parameter: AdaLN, x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    """Embedding [B, K, D] and table [D] as kernels read them: K is 1 without an index, an absent table is 0."""
    embedding, table = parameter
    embedding = embedding if index is not None else embedding[:, :1]
    table = table if table is not None else embedding.new_zeros(embedding.shape[-1])
    return embedding.expand(x.shape[0], -1, -1), table


def with_unit_stride(x: Tensor) -> Tensor:
    """`x` itself if its channels are adjacent, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def with_equal_strides(embeddings: Sequence[Tensor]) -> list[Tensor]:
    """Embeddings [B, K, D] with equal strides and adjacent channels; copied only if they differ."""
    if all(e.stride() == embeddings[0].stride() and e.stride(-1) == 1 for e in embeddings):
        return list(embeddings)
    return [e.contiguous() for e in embeddings]


def index_arguments(index: Tensor | None, tiles: Tiles, placeholder: Tensor) -> dict[str, Any]:
    """Keyword arguments of a kernel for the timestep index [B, S]; `placeholder` is a pointer that is never read."""
    if index is None:
        return {"index_ptr": placeholder, "BLOCK_TOKENS": 1, "INDEXED": False}
    return {
        "index_ptr": index.contiguous(),
        "BLOCK_TOKENS": triton.next_power_of_2(tiles.tokens),
        "INDEXED": True,
    }


@triton.jit
def tile_of_program(tokens, tokens_per_program):
    """First token and end of a program's tile."""
    first = tl.program_id(0) * tokens_per_program
    return first, tl.minimum(first + tokens_per_program, tokens)


@triton.jit
def load_timesteps(index_ptr, first, last, BLOCK_TOKENS: tl.constexpr):
    """Token numbers of a tile and their timesteps, -1 beyond the end."""
    # Call it under `if INDEXED`: torch.compile's analysis of mutated arguments follows pointers through calls, also
    # unused ones, and would copy the placeholder that is passed without an index.
    token = first + tl.arange(0, BLOCK_TOKENS)
    return token, tl.load(index_ptr + token, mask=token < last, other=-1).to(tl.int32)


@triton.jit
def segment_at(token, timestep, first, last):
    """Timestep of the segment that begins at `first`, and its end."""
    k = tl.sum(tl.where(token == first, timestep, 0), 0)
    return k, tl.min(tl.where((token > first) & (timestep != k), tl.minimum(token, last), last), 0)


@triton.jit
def load_modulation(embedding_ptr, table_ptr, offset, cols, inside):
    """Table + embedding of one timestep in float32, 0 beyond the width."""
    embedding = tl.load(embedding_ptr + offset + cols, mask=inside, other=0.0).to(tl.float32)
    return embedding + tl.load(table_ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_token(ptr, cols, inside):
    """Channels of one token in float32, 0 beyond the width."""
    return tl.load(ptr + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_partial(slot_ptr, value, cols, inside, is_valid):
    """Stores a partial to its slot, or adds it to the one that this program has stored there before."""
    if is_valid:
        # Two segments of one timestep use the same slot, so this load reads what the program has stored. The race: the
        # layouts of the two accesses may differ, and if there are fewer channels than threads, several threads hold
        # a copy of each, of which one stores it. A thread could then load an element before another has stored it.
        # The barrier makes earlier stores of a block visible to all its threads (CUDA C++ programming guide,
        # __syncthreads).
        tl.debug_barrier()
        value += tl.load(slot_ptr + cols, mask=inside, other=0.0)
    tl.store(slot_ptr + cols, value, mask=inside)


@triton.jit
def _sum_over_programs(
    slots_ptr, valid_ptr, first, last, stride, k, cols, inside,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sum [BLOCK_WIDTH] of the slots of programs `first` to `last`, `stride` apart; MASKED: of those with bit k set."""
    # One sum per lane and program of a block; the reduction across threads, which synchronizes, comes once, last.
    sums = tl.zeros([BLOCK_PROGRAMS, BLOCK_WIDTH], tl.float32)
    for start in tl.range(first, last, BLOCK_PROGRAMS, num_stages=3):
        program = start + tl.arange(0, BLOCK_PROGRAMS)
        is_valid = program < last
        if MASKED:
            is_valid &= ((tl.load(valid_ptr + program, mask=is_valid, other=0) >> k) & 1) != 0
        sums += tl.load(
            slots_ptr + program[:, None] * stride + cols[None, :],
            mask=is_valid[:, None] & inside[None, :],
            other=0.0,
        )
    return tl.sum(sums, 0)


@triton.jit
def _sum_partials_kernel(
    partial_ptr, valid_ptr, embedding_grad_ptr, table_grad_ptr, batch, programs, K, width,
    BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Modulation gradients of embeddings [B, K, width] and tables [width], from partials [B, programs, K, width]."""
    cols = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    table_grad = tl.zeros([BLOCK_WIDTH], tl.float32)
    for row in range(0, batch * K):
        sample = row // K
        k = row % K
        grad = _sum_over_programs(
            partial_ptr + (sample * programs * K + k) * width, valid_ptr + sample * programs, 0, programs, K * width,
            k, cols, inside, BLOCK_PROGRAMS, BLOCK_WIDTH, MASKED,
        )  # fmt: skip
        tl.store(embedding_grad_ptr + row * width + cols, grad.to(embedding_grad_ptr.dtype.element_ty), mask=inside)
        table_grad += grad
    tl.store(table_grad_ptr + cols, table_grad.to(table_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_weights_kernel(
    partial_ptr, grad_ptr, batch, q_programs, slots, width, BLOCK_PROGRAMS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Weight gradients [2, width] of queries and keys, from partials [B, slots, width]: first those of queries."""
    cols = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = cols < width
    is_keys = tl.program_id(1)
    first = tl.where(is_keys == 1, q_programs, 0)
    last = tl.where(is_keys == 1, slots, q_programs)
    grad = tl.zeros([BLOCK_WIDTH], tl.float32)
    for sample in range(0, batch):
        grad += _sum_over_programs(
            partial_ptr + sample * slots * width, partial_ptr, first, last, width, 0, cols, inside,
            BLOCK_PROGRAMS, BLOCK_WIDTH, False,
        )  # fmt: skip
    tl.store(grad_ptr + is_keys * width + cols, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def sum_modulation_partials(
    partial: Tensor, valid: Tensor | None, embedding_dtype: torch.dtype, table_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Adds partials over programs, in float32, to the gradients of embeddings and tables in their own dtypes.

    Args:
        partial: [B, programs, K, n, D] float32; slots that are not valid hold anything.
        valid: [B, programs] int32, bit k set if slot k holds a partial; None if all do.
        embedding_dtype: of the embeddings.
        table_dtype: of the tables.

    Returns:
        Gradients of embeddings [B, K, n, D] and of tables [n, D].
    """
    batch, programs, k, n, width = partial.shape
    embedding_grad = partial.new_empty((batch, k, n, width), dtype=embedding_dtype)
    table_grad = partial.new_empty((n, width), dtype=table_dtype)
    wrap_if_traced(_sum_partials_kernel, partial)[(triton.cdiv(n * width, _SUM_WIDTH),)](
        partial_ptr=partial,
        valid_ptr=partial if valid is None else valid,
        embedding_grad_ptr=embedding_grad,
        table_grad_ptr=table_grad,
        batch=batch,
        programs=programs,
        K=k,
        width=n * width,
        BLOCK_PROGRAMS=min(_SUM_PROGRAMS, triton.next_power_of_2(programs)),
        BLOCK_WIDTH=_SUM_WIDTH,
        MASKED=valid is not None,
        num_warps=4,
    )
    return embedding_grad, table_grad


def sum_weight_partials(partial: Tensor, q_programs: int, dtype: torch.dtype) -> Tensor:
    """Adds partials over samples and programs, in float32, to the weight gradients of queries and of keys.

    Args:
        partial: [B, slots, D] float32: one slot of each program that did queries, then of each that did keys.
        q_programs: number of the former.
        dtype: of the weights.

    Returns:
        Gradients [2, D].
    """
    batch, slots, width = partial.shape
    grad = partial.new_empty((2, width), dtype=dtype)
    wrap_if_traced(_sum_weights_kernel, partial)[(triton.cdiv(width, _SUM_WIDTH), 2)](
        partial_ptr=partial,
        grad_ptr=grad,
        batch=batch,
        q_programs=q_programs,
        slots=slots,
        width=width,
        BLOCK_PROGRAMS=min(_SUM_PROGRAMS, triton.next_power_of_2(slots)),
        BLOCK_WIDTH=_SUM_WIDTH,
        num_warps=4,
    )
    return grad


def wrap_if_traced(kernel: Callable, x: Tensor) -> Callable:
    """`wrap_triton(kernel)` while `x` is traced, else the kernel itself, which launches faster."""
    is_traced = type(x) not in (Tensor, nn.Parameter) and not _IS_INTERPRETED
    return torch.library.wrap_triton(kernel) if is_traced else kernel


def operator(name: str, fake: Callable) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Registers a launcher as the operation `ltx_titan::<name>`, which mutates nothing.

    On a GPU it is a `torch.library.triton_op`: eager it is a single node; a compiler looks through it, launches the
    kernels itself, without a trip through Python's dispatcher (about 100 us for each of the 40 in a layer, as long as
    the device takes at 4,032 tokens), and plans their memory. Tracing cannot look through Triton's interpreter: there
    the same launcher is an opaque `custom_op`.

    Args:
        name: of the operation.
        fake: returns outputs of the right shapes and dtypes without launching, for tracing.
    """
    make = torch.library.custom_op if _IS_INTERPRETED else torch.library.triton_op

    def register(launcher: Callable) -> torch.library.CustomOpDef:
        operation = make(f"ltx_titan::{name}", launcher, mutates_args=())
        # Replaces the launcher itself, which triton_op registers as its fake.
        operation.register_fake(fake)
        return operation

    return register
