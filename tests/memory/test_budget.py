"""Levels of activation checkpointing: memory is filled, with what is most expensive to recompute first."""

from dataclasses import replace

import pytest

from ltx_titan.common.hardware import GIB, GPUS
from ltx_titan.config import ConfigError
from ltx_titan.estimate.time import estimate_time
from ltx_titan.memory.budget import choose_levels, fill, with_stream_blocks
from ltx_titan.memory.peak import SLACK, estimate_memory, saved_by_levels
from ltx_titan.memory.workload import Setup, make_setup, make_workload
from tests.estimate.test_prediction import plan_of

ORDER = ["full", "selective", "matmuls", "all_matmuls", "none"]


@pytest.fixture(scope="module")
def job():
    """LoRA on the whole LTX-2.3 shape, one GPU."""
    sections = {
        "model": {"num_layers": 48, "mode": "lora"},
        "compile": {"enable": True},
        "kernels": {"backend": "triton"},
        "activation_checkpoint": {"mode": "budget"},
    }
    plan = plan_of(1, **sections)
    return make_workload(plan), make_setup(plan.job, plan.degrees)


def test_a_budget_is_filled_from_the_last_block_on():
    levels = fill(3, ("full", "selective", "none"), lambda levels: levels.count("none") < 2 and "full" not in levels)
    assert levels == ("selective", "selective", "none")
    assert fill(3, ("full", "none"), lambda levels: False) is None
    assert fill(3, ("full", "none"), lambda levels: True) == ("none",) * 3


def test_more_memory_saves_more_and_never_too_much(job):
    work, setup = job
    saved = []
    for gib in (4, 12, 20, 30, 50, 1000):
        levels = choose_levels(work, setup, float(gib), 0)
        assert len(set(levels)) <= 2
        assert sorted(levels, key=ORDER.index) == list(levels)
        saved.append(saved_by_levels(work, replace(setup, levels=levels)) / GIB)
        assert saved[-1] <= gib
    assert saved == sorted(saved)
    assert levels == ("none",) * 48


def test_auto_fills_the_device_by_the_estimate(job):
    work, setup = job
    small, large = (choose_levels(work, setup, "auto", gib * GIB) for gib in (60, 79))
    assert sum(map(ORDER.index, small)) < sum(map(ORDER.index, large))
    assert estimate_memory(work, replace(setup, levels=large)).needed <= 79 * GIB


def test_blocks_are_streamed_only_where_they_do_not_fit(job):
    work, setup = job
    full = replace(setup, recompute="full")

    def chosen(setup: Setup, gib: float) -> int:
        return with_stream_blocks(work, setup, "auto", "auto", gib * GIB).stream_blocks

    assert [chosen(full, gib) for gib in (79, 12)] == [0, 3]
    slots = chosen(full, 24)
    fits, more = (estimate_memory(work, replace(full, stream_blocks=count)) for count in (slots, slots + 1))
    assert fits.needed < 24 * GIB * (1 - 0.06) < more.needed + more.gradients
    assert more.needed - fits.needed == pytest.approx(SLACK * work.block.frozen_bytes)
    # Under a budget, activations have what blocks leave.
    assert [chosen(setup, gib) for gib in (79, 24)] == [0, 3]
    # A step waits only for copies that take longer than the blocks that run meanwhile.
    link = [replace(GPUS["h100"], host_link=speed) for speed in (1e12, 20e9, 10e9)]
    waits = [estimate_time(work, replace(full, stream_blocks=3, graphs=True), gpu).streaming for gpu in link]
    assert waits[0] == 0 < waits[1] < waits[2]
    assert waits[2] < 2 * 45 * work.block.frozen_bytes / 10e9


def test_gradient_shards_have_room_of_their_own():
    """FSDP2 allocates them on another stream: they cannot use what activations free."""
    plan = plan_of(4, model={"num_layers": 48}, compile={"enable": True}, activation_checkpoint={"mode": "budget"})
    work, setup = make_workload(plan), make_setup(plan.job, plan.degrees)
    memory = estimate_memory(work, replace(setup, levels=choose_levels(work, setup, "auto", 141 * GIB)))
    assert memory.gradients > 8 * GIB
    assert memory.start_of_backward + memory.gradients <= memory.needed <= 141 * GIB


def test_a_budget_below_the_inputs_is_refused_with_their_size(job):
    with pytest.raises(ConfigError, match=r"activation_checkpoint.memory_gib.*at least \d"):
        choose_levels(*job, 0.1, 0)
