"""Progress of long work as log lines, which also read well under a launcher, in a file and on a cluster."""

import logging
import time

logger = logging.getLogger(__name__)

# Seconds between lines: short enough to see that something happens, long enough not to fill a log.
_EVERY_S = 10.0


class ProgressLog:
    """Logs how far a piece of work is, at most every 10 s; work that is done before that logs nothing.

    Args:
        what: the work, such as "loading weights".
        total: its size in `unit`.
        unit: of the size; "GiB" divides by 2^30.
    """

    def __init__(self, what: str, total: float, unit: str = "") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0.0
        self._started = self._logged = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        """Counts finished work."""
        self._done += amount
        now = time.monotonic()
        if now - self._logged < _EVERY_S or self._done >= self._total:
            return
        self._logged = now
        left_s = round((now - self._started) / self._done * (self._total - self._done))
        logger.info(
            "%s: %s of %s%s, %d:%02d left",
            self._what,
            self._size(self._done),
            self._size(self._total),
            f" {self._unit}" if self._unit else "",
            left_s // 60,
            left_s % 60,
        )

    def _size(self, amount: float) -> str:
        return f"{amount / 2**30:.1f}" if self._unit == "GiB" else f"{amount:,.0f}"
