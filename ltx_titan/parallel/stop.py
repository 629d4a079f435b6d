"""Stops a run early, on all ranks after the same step.

Schedulers announce the end of a job's time with a signal that reaches ranks at different moments. If each rank acted on
it alone, one would save while another waits in the next step's collectives. So the ranks agree in every step: an
asynchronous all-reduce of one number on the host, started before the step and read after it.
"""

import signal

import torch
import torch.distributed as dist

# SIGUSR1 is what train_configs/slurm requests before the time limit. SIGINT stays Python's own: Ctrl-C ends a run at
# once.
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Agreement of all ranks on whether any has received a stop signal. Installs handlers that only set a flag."""

    def __init__(self) -> None:
        self._received = False
        # On the CPU, hence over gloo: it neither waits for nor delays the step's NCCL kernels.
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def ask(self) -> None:
        """Starts the all-reduce; every rank calls it once before a step."""
        self._votes.fill_(self._received)
        self._pending = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def is_agreed(self) -> bool:
        """Waits for the all-reduce; the same answer on every rank. Call it once after the step."""
        assert self._pending is not None, "call ask() first"
        self._pending.wait()
        self._pending = None
        return bool(self._votes.item())

    def _receive(self, number: int, frame: object) -> None:
        # Only a flag: a signal can arrive in the middle of a collective, where saving would deadlock.
        self._received = True
