"""The time left, against a simulated clock: of simulated runs, and of a real job."""

import time
from types import SimpleNamespace

import pytest

from ltx_titan.metrics import loggers, remaining
from ltx_titan.metrics.remaining import RemainingTime
from ltx_titan.train.saves import Saves
from ltx_titan.train.step import TrainStep
from ltx_titan.validation.report import RunReport
from ltx_titan.validation.training import TrainingValidation
from tests.jobs import train, write_job


class Run:
    """A run with its own clock: 40 s of compilation in the first step, then steps of two sizes, and interruptions.

    Steps end with their log line, as in the trainer: a validation comes before the line and a save after it.
    """

    VALIDATION_S, SAVE_S = 90.0, 4.0

    def __init__(self, last_step: int, intervals: dict[str, int], *, first_validation_s: float | None) -> None:
        self.now, self.last_step, self.intervals = 1000.0, last_step, intervals
        self.first_validation_s = first_validation_s
        self.lines: dict[int, tuple[float, float | None, bool]] = {}

    def go(self) -> "Run":
        left = RemainingTime(self.last_step, 0, self.intervals)

        def pause(kind: str, seconds: float) -> None:
            self.now += seconds
            left.pause(kind, seconds)

        if self.first_validation_s is not None:
            pause("validating", self.first_validation_s)
        for step in range(1, self.last_step + 1):
            self.now += (40.0 if step == 1 else 0.0) + (1.0 if step % 3 else 3.0)
            if step % self.intervals["validating"] == 0:
                pause("validating", self.VALIDATION_S)
            self.lines[step] = (self.now, left.seconds(step), left.is_lower_bound(step))
            if step % self.intervals["saving"] == 0:
                pause("saving", self.SAVE_S)
        return self


@pytest.fixture
def run(monkeypatch):
    def make(*arguments, **options):
        simulated = Run(*arguments, **options)
        monkeypatch.setattr(time, "monotonic", lambda: simulated.now)
        return simulated.go()

    return make


def test_the_time_left_is_right_from_step_10_on_although_validations_take_longer_than_steps(run):
    done = run(400, {"validating": 50, "saving": 50}, first_validation_s=100.0)
    end = done.now
    for step, (now, left, _) in done.lines.items():
        if 10 <= step <= 390:
            assert left == pytest.approx(end - now, rel=0.15), step


def test_the_time_left_is_a_lower_bound_until_the_first_validation_has_been_timed(run):
    done = run(200, {"validating": 100, "saving": 1000}, first_validation_s=None)
    assert [done.lines[step][2] for step in (1, 99, 100, 200)] == [True, True, False, False]
    now, left, _ = done.lines[99]
    assert left < done.now - now
    now, left, _ = done.lines[100]
    assert left == pytest.approx(done.now - now, rel=0.05)


def test_a_resumed_run_counts_its_own_steps(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    left = RemainingTime(60, 40)
    assert left.seconds(40) is None
    now[0] += 6
    assert left.seconds(42) == pytest.approx(18 * 3)
    now[0] += 3
    assert left.seconds(43) == pytest.approx(17 * 3)


def test_a_job_foretells_its_length_whatever_takes_the_time(tmp_path, nano_path, data_root, monkeypatch):
    # The real loop, validation, report and saves, on a clock that advances by a set time for each: how busy the
    # machine is changes nothing, and a validation or save that the forecast overlooks is a third of what is left.
    now = [0.0]
    for module in (remaining, loggers):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for owner, name, seconds in (
        (TrainStep, "run", 2),
        (TrainingValidation, "run", 9),
        (RunReport, "write", 3),
        (Saves, "save", 7),
    ):
        monkeypatch.setattr(owner, name, taking(now, seconds, getattr(owner, name)))
    forecasts = []

    def noted(self, step, seconds=RemainingTime.seconds):
        forecasts.append((step, now[0], seconds(self, step)))
        return forecasts[-1][2]

    monkeypatch.setattr(RemainingTime, "seconds", noted)
    validation = {"interval": 4, "held_out_root": str(data_root), "held_out_samples": 1, "held_out_sigmas": [0.5]}
    job = write_job(
        tmp_path,
        nano_path,
        data_root,
        training__steps=40,
        training__stop_at=16,
        training__global_batch_size=1,
        checkpoint__interval=8,
        **{f"validation__{key}": value for key, value in validation.items()},
    )
    train(job)
    assert [step for step, _, _ in forecasts] == list(range(1, 17))
    for step, then, left in forecasts[9:15]:
        assert left == pytest.approx(now[0] - then, rel=0.15), step


def taking(now, seconds, work):
    """`work`, which takes a set time on the simulated clock."""

    def timed(*arguments, **options):
        now[0] += seconds
        return work(*arguments, **options)

    return timed
