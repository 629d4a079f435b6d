"""Asynchronous checkpoints: a thread writes a copy of the training state while training continues.

Writing hundreds of gigabytes takes minutes; copying them to host memory takes seconds. `BackgroundSaver.save` returns
when the copy is complete, and a thread writes it with a separate process group, so that its collectives never
interleave with the training step's. The cost is host memory for one copy of the state (fp32 weights and AdamW: 12 bytes
per parameter, over all ranks together) and some of the Python interpreter's time.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltx_titan.checkpoint.folders import KeepBest
from ltx_titan.checkpoint.state import SaveError, TrainingState, state_tensors, trainer_text, write_state
from ltx_titan.common.ranks import PeerError

logger = logging.getLogger(__name__)

# Training on for long with a disk that stays full would only lose more.
_MAX_FAILURES = 3


class BackgroundSaver:
    """Writes one state at a time in a thread; all ranks construct and call it together.

    A save fails on all ranks or on none, but each learns of it at another moment: `has_failed` is this rank's vote. The
    next `settle` or `save` then reports the failure, and raises it if too many came in a row. `wait` and `close` raise
    any.

    Args:
        folder: the job's checkpoint folder.
        keep_last: number of complete steps to keep, 0 for all.
        keep_best: steps that are kept besides these; None for none.
    """

    def __init__(self, folder: str | Path, *, keep_last: int = 0, keep_best: KeepBest | None = None) -> None:
        self._folder = Path(folder)
        self._keep_last, self._keep_best = keep_last, keep_best
        # gloo, because the thread must not launch NCCL kernels next to the training step's.
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        self._group = group
        self._host = _HostCopy()
        # One worker: saves are written in order, and their collectives on the group cannot interleave.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._failures = 0

    @property
    def has_failed(self) -> bool:
        """Whether the save in progress has failed on this rank."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def settle(self) -> bool:
        """Waits for the save in progress and returns whether it is complete, the same on every rank; True without one.

        Raises:
            SaveError, OSError, PeerError: it failed, and so did the ones before it, three in all; or a rank is gone.
        """
        if self._pending is None:
            return True
        try:
            self.wait()
        except (SaveError, OSError, PeerError) as error:
            self._failures += 1
            if self._failures == _MAX_FAILURES:
                raise
            logger.error("A checkpoint failed (%d of %d in a row): %s", self._failures, _MAX_FAILURES, error)
            return False
        self._failures = 0
        return True

    def save(self, step: int, state: TrainingState) -> None:
        """Copies the state and starts writing it; waits first for the previous save, if it is not complete.

        Interruptions, retention and errors are handled as in `save_state`.
        """
        if self._pending is not None and not self._pending.done():
            logger.warning(
                "Step %d: training is blocked until the previous checkpoint is written; increase checkpoint.interval, "
                "or write to a faster disk.",
                step,
            )
        self.settle()
        tensors = self._host.take(state_tensors(state))
        self._pending = self._thread.submit(self._write, step, tensors, trainer_text(state, step))

    def wait(self) -> Path | None:
        """Waits for the save in progress and returns its folder; None if there is none."""
        # Cleared first, so that an error is raised once.
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def close(self) -> None:
        """Waits for the save in progress and frees the host copy."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._host.release()
            dist.destroy_process_group(self._group)

    def _write(self, step: int, tensors: dict[str, Tensor], trainer: str) -> Path:
        started = time.perf_counter()
        path = write_state(self._folder, step, tensors, trainer, self._keep_last, self._keep_best, self._group)
        # From the thread: the next step may be minutes away, and until then nobody could know that a kill is safe.
        logger.info("checkpoint of step %d is complete: written in %.1f s", step, time.perf_counter() - started)
        return path


class _HostCopy:
    """Copies of this rank's shards in host memory, pinned for CUDA tensors and reused from save to save.

    torch's own stager pickles the tensors' Python objects, and on torch 2.11 cannot copy a sharded one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies tensors to host memory; DTensors keep their mesh and placements."""
        copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        # The copies are asynchronous, and the next step overwrites their sources.
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies

    def release(self) -> None:
        """Frees the buffers."""
        self._buffers.clear()

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        # The attribute, because to_local() makes a view, which subclasses of torchao's optimizers do not support.
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        if type(local) is Tensor:
            buffer = self._buffers.get(name)
            if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=True)
        else:  # a quantized optimizer state is a subclass of several tensors, which implements the copy
            buffer = local.detach().to("cpu", copy=True)
        # The constructor, because from_local would move the copy to the mesh's device.
        return DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
