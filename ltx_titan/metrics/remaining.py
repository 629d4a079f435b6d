"""Time until the last step, with steps and everything that interrupts them counted apart."""

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Mapping

# Log lines whose step times count: enough to average over buckets of different sizes, and not the whole run.
_WINDOW = 100
# A line that took longer than this many medians held a compilation or a stall, which the remaining steps do not repeat.
_OUTLIER = 3.0
# Interruptions that follow the log line of their step: at that line they are still ahead.
_AFTER_LINE = frozenset({"reporting", "saving", "exporting"})


class RemainingTime:
    """Predicts the time from the current step to the last one.

    Args:
        last_step: the step after which the run ends: `training.stop_at`, if it is set.
        first_step: the step that it resumes from.
        intervals: steps between two interruptions of a kind, such as "validating"; None or 0 if there are none.
    """

    def __init__(self, last_step: int, first_step: int, intervals: Mapping[str, int | None] | None = None) -> None:
        self._last_step = last_step
        self._intervals = {kind: interval for kind, interval in (intervals or {}).items() if interval}
        # Monotonic, because a clock that is adjusted would give a negative rate.
        self._step, self._time = first_step, time.monotonic()
        self._rates: deque[float] = deque(maxlen=_WINDOW)
        self._pauses: defaultdict[str, list[float]] = defaultdict(list)

    def pause(self, kind: str, seconds: float) -> None:
        """Records an interruption, which is no part of the time of steps."""
        self._pauses[kind].append(seconds)
        self._time += seconds

    def seconds(self, step: int) -> float | None:
        """Seconds from `step`, which has just ended, to the last step; None before a step has been timed."""
        now = time.monotonic()
        if step > self._step:
            self._rates.append((now - self._time) / (step - self._step))
            self._step, self._time = step, now
        if not self._rates:
            return None
        usual = _OUTLIER * statistics.median(self._rates)
        rate = statistics.mean(rate for rate in self._rates if rate <= usual)
        return max(0, self._last_step - step) * rate + sum(
            count * self._typical(kind) for kind, count in self._left(step).items() if kind in self._pauses
        )

    def is_lower_bound(self, step: int) -> bool:
        """Whether an interruption is ahead that has not been timed in this run, so that it will take longer."""
        return any(count > 0 and kind not in self._pauses for kind, count in self._left(step).items())

    def _left(self, step: int) -> dict[str, int]:
        return {
            kind: max(0, self._last_step // interval - (step - (kind in _AFTER_LINE)) // interval)
            for kind, interval in self._intervals.items()
        }

    def _typical(self, kind: str) -> float:
        # Without the first one, if there are others: it compiles, and reads files that are cached afterwards.
        known = self._pauses[kind]
        return statistics.mean(known[1:][-3:] or known)
