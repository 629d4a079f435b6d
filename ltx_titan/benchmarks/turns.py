"""Parallel compilation and exclusive timing of several benchmark cases.

Compilation takes most of the time of a benchmark and does not need the device. Each case therefore has its own process:
all prepare (build, compile, warm up) in parallel, then one after another has the device exclusively. Failures are
isolated: a crash in one process does not affect the others. Benchmarks that are started at the same time also exclude
each other: none measures while another prepares or measures.
"""

import ctypes
import fcntl
import gc
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import torch

_PR_SET_PDEATHSIG = 1


def in_turns(works: Sequence[Callable[[Callable[[], None]], Any]], device: torch.device) -> Iterator[Any]:
    """Runs every case in its own process; on a CPU one after another in this process.

    Args:
        works: picklable functions, one per case. Each receives a function that it calls once when it is prepared, and
            which returns when the case has the device; this happens in the order of `works`.
        device: device that they share.

    Yields:
        The return value of each case, or an exception if it failed, in the order of `works`.
    """
    if device.type != "cuda":
        for work in works:
            yield _attempt(work, lambda: None)
        return
    # Not fork: a CUDA context does not survive it.
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for work in works:
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(work, theirs), daemon=False)
        process.start()
        # Or the end of a process would not be seen as the end of its pipe.
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    failed: dict[int, Any] = {}
    unprepared = dict(enumerate(pipes))
    while unprepared:
        ready = wait(list(unprepared.values()))
        for number in [number for number, pipe in unprepared.items() if pipe in ready]:
            message = _receive(unprepared.pop(number))
            if message is not None:
                failed[number] = message
    with device_alone():
        for number, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
            if number not in failed:
                # The process may have ended since; `_receive` then reports it.
                with suppress(BrokenPipeError):
                    pipe.send(None)
            yield failed[number] if number in failed else _receive(pipe)
            process.join()


@contextmanager
def device_alone() -> Iterator[None]:
    """Excludes other benchmarks on this machine from measuring or preparing."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(how: int) -> Iterator[TextIO]:
    with (Path(tempfile.gettempdir()) / "ltx_titan_bench.lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield lock


def _receive(pipe: Connection) -> Any:
    """The message of a process: None once it is prepared, else its result."""
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended without a result")


def _run(work: Callable, pipe: Connection) -> None:
    def take_turn() -> None:
        gc.collect()
        torch.cuda.synchronize()
        # All processes share the device's memory: what this one does not use now, the one that measures may need.
        torch.cuda.empty_cache()
        # The lock for preparing ends here, or `device_alone` would wait for the processes that wait for it.
        fcntl.flock(preparing, fcntl.LOCK_UN)
        pipe.send(None)
        pipe.recv()

    # The parent may be killed, and nobody would end this process, which computes.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A shared lock: many may prepare in parallel, and measuring waits for all of them.
    with _locked(fcntl.LOCK_SH) as preparing:
        pipe.send(_attempt(work, take_turn))


def _attempt(work: Callable, take_turn: Callable[[], None]) -> Any:
    try:
        return work(take_turn)
    # A failure of one case (a compiler error, a missing library) must not lose the results of the others.
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])
