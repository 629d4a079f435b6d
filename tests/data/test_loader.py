import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ltx_titan.data import BatchPlan, PrecomputedDataset, StepLoader, collate, map_tensors
from ltx_titan.nano.synthetic import SyntheticDataset
from tests.data.files import AV_SOURCES, write_dataset


class Numbers:
    """Dataset whose sample `i` is the number `i`; records which were read."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken
        self.read = []

    def name(self, index):
        return f"number {index}"

    def load(self, index):
        if index in self.broken:
            raise ValueError(f"folder/{index}.pt is broken")
        self.read.append(index)
        return {"source": {"value": torch.tensor([index]), "count": 3, "fps": 24.0, "present": True}}


def plan_of(count, size, shapes=None):
    return BatchPlan(shapes or ["one"] * count, [1.0] * count, 0, size, "data")


def steps_of(loader, count=None):
    """(step, [(positions, samples)...]) of the loader's first `count` steps."""
    seen = []
    for step in loader:
        forwards = list(step.micro_batches)
        assert len(forwards) == step.num_micro_batches
        seen.append((step.step, [(forward.positions, forward.samples) for forward in forwards]))
        if len(seen) == count:
            break
    return seen


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (2, 4), (3, 50)])
def test_order_is_that_of_the_plan_for_any_number_of_workers(workers, prefetch):
    plan = plan_of(20, 6)
    options = {"dp_rank": 1, "dp_size": 2, "local_batch_size": 2, "start_step": 3, "stop_step": 9}
    with StepLoader(Numbers(20), plan, num_workers=workers, prefetch=prefetch, **options) as loader:
        seen = steps_of(loader)
    assert [step for step, _ in seen] == list(range(3, 9))
    for step, forwards in seen:
        planned = plan.micro_batches(step, 1, 2, 2)
        assert [list(zip(*forward, strict=True)) for forward in forwards] == planned


def test_batches_hold_the_listed_samples():
    with StepLoader(Numbers(8), plan_of(8, 4), local_batch_size=4, stop_step=3) as loader:
        for step in loader:
            (forward,) = step.micro_batches
            fields = forward.batch["source"]
            assert fields["value"].flatten().tolist() == list(forward.samples)
            assert (fields["count"].dtype, fields["fps"].dtype) == (torch.int64, torch.float64)
            assert fields["present"].dtype == torch.bool
            assert fields["fps"].shape == (4,)


def test_resumed_loader_continues_as_if_never_interrupted():
    plan = plan_of(10, 4)
    whole = steps_of(StepLoader(Numbers(10), plan, stop_step=8))
    assert steps_of(StepLoader(Numbers(10), plan, start_step=5, stop_step=8)) == whole[5:]


def test_first_batch_shifts_the_data_and_not_the_steps():
    plan = plan_of(10, 4)
    (expected,) = steps_of(StepLoader(Numbers(10), plan, start_step=2, stop_step=3))
    loader = StepLoader(Numbers(10), plan, start_step=7, stop_step=8, first_batch=2)
    assert steps_of(loader) == [(7, expected[1])]


def test_draws_are_made_in_a_worker_from_step_and_positions():
    threads = set()

    def draw(batch, step, positions, samples):
        assert batch["source"]["value"].flatten().tolist() == list(samples)
        threads.add(threading.current_thread())
        return step * 100 + torch.tensor(positions) + batch["source"]["value"].flatten() * 0

    with StepLoader(Numbers(8), plan_of(8, 4), local_batch_size=2, start_step=5, stop_step=7, draw=draw) as loader:
        for step in loader:
            for forward in step.micro_batches:
                assert forward.draws.tolist() == [step.step * 100 + position for position in forward.positions]
    assert threading.main_thread() not in threads


class ImmediateExecutor:
    """Runs each job when it is submitted, so that the number of jobs in flight does not depend on threads."""

    def __init__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **_):
        pass


def test_only_the_next_micro_batches_are_read_ahead(monkeypatch):
    monkeypatch.setattr("ltx_titan.data.loader.ThreadPoolExecutor", ImmediateExecutor)
    data = Numbers(64)
    with StepLoader(data, plan_of(64, 32), prefetch=3) as loader:
        micro_batches = next(iter(loader)).micro_batches
        for taken in (1, 2, 3):
            next(micro_batches)
            assert len(data.read) == taken + 3


def test_nothing_is_read_beyond_the_last_step():
    data = Numbers(8)
    with StepLoader(data, plan_of(8, 2), stop_step=2, prefetch=50) as loader:
        steps_of(loader)
    assert len(data.read) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_error_of_a_worker_surfaces_at_its_micro_batch_with_the_file(workers):
    plan = plan_of(8, 2)
    bad = plan.global_batch(2)[0]
    with StepLoader(Numbers(8, broken=[bad]), plan, num_workers=workers, start_step=1) as loader:
        steps = iter(loader)
        list(next(steps).micro_batches)
        micro_batches = next(steps).micro_batches
        with pytest.raises(ValueError, match=rf"folder/{bad}\.pt is broken") as caught:
            next(micro_batches)
    assert f"while preparing step 2 from number {bad}" in caught.value.__notes__


def test_close_ends_the_threads_and_may_be_repeated():
    before = threading.active_count()
    loader = StepLoader(Numbers(64), plan_of(64, 4), num_workers=3)
    steps_of(loader, 2)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_files_are_collated_by_shape(tmp_path):
    data = PrecomputedDataset(write_dataset(tmp_path, ["a", "b", "c"], frames=lambda i: 1 + i // 2), AV_SOURCES)
    plan = BatchPlan([data.shape_key(i) for i in range(3)], [1.0] * 3, 0, 3, data.fingerprint)
    with StepLoader(data, plan, local_batch_size=2, stop_step=1) as loader:
        forwards = [forward for step in loader for forward in step.micro_batches]
    shapes = {forward.samples: forward.batch["video_latents"]["latents"].shape for forward in forwards}
    assert {len(samples): tuple(shape) for samples, shape in shapes.items()} == {
        2: (2, 128, 1, 3, 4),
        1: (1, 128, 2, 3, 4),
    }


def test_synthetic_samples_are_collated():
    data = SyntheticDataset(
        AV_SOURCES,
        width=32,
        height=32,
        num_frames=9,
        fps=24.0,
        num_samples=2,
        text_tokens=4,
        video_text_dim=4,
        audio_text_dim=4,
    )
    plan = BatchPlan([data.shape_key(i) for i in range(2)], [1.0] * 2, 0, 2, data.fingerprint)
    with StepLoader(data, plan, local_batch_size=2, stop_step=1) as loader:
        (forward,) = [forward for step in loader for forward in step.micro_batches]
    assert forward.batch["video_latents"]["latents"].shape == (2, 128, 2, 1, 1)
    assert forward.batch["video_latents"]["fps"].tolist() == [24.0, 24.0]


def test_collate_keeps_the_dtype_of_latents():
    batch = collate([{"a": {"x": torch.ones(2, dtype=torch.bfloat16)}}] * 2)
    assert batch["a"]["x"].dtype == torch.bfloat16


class Pair(NamedTuple):
    left: Tensor
    right: int


@dataclass(frozen=True)
class Record:
    items: list
    pair: Pair
    nothing: None = None


def test_map_tensors_reaches_nested_containers():
    record = Record([torch.ones(1), None], Pair(torch.ones(1), 2))
    mapped = map_tensors({"a": (record, "text")}, lambda tensor: tensor + 1)
    assert mapped["a"][0].items[0].item() == 2
    assert mapped["a"][0].pair.left.item() == 2
    assert mapped["a"][0].pair.right == 2
    assert mapped["a"][1] == "text"
    assert record.pair.left.item() == 1
