"""The watch of one rank of two, of which the other never joins."""

import threading

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

    watch = Watch(dist.HashStore(), tmp_path, timeout_s=2.0, on_stall=on_stall)
    with watch.explained():
        watch.enter(1, "training")
        assert stalled.wait(60)
    assert texts[0] == (1, "waiting for rank 1, which does not answer (last seen: never)")
