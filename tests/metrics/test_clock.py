"""Step time on a simulated device that works behind the host: every second of its work must be in a lap."""

import time

import pytest
import torch

from ltx_titan.metrics import clock
from ltx_titan.optim import Optimizers
from ltx_titan.parallel.mesh import Mesh
from tests.jobs import read_run, train_rank, write_job
from tests.processes import run_ranks

# What the host needs to enqueue a step, and the device to run it.
ENQUEUE_S, STEP_S = 0.25, 4.0


class SimulatedDevice:
    """A host clock that moves only when work is enqueued or waited for, and the time when the queue is empty."""

    def __init__(self) -> None:
        self.now = self.done_at = 100.0

    def enqueue(self) -> None:
        self.now += ENQUEUE_S
        self.done_at = max(self.done_at, self.now) + STEP_S

    def wait(self, *_: object) -> None:
        self.now = max(self.now, self.done_at)


@pytest.fixture
def device(monkeypatch) -> SimulatedDevice:
    simulated = SimulatedDevice()
    monkeypatch.setattr(time, "perf_counter", lambda: simulated.now)
    monkeypatch.setattr(clock, "wait_for_device", simulated.wait)
    return simulated


def test_a_lap_ends_when_the_device_has_finished(device):
    stopwatch = clock.StepClock(torch.device("cpu"))
    for _ in range(3):
        device.enqueue()
        assert stopwatch.lap() == pytest.approx(ENQUEUE_S + STEP_S)


def test_a_pause_excludes_its_own_work_but_not_what_was_enqueued_before(device):
    stopwatch = clock.StepClock(torch.device("cpu"))
    device.enqueue()
    with stopwatch.paused():
        device.now += 1000
    assert stopwatch.lap() == pytest.approx(ENQUEUE_S + STEP_S)


def train_on_simulated_device(job) -> None:
    """Trains a job whose every update enqueues `STEP_S` of work; reading the losses waits for it, as on a GPU."""
    device = SimulatedDevice()
    with pytest.MonkeyPatch.context() as patch:
        update, reduce = Optimizers.step, Mesh.sum_over_samples
        patch.setattr(time, "perf_counter", lambda: device.now)
        patch.setattr(clock, "wait_for_device", device.wait)
        patch.setattr(Optimizers, "step", lambda self, *how: (device.enqueue(), update(self, *how)))
        patch.setattr(Mesh, "sum_over_samples", lambda self, values: (device.wait(), reduce(self, values))[1])
        train_rank(job)


@pytest.mark.distributed
def test_logged_step_times_contain_the_device_time(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=4, metrics__interval=2)
    run_ranks(train_on_simulated_device, 1, job)
    assert [line["step_time_s"] for line in read_run(job)] == pytest.approx([STEP_S + ENQUEUE_S / 2] * 2)
