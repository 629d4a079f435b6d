"""Starts the ranks of a job with torchrun, for `ltx-titan train`.

torchrun is changed in three ways. Stop signals (`STOP_SIGNALS`) are passed on to the ranks, which save and stop after
their current step, however long that takes: torchrun alone would die of SIGUSR1, and kill the ranks 30 seconds after
any other. A rank that failed has given its reason, which thirty lines of torchrun's own report would bury, so they
shrink to one; a reason that no console shows, because another rank than the first had it, is printed here. And the
ranks' log files are removed at the end.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import main as torchrun

from ltx_titan.common.files import held, is_held
from ltx_titan.common.ranks import number_of
from ltx_titan.parallel.join import check_address, report_lost
from ltx_titan.parallel.stop import LAUNCHER_PID, STOP_SIGNALS

# Prefix of the folder of the ranks' log files.
_LOGS = "ltx-titan-logs-"


def torchrun_arguments(job: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Command line of torchrun for a job.

    Args:
        job: job file.
        overrides: `--section.key=value` of the job.
        environment: NGPU, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and MAX_RESTARTS; empty values count as unset.

    Raises:
        ValueError: a variable is not a number that fits the others, or there are several nodes and no MASTER_ADDR.
    """
    # Scripts of schedulers often export variables that are empty.
    values = {name: value for name, value in environment.items() if value}
    # torchrun would report a wrong one with a traceback, or wait for nodes that never come.
    nodes = number_of(values, "NNODES", 1, at_least=1)
    number_of(values, "NODE_RANK", 0, at_least=0, at_most=nodes - 1)
    number_of(values, "MASTER_PORT", 0, at_least=0, at_most=65535)
    processes = number_of(values, "NGPU", max(torch.cuda.device_count(), 1), at_least=1)
    if nodes > 1:
        if "MASTER_ADDR" not in values:
            raise ValueError(f"MASTER_ADDR is not set, and NNODES is {nodes}; set it to the address of node 0.")
        rendezvous = ["--node-rank", values.get("NODE_RANK", "0"), "--master-addr", values["MASTER_ADDR"]]
        rendezvous += ["--master-port", values.get("MASTER_PORT", "29500")]
    elif "MASTER_PORT" in values:
        rendezvous = ["--master-addr", values.get("MASTER_ADDR", "localhost"), "--master-port", values["MASTER_PORT"]]
    else:
        # A port that the system chooses, so that several jobs can share a node.
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    restarts = number_of(values, "MAX_RESTARTS", 0, at_least=0)
    arguments = ["--nnodes", str(nodes), "--nproc-per-node", str(processes), *rendezvous]
    arguments += ["--max-restarts", str(restarts)]
    # Rank 0 writes to the console itself: a progress bar needs a terminal, and lines get no prefix. The others write to
    # files.
    if processes > 1:
        arguments += ["--redirects", ",".join(f"{rank}:3" for rank in range(1, processes))]
    # torchrun replaces the handlers of the signals that it is to handle; the stop signals are handled here.
    arguments += ["--signals-to-handle", "SIGQUIT"]
    return [*arguments, "-m", "ltx_titan.train", str(job), *overrides]


def check_nodes(arguments: Sequence[str]) -> None:
    """Refuses an address of the first node that torchrun would wait for without a word.

    Args:
        arguments: from `torchrun_arguments`.

    Raises:
        ValueError: MASTER_ADDR does not resolve within 30 s.
    """
    values = dict(pairwise(arguments))
    if values["--nnodes"] != "1":
        check_address(values["--master-addr"], int(values["--master-port"]))


def launch(arguments: Sequence[str]) -> int:
    """Runs torchrun; returns the exit code of the worker that failed first, or 0."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    if int(arguments[arguments.index("--nproc-per-node") + 1]) > 1:
        # What torchrun would set, with a warning of five lines.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Its reports of failed workers, of which one line is made below.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    remove_stale_logs()
    with tempfile.TemporaryDirectory(prefix=_LOGS) as logs, held(Path(logs)):
        # torchrun copies the first error of a worker to its own error file, and complains without one.
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(Path(logs) / "error.json")
        stop = _StopHandler(logs)
        try:
            torchrun(["--log-dir", logs, *arguments])
        except ChildFailedError as error:
            failures = _first_to_blame(error)
            _inform_first_node(arguments, *failures[0])
            return _report(failures, stop.received)
    return 0


def remove_stale_logs() -> None:
    """Removes the log folders of killed launchers from the temporary folder; those of living ones are locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_LOGS}*"):
        # A minute, because a launcher makes its folder before it locks it.
        with suppress(OSError):
            if (
                folder.stat().st_uid == os.getuid()
                and time.time() - folder.stat().st_mtime > 60
                and not is_held(folder)
            ):
                shutil.rmtree(folder, ignore_errors=True)


class _StopHandler:
    """Passes stop signals on to the ranks; a second SIGINT kills them.

    Attributes:
        received: the first signal; None without one.
    """

    def __init__(self, logs: str) -> None:
        self.received: signal.Signals | None = None
        self._logs = logs
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        children = _children()
        if self.received is None:
            self.received = signal.Signals(number)
        elif number == signal.SIGINT or not children:
            self._end(children)
        if not children:  # still waiting for other nodes
            self._end(children)
        if number == signal.SIGINT:
            _say("stopping after the current step; press Ctrl-C again to end at once and lose the steps since the save")
        for child in children:
            # SIGINT is sent as SIGTERM, of which a rank that is still importing modules dies without a traceback.
            _send(child, signal.SIGTERM if number == signal.SIGINT else number)

    def _end(self, children: list[int]) -> NoReturn:
        for child in children:
            _send(child, signal.SIGKILL)
        shutil.rmtree(self._logs, ignore_errors=True)
        assert self.received is not None
        _say(f"ended by {self.received.name}")
        # Not an exception: torchrun would wait for the ranks to report.
        os._exit(128 + self.received)


def _first_to_blame(error: ChildFailedError) -> list[tuple[int, ProcessFailure]]:
    """Ranks of this node that failed, those with an error of their own first, then killed ones.

    The others only lost the connection to these. Ranks that ended by SIGTERM are last: torchrun sends it to the others
    once a rank has failed.
    """
    return sorted(
        error.failures.items(),
        key=lambda item: (
            _own_error(item[1]) is None,
            item[1].exitcode == -signal.SIGTERM,
            item[1].exitcode > 0,
            item[1].timestamp,
            item[0],
        ),
    )


def _inform_first_node(arguments: Sequence[str], rank: int, failure: ProcessFailure) -> None:
    """Spares the other nodes the wait for ranks that have not joined yet and never will."""
    values = dict(pairwise(arguments))
    # The first node hosts the store, and takes it along.
    if values["--nnodes"] != "1" and values.get("--node-rank", "0") != "0" and "--master-port" in values:
        message = f"rank {rank} ended with exit code {failure.exitcode}"
        report_lost(values["--master-addr"], int(values["--master-port"]), message)


def _report(failures: Sequence[tuple[int, ProcessFailure]], stop: signal.Signals | None) -> int:
    """Prints what the console does not show yet of the failed ranks; returns the exit code."""
    rank, failure = failures[0]
    if stop is not None and -failure.exitcode in STOP_SIGNALS:
        _say(f"stopped by {stop.name} before the first step: there was nothing to save.")
        return 128 + stop
    shown = {_own_error(failure) for _, failure in failures if failure.local_rank == 0}
    for number, other in failures:
        message = _own_error(other)
        if message is not None and message not in shown:
            shown.add(message)
            _say(f"rank {number}: {message}")
    _say(
        f"rank {rank} was the first of this node to fail (exit code {failure.exitcode}); its message is above. If it "
        "lost the connection to another rank, see the log of that rank's node."
    )
    return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode


def _own_error(failure: ProcessFailure) -> str | None:
    """The error that a rank wrote to its error file; None if it was killed or lost another rank."""
    message = failure.error_file_data.get("message")
    return message.get("message") if isinstance(message, dict) else None


def _children() -> list[int]:
    """Process ids of the ranks: torchrun has no other children."""
    files = Path("/proc/self/task").glob("*/children")
    found: list[int] = []
    for file in files:
        # Called in signal handlers: a thread may end while the list is made.
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _say(text: str) -> None:
    print(f"[ltx_titan] {text}", file=sys.stderr, flush=True)
