"""Ending a run early, on all ranks after the same step.

Schedulers announce the end of a job's time with a signal that reaches ranks at different moments. If each acted on
its own, one would save while another waits in the next step's collectives. So the ranks agree in every step, on the
host and beside the computation: a reduction of one number that starts before the step and is read after it.
"""

import signal

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Whether any rank has been told to stop. From now on the signals only set a flag here."""

    def __init__(self) -> None:
        self._received = False
        self._votes = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None
        for number in _SIGNALS:
            signal.signal(number, self._receive)

    def ask(self) -> None:
        """Starts to ask all ranks; each calls it once before a step."""
        self._votes.fill_(self._received)
        self._pending = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def is_agreed(self) -> bool:
        """The same answer on every rank; call it once after the step."""
        assert self._pending is not None, "ask() starts the question"
        self._pending.wait()
        self._pending = None
        return bool(self._votes.item())

    def _receive(self, number: int, frame: object) -> None:
        self._received = True
