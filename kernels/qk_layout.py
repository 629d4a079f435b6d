"""What the two kernels of queries and keys share: how channels lie in a program, and which program does which tokens.

The operation itself is in qk_norm_rope.py.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ltx_titan_kernels.launches import Launch, divide_tokens, divide_tokens_of_two


@triton.jit
def sum_of(a):
    """Sum of all elements."""
    return tl.sum(tl.reshape(a, [a.numel], can_reorder=True), 0)


@triton.jit
def number_of_program(first_program):
    """Numbers that begin with `first_program`, so that those programs start first."""
    # Not by a remainder: its code, which runs once, would hold a tenth of all registers throughout.
    program = tl.program_id(0) + first_program
    return tl.where(program < tl.num_programs(0), program, program - tl.num_programs(0))


@triton.jit
def channels(
    first_pair, pad, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    AXES: tl.constexpr,
):  # fmt: skip
    """Channels of the first halves of all heads [heads, K / 2] and whether they exist.

    Of each one's angle also whether it turns anything, the axis and the frequency.
    """
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    lane = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (head < HEADS) & (lane < HALF)
    cols = head * (2 * HALF) + lane
    pair = first_pair + head * HALF + lane - pad
    is_turned = inside & (pair >= 0)
    return cols, inside, is_turned, pair % AXES, pair // AXES


@triton.jit
def load_stored(ptr, cols, inside, HALF: tl.constexpr):
    """First and second halves of all heads [heads, K / 2], as stored; `cols` are the channels of the first."""
    return tl.load(ptr + cols, mask=inside, other=0.0), tl.load(ptr + cols + HALF, mask=inside, other=0.0)


@triton.jit
def load_halves(ptr, cols, inside, HALF: tl.constexpr):
    """The same in float32."""
    first, second = load_stored(ptr, cols, inside, HALF)
    return first.to(tl.float32), second.to(tl.float32)


@dataclass(frozen=True)
class Division:
    """Tokens of queries and keys over programs, as both kernels take it.

    Attributes:
        grid: programs of a sample, samples.
        programs: the arguments from q_tokens to k_tokens_per_program.
        slots: partial sums of a sample: one of each program that does queries, then one of each that does keys.
        q_slots: how many of them are of queries.
        constants: the arguments from D to SHARED.
    """

    grid: tuple[int, int]
    programs: tuple[int, ...]
    slots: int
    q_slots: int
    constants: tuple[int | bool, ...]


def divide(q: Tensor, k: Tensor, tables: list[Tensor], rows: list[Tensor], head_dim: int, launch: Launch) -> Division:
    """Divides queries [B, S, D] and keys [B, T, D]; `tables` and `rows` as in `launch_forward`."""
    width, half = q.shape[-1], head_dim // 2
    heads = width // head_dim
    is_shared = len(tables) == 1
    if is_shared:
        q_walk = k_walk = divide_tokens(q, launch.programs)
    else:
        # Every token of sound has angles of its own to wait for; those of video share them by the frame.
        q_walk, k_walk = divide_tokens_of_two(q, k, launch.programs, is_shorter_slower=bool(tables))
    slots = q_walk.programs + k_walk.programs
    # The shorter one's programs start first.
    first_program = q_walk.programs if k.shape[1] < q.shape[1] else 0
    return Division(
        grid=(q_walk.programs if is_shared else slots, q.shape[0]),
        programs=(q.shape[1], k.shape[1], first_program, q_walk.programs, q_walk.tokens, k_walk.tokens),
        slots=slots,
        q_slots=q_walk.programs,
        constants=(
            width,
            heads,
            half,
            triton.next_power_of_2(heads),
            triton.next_power_of_2(half),
            tables[0].shape[1] if tables else 1,
            rows[0].shape[1] if rows else 1,
            bool(tables),
            is_shared,
        ),
    )


def both(tensors: list[Tensor], filler: Tensor) -> list[Tensor]:
    """One for queries and one for keys; pointers that are never read where there is none."""
    return (tensors or [filler]) * (1 if len(tensors) == 2 else 2)


def first_pair_and_padding(
    tables: list[Tensor], rows: list[Tensor], head_dim: int, width: int, first_head: int
) -> tuple[int, int]:
    """Number of the first pair of channels here, and how many pairs, counted over all heads, turn nothing.

    Args:
        tables, rows: as in `launch_forward`.
        head_dim: width of a head.
        width: inner width over all ranks.
        first_head: number of the first head here.
    """
    turned = tables[0].shape[1] * rows[0].shape[1] if tables else 0
    return first_head * head_dim // 2, width // 2 - turned
