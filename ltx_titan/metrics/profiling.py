"""Records a few steps with torch's profiler, and optionally the history of CUDA memory, into files.

Steps are counted from the start of the job, so a resumed job profiles the window only if it is still to come.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ltx_titan.common.files import atomic_write

logger = logging.getLogger(__name__)

# Enough for some steps of a 48-layer model with checkpointing; older events fall out.
_MEMORY_EVENTS = 200_000


@contextmanager
def profile_steps(
    dump_folder: str | Path,
    *,
    first_step: int | None,
    steps: int = 3,
    memory: bool = False,
    rank: int = 0,
) -> Iterator[Callable[[int], None]]:
    """Profiles the steps `first_step` to `first_step + steps - 1`.

    Yields:
        A function to be called with the step's number before each step.

    Writes `profile/steps-A-B-rank-R.json.gz` (for Perfetto or chrome://tracing), and with `memory` a `.pickle` of the
    same name (for pytorch.org/memory_viz), under the dump folder. A job that ends within the window writes what
    it has recorded.

    Args:
        dump_folder: the job's folder.
        first_step: first profiled step, counted from 1; None profiles nothing. Choose one after the first steps,
            which compile.
        steps: how many.
        memory: record CUDA memory as well; on a CPU a warning is logged instead.
        rank: this process, for the file's name.
    """
    if first_step is None:
        yield lambda step: None
        return
    window = _Window(Path(dump_folder) / "profile", first_step, first_step + steps - 1, memory, rank)
    try:
        yield window.before_step
    finally:
        window.stop()


class _Window:
    def __init__(self, folder: Path, first: int, last: int, memory: bool, rank: int) -> None:
        self._folder = folder
        self._first = first
        self._last = last
        self._rank = rank
        self._records_memory = memory and torch.cuda.is_available()
        if memory and not self._records_memory:
            logger.warning("profiling.memory_snapshot = true is ignored: memory history is recorded on CUDA only.")
        self._profile: profile | None = None

    def before_step(self, step: int) -> None:
        if step == self._first:
            self._start()
        elif step == self._last + 1:
            self.stop()

    def _start(self) -> None:
        if self._records_memory:
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        # Shapes tell the layers of the two streams apart, which run the same kernels.
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def stop(self) -> None:
        if self._profile is None:
            return
        if torch.cuda.is_available():
            # Kernels still in the queue belong to the window.
            torch.cuda.synchronize()
        finished, self._profile = self._profile, None
        finished.stop()
        stem = f"steps-{self._first}-{self._last}-rank-{self._rank}"
        self._publish(f"{stem}.json.gz", finished.export_chrome_trace)
        if self._records_memory:
            self._publish(f"{stem}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)

    def _publish(self, name: str, write: Callable[[str], None]) -> None:
        # The exporter compresses if the name ends in .gz.
        with atomic_write(self._folder / name, suffix=Path(name).suffix) as temporary:
            write(str(temporary))
        logger.info("profiling: wrote %s", self._folder / name)
