"""The watch of one rank of two, of which the other never joins, stops, or has ended."""

import json
import multiprocessing
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


def wait_for_rank_1(folder, beats):
    """Waits longer than the time-out, as in a collective that never ends; `beats` are the other rank's last ones."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    store = dist.HashStore()
    store.set("watch/1", json.dumps([beats, 3, 1]))

    def report(error):
        (folder / "error.txt").write_text(str(error))

    watch = Watch(store, folder, timeout_s=1.0, on_lost=report)
    with watch.explained():
        watch.enter(3, "training")
        time.sleep(6)


@pytest.mark.parametrize(("beats", "code"), [(17, 1), (-1, 0)], ids=["stopped", "ended"])
def test_a_rank_ends_if_another_is_silent_for_longer_than_the_time_out(tmp_path, beats, code):
    process = multiprocessing.get_context("spawn").Process(target=wait_for_rank_1, args=(tmp_path, beats))
    process.start()
    process.join()
    assert process.exitcode == code
    if code:
        text = (tmp_path / "error.txt").read_text()
        assert text.startswith("training, step 3: rank 1 has not answered for 2 s, longer than job.timeout_s (1 s)")
        assert "wait_for_rank_1" in (tmp_path / "rank-0.txt").read_text()


def test_a_rank_that_ends_says_so(tmp_path, first_of_two):
    store = dist.HashStore()
    watch = Watch(store, tmp_path, timeout_s=5.0)
    with watch.explained():
        watch.enter(2, "exporting")
    assert json.loads(store.get("watch/0")) == [-1, 2, 4]
