"""What every kernel's launcher needs: how tokens are spread over programs, and how operations are registered.

Programs are persistent: each walks over consecutive tokens of one sample, so that rows and weights are read once per
program, and sums over tokens stay in registers.

On a GPU the operations are `torch.library.triton_op`s. Eager they are single nodes; a compiler looks through them,
launches the kernels itself, without a trip through Python's dispatcher (about 100 us for each of the 40 in a layer, at
4,032 tokens as long as the device takes), and plans their memory. Triton's interpreter cannot be looked through: there
the same functions are opaque `custom_op`s.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor, nn

# One bit per row in an int32; a sample of a training batch has one or two distinct timesteps.
MAX_ROWS = 31
# A row lives in the registers of one program.
MAX_WIDTH = 16384
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program reads rows and weights once; below this they would cost as much as the tokens. Where there are not even as
# many tokens as multiprocessors (audio), each is done at once.
_LEAST_TOKENS = 4
_IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Launch:
    """How a kernel is spread over the device.

    Attributes:
        warps: warps per program; a program holds whole rows.
        programs: programs per multiprocessor.
        stages: depth of the compiler's prefetch of coming tokens; 1 has none. None where a kernel prefetches by itself.
    """

    warps: int
    programs: int
    stages: int | None

    def at(self, width: int, measured_at: int = 4096) -> "Launch":
        """The same for another width than the one it was measured at: as many channels in each thread."""
        padded = triton.next_power_of_2(width)
        return Launch(
            min(16, max(1, self.warps * padded // measured_at)),
            max(1, self.programs * measured_at // max(padded, 512)),
            self.stages,
        )


@dataclass(frozen=True)
class Walk:
    """Division of [B, S] tokens over programs: `programs` per sample, `tokens` consecutive tokens each."""

    programs: int
    tokens: int


def divide_tokens(x: Tensor, programs_per_multiprocessor: int) -> Walk:
    """Spreads the tokens of `x` [B, S, D] evenly over about as many programs as the device runs at once."""
    batch, tokens = x.shape[:2]
    each = max(_least_tokens(x), triton.cdiv(tokens, _programs_at_once(x, programs_per_multiprocessor)))
    return Walk(triton.cdiv(tokens, each), each)


def divide_tokens_of_two(
    x: Tensor, y: Tensor, programs_per_multiprocessor: int, is_shorter_slower: bool = False
) -> tuple[Walk, Walk]:
    """Spreads the tokens of two tensors [B, S, D] and [B, T, D] over the programs of one launch.

    Together they are no more than run at once: the few beyond would take as long again as all others.

    Args:
        x, y: the tokens.
        programs_per_multiprocessor: how many run at once.
        is_shorter_slower: whether a token of the shorter one takes longer. Its programs then take as few tokens as a
            quarter of all programs allows, so that none is still at work when the longer one's are done.

    Returns:
        The divisions of `x` and of `y`.
    """
    short, long = sorted((x.shape[1], y.shape[1]))
    wanted = max(2, _programs_at_once(x, programs_per_multiprocessor))
    least = max(_least_tokens(x), _least_tokens(y))
    each = max(least, triton.cdiv(short + long, wanted))
    while triton.cdiv(short, each) + triton.cdiv(long, each) > wanted:
        each += 1
    each_short = each
    if is_shorter_slower:
        each_short = min(each, max(least, triton.cdiv(short, max(1, wanted // 4))))
        each = max(least, triton.cdiv(long, wanted - triton.cdiv(short, each_short)))
    walks = Walk(triton.cdiv(short, each_short), each_short), Walk(triton.cdiv(long, each), each)
    return walks if x.shape[1] == short else walks[::-1]


def _programs_at_once(x: Tensor, per_multiprocessor: int) -> int:
    """How many programs of each sample the device runs at once."""
    return max(1, _multiprocessors(x.device) * per_multiprocessor // x.shape[0])


def _least_tokens(x: Tensor) -> int:
    """Fewest tokens that a program takes of `x`."""
    return min(_LEAST_TOKENS, triton.cdiv(x.shape[0] * x.shape[1], _multiprocessors(x.device)))


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


def filled(tensors: Sequence[Tensor], count: int, filler: Tensor) -> list[Tensor]:
    """Exactly `count` pointers: those beyond `tensors` are never read."""
    return [*tensors, *[filler] * (count - len(tensors))]


def index_arguments(index: Tensor | None, walk: Walk, filler: Tensor) -> tuple[Tensor, int, bool]:
    """A kernel's pointer to the tokens' row numbers, how many a program looks at, and whether there are any."""
    if index is None:
        return filler, 1, False
    return index.contiguous(), triton.next_power_of_2(walk.tokens), True


def runnable(kernel: Callable, x: Tensor) -> Callable:
    """The kernel in the form that a launcher called with `x` must launch: itself, or while it is traced, a node."""
    is_traced = type(x) not in (Tensor, nn.Parameter) and not _IS_INTERPRETED
    return torch.library.wrap_triton(kernel) if is_traced else kernel


def operator(name: str, fake: Callable) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Registers a launcher as the operation `ltx_titan::<name>`, which mutates nothing.

    Args:
        name: of the operation.
        fake: outputs of the right shapes and dtypes, for tracing where the launcher cannot be traced.
    """

    def register(launcher: Callable) -> torch.library.CustomOpDef:
        if not _IS_INTERPRETED:
            return torch.library.triton_op(f"ltx_titan::{name}", launcher, mutates_args=())
        operation = torch.library.custom_op(f"ltx_titan::{name}", launcher, mutates_args=())
        operation.register_fake(fake)
        return operation

    return register
