"""Activation checkpointing by budget: each block saves as many of its activations as memory allows.

    full          the block's inputs
    selective     + outputs of attention and of matmuls that narrow, the feed-forward's second above all
    matmuls       + of every matmul that does not widen: queries, keys, values, output projections
    all_matmuls   + of the matmuls that widen: the feed-forward's first
    none          + norms, modulation, activations, rotated queries and keys: everything

Each level adds, of what is left, the outputs that take most time to recompute per byte: at 16,128 tokens attention 7 ms
and matmuls 3 to 0.75 ms per unit (tokens x width x 2 bytes), the rest 0.1 ms. A budget between two levels gives the
last blocks the higher one, since the backward pass frees theirs first. At most two levels are in use, so that at most
two kinds of block are compiled.
"""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from ltx_titan.common.hardware import GIB
from ltx_titan.config import ConfigError, Problem
from ltx_titan.memory.peak import estimate_memory, saved_by_levels
from ltx_titan.memory.workload import Setup, Workload
from ltx_titan.parallel.activation_checkpoint import Level

logger = logging.getLogger(__name__)

# Tensor parallelism saves the outputs of reduce-scatters instead of those of matmuls, which are partial sums.
_LEVELS: tuple[Level, ...] = ("full", "selective", "matmuls", "all_matmuls", "none")
_TP_LEVELS: tuple[Level, ...] = ("full", "selective", "none")

# Share of a device's memory for what the estimate does not count: fragmentation, other processes. Jobs that were filled
# without it ran out of memory (docs/benchmarks/log.md).
_MARGIN = 0.06
# Blocks on the device at least: one computes, the next is ready, and the one after that is copied.
_SLOTS = 3


def choose_levels(
    work: Workload, setup: Setup, budget_gib: float | Literal["auto"], device_bytes: float
) -> tuple[Level, ...]:
    """Chooses the level of each block under `activation_checkpoint.memory_gib`.

    Args:
        work: the workload.
        setup: how it runs, with `recompute = "budget"`; its levels are not read.
        budget_gib: GiB of saved activations on each GPU; "auto" fills the GPU, by the memory estimate.
        device_bytes: memory of a GPU, for "auto".

    Raises:
        ConfigError: the budget does not hold even the blocks' inputs.
    """
    levels = fitting_levels(work, setup, budget_gib, device_bytes)
    if levels is None:
        levels = (_available(setup)[0],) * work.num_layers
        needed = f"{_size(work, replace(setup, levels=levels), budget_gib) / GIB:.1f} GiB"
        if budget_gib != "auto":
            expected = f"at least {needed}, the size of the blocks' inputs"
            remedy = "raise it, or split the clips over more GPUs with parallelism.cp or parallelism.tp"
            raise ConfigError([Problem("activation_checkpoint.memory_gib", budget_gib, expected, remedy)])
        logger.warning("activation checkpointing: %s expected even with every block recomputed", needed)
    counts = ", ".join(f"{count} blocks {level}" for level, count in Counter(levels).items())
    purpose = "needed in all" if budget_gib == "auto" else "saved"
    size = _size(work, replace(setup, levels=levels), budget_gib)
    logger.info("activation checkpointing: %s; %.1f GiB expected to be %s", counts, size / GIB, purpose)
    return levels


def fitting_levels(
    work: Workload, setup: Setup, budget_gib: float | Literal["auto"], device_bytes: float
) -> tuple[Level, ...] | None:
    """The levels that `choose_levels` chooses; None if nothing fits."""
    limit = device_bytes * (1 - _MARGIN) if budget_gib == "auto" else budget_gib * GIB
    return fill(
        work.num_layers,
        _available(setup),
        lambda levels: _size(work, replace(setup, levels=levels), budget_gib) <= limit,
    )


def _available(setup: Setup) -> tuple[Level, ...]:
    return _LEVELS if setup.degrees.tp == 1 else _TP_LEVELS


def _size(work: Workload, setup: Setup, budget_gib: float | Literal["auto"]) -> float:
    """Bytes that are limited: saved activations by a budget in GiB, all memory by the device."""
    return estimate_memory(work, setup).needed if budget_gib == "auto" else saved_by_levels(work, setup)


def with_levels(work: Workload, setup: Setup, budget_gib: float | Literal["auto"], device_bytes: float) -> Setup:
    """The setup with its blocks' levels; as it is if it does not checkpoint by budget."""
    if setup.recompute != "budget":
        return setup
    return replace(setup, levels=choose_levels(work, setup, budget_gib, device_bytes))


def with_stream_blocks(
    work: Workload,
    setup: Setup,
    wanted: int | Literal["auto"],
    budget_gib: float | Literal["auto"],
    device_bytes: float,
) -> Setup:
    """The setup with the number of blocks on the device that `parallelism.stream_blocks` asks for, without levels.

    "auto" keeps all blocks on the device if its memory holds them, by the memory estimate. Otherwise it keeps as many
    as fit; under `budget`, whose saved activations are then worth more, few, and the levels fill the rest.

    Args:
        work: the workload.
        setup: how it runs.
        wanted: a number, 0 for all blocks, or "auto".
        budget_gib: `activation_checkpoint.memory_gib`.
        device_bytes: memory of a GPU.
    """
    if wanted != "auto":
        return replace(setup, stream_blocks=wanted)
    if setup.recompute == "budget":
        levels = (_LEVELS[0],) * work.num_layers
        if budget_gib != "auto":
            levels = choose_levels(work, setup, budget_gib, device_bytes)
        setup = replace(setup, levels=levels)
    limit = device_bytes * (1 - _MARGIN)

    def size(count: int) -> float:
        return estimate_memory(work, replace(setup, stream_blocks=count)).needed

    count = 0
    if size(0) > limit:
        counts = range(min(_SLOTS, work.num_layers - 1), work.num_layers)
        if setup.recompute == "budget":
            counts = counts[:1]
        count = counts[max(bisect_right(counts, limit, key=size) - 1, 0)]
        if size(count) > limit:
            logger.warning("weight streaming: %.1f GiB expected with %d blocks on the GPU", size(count) / GIB, count)
    return replace(setup, stream_blocks=count, levels=())


def fill(
    num_layers: int, available: tuple[Level, ...], fits: Callable[[tuple[Level, ...]], bool]
) -> tuple[Level, ...] | None:
    """The levels that save most among those that fit; None if not even the first level does.

    Args:
        num_layers: number of blocks.
        available: levels, from the one that saves least.
        fits: whether levels fit; if some do, so do all that save less.
    """

    def rung(number: int) -> tuple[Level, ...]:
        lower, higher = divmod(number, num_layers)
        return (available[lower],) * (num_layers - higher) + (available[min(lower + 1, len(available) - 1)],) * higher

    rungs = range((len(available) - 1) * num_layers + 1)
    count = bisect_right(rungs, False, key=lambda number: not fits(rung(number)))
    return rung(count - 1) if count else None
