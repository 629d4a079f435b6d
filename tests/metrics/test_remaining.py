"""The time left, against a simulated clock."""

import time

import pytest

from ltx_titan.metrics.remaining import RemainingTime


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
