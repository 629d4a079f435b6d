"""Launches of a job that are killed: their launchers, ranks and logs, and what is left of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import ltx_titan.train
from ltx_titan.launch import launch, torchrun_arguments
from ltx_titan.parallel.stop import end_with_launcher

MESHES = {"1": (1, 1), "2": (1, 2), "2x2": (2, 2)}  # nodes, ranks of each
# Only for what would otherwise hang: nothing is decided by how long it takes.
LIMIT_S = 600
# Below the ports that the system hands out by itself, one of which another run may be given in the meantime.
_PORTS = range(16000, 32000)


class Violation(AssertionError):
    """A promise that was not kept."""


class ForkedRank(subprocess.Popen):
    """A rank as torchrun starts it, in a session of its own, but forked with its modules instead of executed."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str], stdout: Any, stderr: Any, **_: object) -> None:
        self.args, self.returncode, self._child_created = args, None, True
        self.stdin = self.stdout = self.stderr = None
        self._waitpid_lock = threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            _become(lambda: _rank_main(args, env), stdout, stderr)


def _rank_main(args: tuple[str, ...], env: dict[str, str]) -> int:
    os.environ.clear()
    os.environ.update(env)
    end_with_launcher()
    return ltx_titan.train.main(args[args.index("ltx_titan.train") + 1 :])


def _become(main: Callable[[], int | None], stdout: Any, stderr: Any) -> None:
    """Turns a forked process into a new program; does not return."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        # None is the launcher's own output, as of rank 0.
        for number, file in ((1, stdout), (2, stderr)):
            if file is not None:
                os.dup2(file.fileno(), number)
        # Otherwise the sockets of the launcher's store would live on with its ranks.
        os.closerange(3, 4096)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        code = main() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Run:
    """One launch of a job: its launchers, its log, and all processes that descend from them."""

    def __init__(self, job: Path, mesh: str, start: str, restarts: int = 0) -> None:
        self.job, self.log = job, job.parent / "log.txt"
        nodes, ranks = MESHES[mesh]
        environment = {
            "NGPU": str(ranks),
            "OMP_NUM_THREADS": "1",
            "MAX_RESTARTS": str(restarts),
            "TMPDIR": str(job.parent / "tmp"),
        }
        if nodes > 1:
            port = _free_port()
            environment |= {"NNODES": str(nodes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        (job.parent / "tmp").mkdir(exist_ok=True)
        self.log.write_text("")
        self.launchers = [self._launch(environment | {"NODE_RANK": str(node)}, start) for node in range(nodes)]
        self.codes: dict[int, int] = {}

    def _launch(self, environment: dict[str, str], start: str) -> int:
        with self.log.open("a") as log:
            if start == "exec":
                command = [sys.executable, "-m", "ltx_titan.cli", "train", str(self.job)]
                return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log).pid
            if (process := os.fork()) > 0:
                return process
            tempfile.tempdir = None
            os.environ.update(environment)
            subprocess_handler.Popen = ForkedRank
            _become(lambda: launch(torchrun_arguments(self.job, [], os.environ)), log, log)
            raise AssertionError("not reached")

    def ranks(self) -> list[int]:
        """Processes of the ranks that live, by launcher."""
        return [child for launcher in self.launchers for child in _children(launcher) if _lives(child)]

    def text(self) -> str:
        """Output of the run."""
        return self.log.read_text(errors="replace")

    def phase(self) -> tuple[str, int]:
        """Phase of rank 0 in this launch, and its step; ("starting", 0) until it says."""
        folder = self.job.parent / "run"
        try:
            record = json.loads((folder / "heartbeat.json").read_text())
        except (OSError, ValueError):
            return "starting", 0
        if record["pid"] not in self.ranks():  # of an earlier launch
            return "starting", 0
        phase = record["phase"]
        # The background save, which no phase covers.
        if phase == "training" and any((folder / "checkpoint").glob("*.incomplete")):
            phase = "writing"
        return phase, record["step"]

    def has_ended(self) -> bool:
        """Whether all launchers have ended; collects their exit codes."""
        for launcher in self.launchers:
            if launcher not in self.codes:
                process, status = os.waitpid(launcher, os.WNOHANG)
                if process:
                    self.codes[launcher] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.launchers)

    def wait_until_gone(self) -> None:
        """Waits for the launchers and every process they have started."""
        wait_for(self.has_ended, f"the launchers {self.launchers} do not end")
        # Orphans become children of this process, which is their subreaper.
        wait_for(lambda: not descendants(), "a process outlives its launcher")

    def end(self) -> None:
        """Kills whatever is left."""
        end_descendants()


def _free_port() -> int:
    """A port of this machine for a rendezvous; programs that run at the same time try different ones."""
    start = os.getpid() * 61 + time.monotonic_ns() // 10**6
    for number in range(len(_PORTS)):
        port = _PORTS[(start + number) % len(_PORTS)]
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise OSError("no free port")


def _children(process: int) -> list[int]:
    try:
        files = list(Path(f"/proc/{process}/task").glob("*/children"))
        return [int(child) for file in files for child in file.read_text().split()]
    except OSError:  # it ended
        return []


def _lives(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def descendants() -> list[int]:
    """Living processes below this one."""
    found, queue = [], _children(os.getpid())
    while queue:
        process = queue.pop()
        queue += _children(process)
        if _lives(process):
            found.append(process)
    return found


def end_descendants(patience_s: float = 60.0) -> None:
    """Kills every process below this one, stopped ones too, and waits for their end.

    Args:
        patience_s: for processes that the driver of a GPU still holds; those are named and left.
    """
    deadline = time.monotonic() + patience_s
    # Again and again: a launcher may have been about to start a rank.
    while left := descendants():
        for process in left:
            with suppress(ProcessLookupError):  # its own parent has collected it
                os.kill(process, signal.SIGKILL)
        if time.monotonic() > deadline:
            print(f"{left} do not end", file=sys.stderr, flush=True)
            return
        time.sleep(0.01)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Waits until a condition holds.

    Raises:
        Violation: it does not hold within `LIMIT_S`.
    """
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise Violation(f"{what} within {LIMIT_S} s")
        time.sleep(0.005)
