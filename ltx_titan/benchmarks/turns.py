"""Measuring several things in one run without compiling them one after another.

Compiling takes most of a benchmark's time and no device. So everything that is measured has a process of its own: all
prepare (build, compile, warm up) at once, then each has the device to itself for its turn. What one does wrong, a
crash included, costs the others nothing. Benchmarks that were started beside each other also wait for one another: none
measures while another prepares or measures.
"""

import fcntl
import gc
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TextIO

import torch


def in_turns(works: Sequence[Callable[[Callable[[], None]], Any]], device: torch.device) -> Iterator[Any]:
    """Runs every work in a process of its own; on a CPU, which has no turns to give, one after another in this one.

    Args:
        works: pickled, and called with a function to be called once, when prepared; it returns when it is this one's
            turn. They take turns in the order given.
        device: which they share.

    Yields:
        What each returned, or the exception it raised, in the order given.
    """
    if device.type != "cuda":
        for work in works:
            yield _attempt(work, lambda: None)
        return
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for work in works:
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(work, theirs), daemon=False)
        process.start()
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
                with suppress(BrokenPipeError):
                    pipe.send(None)
            yield failed[number] if number in failed else _receive(pipe)
            process.join()


@contextmanager
def device_alone() -> Iterator[None]:
    """No other benchmark of this machine measures or prepares meanwhile."""
    with _locked(fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(how: int) -> Iterator[TextIO]:
    with (Path(tempfile.gettempdir()) / "ltx_titan_bench.lock").open("w") as lock:
        fcntl.flock(lock, how)
        yield lock


def _receive(pipe: Connection) -> Any:
    """What a process says: None that it is prepared, else its result."""
    try:
        return pipe.recv()
    except EOFError:
        return RuntimeError("the process ended without a word")


def _run(work: Callable, pipe: Connection) -> None:
    def take_turn() -> None:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        fcntl.flock(preparing, fcntl.LOCK_UN)
        pipe.send(None)
        pipe.recv()

    # Many may prepare at once; whoever measures waits for all of them.
    with _locked(fcntl.LOCK_SH) as preparing:
        pipe.send(_attempt(work, take_turn))


def _attempt(work: Callable, take_turn: Callable[[], None]) -> Any:
    try:
        return work(take_turn)
    # Whatever goes wrong with one (a compiler error, a missing library), the others are still of interest.
    except Exception as error:
        return RuntimeError(f"{type(error).__name__}: {error}"[:2000])
