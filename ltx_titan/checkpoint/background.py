"""Saves training state while training goes on.

Writing hundreds of gigabytes takes minutes; copying them to host memory takes seconds. `BackgroundSaver.save` returns
when the copy is made, and a thread writes it with a communication group of its own, so that its collectives never mix
with the training step's. The cost is host memory for one copy of the state (fp32 weights and AdamW: 12 bytes per
parameter, over all ranks together) and some of the Python interpreter's time.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from ltx_titan.checkpoint.state import TrainingState, state_tensors, trainer_text, write_state


class BackgroundSaver:
    """Writes one state at a time in a thread; all ranks build and call it together.

    An error in the thread is raised, on every rank, by the next `save`, `wait` or `close`.

    Args:
        folder: the job's checkpoint folder.
        keep_last: how many complete steps to keep, 0 for all.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 0) -> None:
        self._folder = Path(folder)
        self._keep_last = keep_last
        self._group = dist.new_group(backend="gloo")
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=pinned,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=pinned,
            )
        )
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: TrainingState) -> None:
        """Copies the state and starts to write it; waits first for the save before, if that is not done.

        What `save_state` promises about interruptions, retention and errors holds here as well.
        """
        self.wait()
        tensors = self._stager.stage(state_tensors(state))
        assert isinstance(tensors, dict)
        self._pending = self._thread.submit(
            write_state, self._folder, step, tensors, trainer_text(state, step), self._keep_last, self._group
        )

    def wait(self) -> Path | None:
        """Waits until the save in progress is complete, and returns its folder; None if there is none."""
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def close(self) -> None:
        """Waits for the save in progress and frees the host copy."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._stager.close()
            dist.destroy_process_group(self._group)
