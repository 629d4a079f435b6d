"""Signals that end a run, and the vote by which all ranks act on them after the same step.

Schedulers announce the end of a job's time with a signal that reaches ranks at different moments, and a background save
fails at different moments too. If each rank acted on it alone, one would save while another waits in the next step's
collectives. So the ranks vote in every step: an asynchronous all-reduce of two numbers on the host, started before the
step and read after it.
"""

import ctypes
import os
import signal
from typing import NamedTuple

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals after which a run saves and ends, sent to the launcher or to any rank."""

LAUNCHER_PID = "LTX_TITAN_LAUNCHER_PID"
"""Environment variable in which the launcher passes its process id to the ranks."""

_PR_SET_PDEATHSIG = 1


class Outcome(NamedTuple):
    """Result of a vote, the same on every rank.

    Attributes:
        stop: a stop signal that some rank has received; None without one.
        save_failed: whether a rank's background save has failed.
    """

    stop: signal.Signals | None
    save_failed: bool


class StepVote:
    """The vote of all ranks. Installs handlers for `STOP_SIGNALS` that only note the signal.

    A second SIGINT ends the process at once: the first restores its default action.
    """

    def __init__(self) -> None:
        self._received = 0
        # On the CPU, hence over gloo: it neither waits for nor delays the step's NCCL kernels.
        self._votes = torch.zeros(2, dtype=torch.int32)
        self._pending: dist.Work | None = None
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def ask(self, *, save_failed: bool = False) -> None:
        """Starts the all-reduce; every rank calls it once before a step."""
        self._votes[0], self._votes[1] = self._received, save_failed
        self._pending = dist.all_reduce(self._votes, op=dist.ReduceOp.MAX, async_op=True)

    def result(self) -> Outcome:
        """Waits for the all-reduce. Call it once after the step."""
        assert self._pending is not None, "call ask() first"
        self._pending.wait()
        self._pending = None
        number, save_failed = self._votes.tolist()
        return Outcome(signal.Signals(number) if number else None, bool(save_failed))

    def _receive(self, number: int, frame: object) -> None:
        # Only a flag: a signal can arrive in the middle of a collective, where saving would deadlock.
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGHUP and self._terminals:
            # The terminal is gone, and a line for it would be an I/O error in the middle of a step.
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in self._terminals:
                os.dup2(null, descriptor)
            os.close(null)


def end_with_launcher() -> None:
    """Makes the end of torchrun's agent a SIGTERM to this rank, so that no rank trains on as an orphan.

    The signal saves like any other. Without torchrun nothing changes: a shell that ends must not end the run. Until
    `StepVote` exists, SIGINT ends the process without a traceback: there is nothing to save yet.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # It may have ended before the call, which is not announced.
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is not None and os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)
