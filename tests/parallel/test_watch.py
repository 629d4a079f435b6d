"""The watch of one rank of two, of which the other never joins, stops, or has ended."""

import json
import multiprocessing
import sys
import threading
import time

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ltx_titan.parallel.watch import Watch


@pytest.fixture
def first_of_two():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_a_rank_that_was_never_seen_is_named(tmp_path, first_of_two):
    stalled, texts = threading.Event(), []

    def on_stall(step, text):
        texts.append((step, text))
        stalled.set()

    watch = Watch(dist.HashStore(), tmp_path, timeout_s=5.0, on_stall=on_stall)
    with watch.explained():
        watch.enter(1, "training")
        assert stalled.wait(60)
    assert texts[0] == (1, "waiting for rank 1, which does not answer (last seen: never)")


def wait_for_others(folder, rank, entries, seconds, phase):
    """Waits longer than the time-out, as in a collective; `entries` are what others left in the store."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
    store = dist.HashStore()
    for key, value in entries.items():
        store.set(key, value)

    def report(error):
        (folder / "error.txt").write_text(str(error))

    watch = Watch(store, folder, timeout_s=1.0, on_lost=report)
    with watch.explained():
        watch.enter(3, phase)
        time.sleep(seconds)


def exit_code_of(folder, rank, entries, *, seconds=120, phase="training"):
    """Of a process that ends itself, or after `seconds`."""
    return run(wait_for_others, folder, rank, entries, seconds, phase)


def run(target, *args):
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_ends_if_another_is_silent_for_longer_than_the_time_out(tmp_path, rank):
    assert exit_code_of(tmp_path, rank, {f"watch/{1 - rank}": json.dumps([17, 3, 1])}) == 1
    text = (tmp_path / "error.txt").read_text()
    assert text.startswith(
        f"training, step 3: rank {1 - rank} has not answered for 2 s, longer than job.timeout_s (1 s)"
    )
    assert "wait_for_others" in (tmp_path / f"rank-{rank}.txt").read_text()


def test_a_rank_ends_with_rank_0(tmp_path):
    alive = {"watch/0": json.dumps([17, 3, 1]), "watch/end": "rank 2 has not answered"}
    assert exit_code_of(tmp_path, 1, alive) == 1
    assert (tmp_path / "error.txt").read_text() == "rank 2 has not answered"


@pytest.mark.parametrize(("beats", "phase"), [(-1, "training"), (17, "exporting")], ids=["ended", "exporting"])
def test_a_rank_waits_for_nobody_that_has_ended_or_while_it_exports(tmp_path, beats, phase):
    assert exit_code_of(tmp_path, 0, {"watch/1": json.dumps([beats, 3, 1])}, seconds=6, phase=phase) == 0


def test_a_rank_that_ends_says_so(tmp_path, first_of_two):
    store = dist.HashStore()
    watch = Watch(store, tmp_path, timeout_s=5.0)
    with watch.explained():
        watch.enter(2, "exporting")
    assert json.loads(store.get("watch/0")) == [-1, 2, 4]


def load_for_long(folder):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    store = dist.HashStore()
    store.set("watch/1", json.dumps([17, 0, 0]))
    Watch(store, folder, timeout_s=1.0)
    time.sleep(6)
    # Others would read it, and end, when they train.
    sys.exit(store.check(["watch/end"]))


def test_no_rank_is_ended_before_training(tmp_path):
    assert run(load_for_long, tmp_path) == 0
