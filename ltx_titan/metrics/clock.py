"""Step time on the device.

A GPU works behind the host: when Python has called the last operation of a step, up to a thousand kernels may still be
queued. Reading the host's clock at that moment measures how fast work is enqueued, not how fast it is done. `StepClock`
waits for the step's stream before every reading, so a lap is the time between the ends of two steps on the device.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def wait_for_device(device: torch.device) -> None:
    """Blocks until the work enqueued on the current stream is done; on a CPU it is done already."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class StepClock:
    """Seconds between the ends of steps. Starts when it is made.

    Args:
        device: where steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._read()

    def lap(self) -> float:
        """Seconds since the previous lap, without pauses; waits for the device. The next lap starts here."""
        now = self._read()
        elapsed_s, self._started = now - self._started, now
        return elapsed_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes what runs inside, such as a validation or a save.

        Work enqueued before belongs to the step, so the device is waited for on entry as well.
        """
        stopped = self._read()
        try:
            yield
        finally:
            self._started += self._read() - stopped

    def _read(self) -> float:
        wait_for_device(self._device)
        return time.perf_counter()
