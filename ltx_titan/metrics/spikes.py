"""Decides which steps are skipped: those with a loss or gradient norm that is not finite, or far above recent ones.

One broken sample, or an overflow at a rare sigma, must not end a run of a week, nor may its update reach the weights.
The decision is a function of the figures of all ranks, so every rank skips the same steps; its memory is part of the
checkpoint, so a resumed run skips those of an unbroken one.
"""

from collections import deque
from collections.abc import Mapping
from math import inf, isfinite
from statistics import median
from typing import Any

from torch import Tensor

# Recent steps that a spike is compared with, and how many of them it takes to tell one.
_RECENT = 100
_ENOUGH = 20


class StepGuard:
    """Judges the steps of a run.

    Args:
        max_in_a_row: most steps in a row that may be skipped.
        spike_factor: a step is also skipped if its loss or gradient norm exceeds this multiple of the median of the
            last 100 steps that were not skipped; from 20 such steps on. None compares nothing.
    """

    def __init__(self, max_in_a_row: int, spike_factor: float | None = None) -> None:
        self.max_in_a_row = max_in_a_row
        self._spike_factor = spike_factor
        self.total = 0
        """Steps skipped since the run began."""
        self.in_a_row = 0
        self._recent: dict[str, deque[float]] = {
            "loss": deque(maxlen=_RECENT),
            "gradient norm": deque(maxlen=_RECENT),
        }

    def judge(self, loss: float, grad_norm: float) -> str | None:
        """Returns why a step has to be skipped, None to take it, and remembers the decision."""
        figures = {"loss": loss, "gradient norm": grad_norm}
        reason = next(filter(None, (self._reason(name, value) for name, value in figures.items())), None)
        if reason is None:
            self.in_a_row = 0
            for name, value in figures.items():
                self._recent[name].append(value)
        else:
            self.in_a_row += 1
            self.total += 1
        return reason

    def is_broken(self, figures: Tensor) -> Tensor:
        """The next decision of `judge` on the device: 1.0 to skip the step, else 0.0.

        Args:
            figures: loss and gradient norm [2].
        """
        # In float64, as `judge` compares; Python numbers as limits, since a tensor of them would have to be copied.
        values = figures.double().unbind()
        limits = [self._limit(name) for name in self._recent]
        taken = [value.isfinite() & (value <= limit) for value, limit in zip(values, limits, strict=True)]
        return (~(taken[0] & taken[1])).float()

    @property
    def gives_up(self) -> bool:
        """Whether more steps in a row were skipped than allowed."""
        return self.in_a_row > self.max_in_a_row

    def state_dict(self) -> dict[str, Any]:
        """State that later decisions depend on, for the checkpoint."""
        recent = {name: list(values) for name, values in self._recent.items()} if self._spike_factor else {}
        return {"total": self.total, "in_a_row": self.in_a_row, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""
        self.total, self.in_a_row = int(state["total"]), int(state["in_a_row"])
        for name, values in state["recent"].items():
            self._recent[name].extend(map(float, values))

    def _reason(self, name: str, value: float) -> str | None:
        if not isfinite(value):
            return f"{name} {value}"
        if value > self._limit(name):
            return f"{name} {value:.4g}, {value / median(self._recent[name]):.1f} times its recent median"
        return None

    def _limit(self, name: str) -> float:
        """The largest value that is no spike."""
        recent = self._recent[name]
        if self._spike_factor is None or len(recent) < _ENOUGH:
            return inf
        usual = median(recent)
        # A median of 0 has no multiples: a dataset that is learned by heart.
        return self._spike_factor * usual if usual > 0 else inf
