"""Garbage collection at the same step on all ranks: one that pauses alone makes all others wait in a collective."""

import gc


class GarbageCollector:
    """Switches Python's own collection off and collects the two young generations every `interval` steps.

    torchtitan has the same, but importing it takes a third of a rank's start.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        gc.disable()
        gc.collect(1)

    def after(self, step: int) -> None:
        """Collects if this step is a multiple of the interval."""
        if step % self._interval == 0:
            gc.collect(1)
