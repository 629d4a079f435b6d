"""Kills training runs at random moments and checks every promise about what is left.

    python -m tests.fault_injection --kills 200 --seed 0 --log kills.jsonl
    python -m tests.fault_injection --kills 5 --seed 0 --mesh 1

Jobs of a few dozen steps on the nano pack run under `ltx-titan train`'s launcher over gloo: on one rank, on two, and on
two nodes of two ranks. Each save, export and validation of such a job is hit as readily as its steps, because the
program reads from `heartbeat.json` what the run is doing before it kills a rank, a launcher or all of it. After each
kill:

- no process of the run is left, and the launchers ended with an exit code of docs/reliability.md;
- every checkpoint that was announced as complete is there, or was replaced by newer ones;
- the same command resumes from the newest complete checkpoint.

Once a job has finished in spite of its kills, its metrics, its last checkpoint and its export equal those of an
unbroken run bit for bit, and no temporary file is left.

Kills of one seed are the same kills at the same phases, though not at the same instruction. A job is one series of
kills; `--log` gets a line per kill and per series, and a second call with the same log continues after the last
complete series, so that long runs can be interrupted and split by seed.

Ranks are forked from this process with all modules imported instead of started again, which saves most of the time and
is the only difference from a user's run; `--start exec` removes it.
"""

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import ltx_titan.train
from ltx_titan.launch import launch, remove_stale_logs, torchrun_arguments
from ltx_titan.nano.pack import make_nano
from ltx_titan.parallel.stop import end_with_launcher
from ltx_titan.weights import read_metadata
from tests.jobs import read_run, write_dataset, write_job

MESHES = {"1": (1, 1), "2": (1, 2), "2x2": (2, 2)}  # nodes, ranks of each
# Every phase comes up in every few steps, and two of them in some steps.
SETTINGS: dict[str, Any] = {
    "model__init": "random",
    "model__num_layers": 1,
    "data__num_workers": 0,
    "checkpoint__interval": 3,
    "checkpoint__export_interval": 4,
    "validation__interval": 5,
    "validation__samples": [],
    "validation__held_out_samples": 2,
}
PHASES = ("training", "saving", "writing", "exporting", "validating", "starting")
# Only for what would otherwise hang: nothing is decided by how long it takes.
LIMIT_S = 600
_PR_SET_CHILD_SUBREAPER = 36
# What a user would find after "complete": written by the save's thread or, in the last step, by the loop.
_COMPLETE = re.compile(r"checkpoint of step (\d+) is complete")
_RESUMED = re.compile(r"resumed from \S*/step-(\d+):")


class Violation(AssertionError):
    """A promise that was not kept."""


@dataclass
class Kill:
    """One kill, as drawn from the seed."""

    phase: str
    after_steps: int
    delay_s: float
    target: str
    signal: signal.Signals


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
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
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
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
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
        """What the run has printed."""
        return self.log.read_text(errors="replace")

    def phase(self) -> tuple[str, int]:
        """What rank 0 of this launch is doing, and its step; ("starting", 0) until it says."""
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
        wait_for(lambda: not _descendants(), "a process outlives its launcher")

    def end(self) -> None:
        """Kills whatever is left."""
        for process in _descendants():
            os.kill(process, signal.SIGKILL)


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


def _descendants() -> list[int]:
    """Living processes below this one."""
    found, queue = [], _children(os.getpid())
    while queue:
        process = queue.pop()
        queue += _children(process)
        if _lives(process):
            found.append(process)
    return found


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


def draw_kill(rng: random.Random, mesh: str) -> Kill:
    """Draws one kill."""
    nodes, ranks = MESHES[mesh]
    targets = (
        ["job"] + [f"launcher {node}" for node in range(nodes)] + [f"rank {rank}" for rank in range(nodes * ranks)]
    )
    return Kill(
        phase=rng.choices(PHASES, weights=(4, 3, 3, 3, 2, 1))[0],
        after_steps=rng.randrange(0, 7),
        # Up to about the length of a nano step; phases are shorter.
        delay_s=rng.random() ** 2 * 0.2,
        target=rng.choice(targets),
        signal=rng.choices((signal.SIGKILL, signal.SIGTERM), weights=(3, 1))[0],
    )


def inject(run: Run, kill: Kill, resumed: int, steps: int) -> str:
    """Waits for the moment of a kill and kills; returns the phase that was hit, "ended" if the run was faster."""
    reached = min(resumed + kill.after_steps, steps)

    def is_due() -> bool:
        phase, step = run.phase()
        if kill.phase == "starting":
            return bool(run.ranks())
        return step >= reached and (phase == kill.phase or step > reached + 5)

    wait_for(lambda: run.has_ended() or is_due(), f"{kill} is never due")
    # A kill while modules are imported says little; spread those over the whole start.
    time.sleep(kill.delay_s * (20 if kill.phase == "starting" else 1))
    hit, ranks = run.phase()[0], run.ranks()
    if run.has_ended() or not ranks:
        return "ended"
    kind, _, number = kill.target.partition(" ")
    if kind == "job":
        victims = [*run.launchers, *ranks] if kill.signal == signal.SIGKILL else run.launchers
    else:
        victims = [(run.launchers if kind == "launcher" else ranks)[int(number) % max(len(ranks), 1)]]
    for victim in victims:
        # A rank that ended by itself in the meantime is as good as killed.
        with suppress(ProcessLookupError):
            os.kill(victim, kill.signal)
    return hit


def check_after(run: Run, kill: Kill, hit: str, resumed: int) -> int:
    """Checks the promises about a launch that has ended; returns the newest complete step, 0 without one.

    Raises:
        Violation: one of them does not hold.
    """
    text, folder = run.text(), run.job.parent / "run" / "checkpoint"
    steps = sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*") if path.name[5:].isdecimal())
    newest = steps[-1] if steps else 0
    announced = [int(step) for step in _COMPLETE.findall(text)]
    if newest < max([resumed, *announced]):
        raise Violation(f"checkpoints {steps} are left, but {sorted({resumed, *announced})} were complete")
    if any(folder.glob("*.damaged")):
        raise Violation("a checkpoint is damaged")
    said = [int(step) for step in _RESUMED.findall(text)]
    if said and set(said) != {resumed}:
        raise Violation(f"resumed from {said}, the newest complete one was {resumed}")
    codes = set(run.codes.values())
    if kill.signal == signal.SIGTERM and hit not in ("starting", "ended"):
        if codes != {0}:
            raise Violation(f"SIGTERM to {kill.target} while {hit}: exit codes {run.codes}, expected 0")
        logged = read_run(run.job)[-1]["step"]
        if newest != logged:
            raise Violation(f"SIGTERM to {kill.target} while {hit}: step {logged} was reached, {newest} is saved")
    # A launcher or rank that is killed in its last moments may leave a run that has finished.
    elif codes & {1, 2} and kill.signal == signal.SIGTERM:
        raise Violation(f"SIGTERM to {kill.target} while {hit}: exit codes {run.codes}")
    return newest


def outcome(job: Path, steps: int) -> dict[str, Any]:
    """Everything about a finished run that may not depend on how often it was killed."""
    folder = job.parent / "run"
    lines = [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in read_run(job)]
    state = {path.name: path.read_bytes() for path in sorted((folder / f"checkpoint/step-{steps}").glob("*.distcp"))}
    exports = {path.name: path.read_bytes() for path in sorted((folder / "export").iterdir())}
    return {"metrics": lines, "checkpoint": state, "exports": exports}


def leftovers(folder: Path) -> list[str]:
    """Temporary files of a series' folder."""
    # The next launch removes these of a killed launcher, once they are a minute old.
    for path in (folder / "tmp").iterdir():
        os.utime(path, (0, 0))
    tempfile.tempdir = str(folder / "tmp")
    remove_stale_logs()
    tempfile.tempdir = None
    kept = [path for pattern in ("*.tmp.*", "*.incomplete", "*.damaged") for path in (folder / "run").rglob(pattern)]
    return sorted(str(path.relative_to(folder)) for path in [*kept, *(folder / "tmp").iterdir()])


class Campaign:
    """All series of one call.

    Args:
        folder: where jobs and their runs are written.
        start: "fork" or "exec".
        steps: length of each job.
        log: file of one JSON line per kill and series; None writes none.
    """

    def __init__(self, folder: Path, start: str, steps: int, log: Path | None) -> None:
        self.folder, self.start, self.steps, self.log = folder, start, steps, log
        make_nano(folder / "nano")
        self.nano = next((folder / "nano").glob("*.safetensors"))
        self.data = write_dataset(folder / "data", self.nano)
        self.shape = folder / "shape.json"
        self.shape.write_text(read_metadata(self.nano).raw["config"])
        self.expected: dict[str, dict[str, Any]] = {}

    def write_job(self, name: str, mesh: str) -> Path:
        """Writes the job of a series."""
        nodes, ranks = MESHES[mesh]
        paths = {"model__shape": str(self.shape), "validation__held_out_root": str(self.data)}
        batch = {"training__steps": self.steps, "training__local_batch_size": 4 // (nodes * ranks)}
        job = write_job(self.folder / name, self.nano, self.data, **SETTINGS, **paths, **batch)
        # Random weights of one block: the released shape would take most of the time and test nothing more.
        text = job.read_text().replace(f'checkpoint_path = "{self.nano}"', f'connectors_path = "{self.nano}"')
        job.write_text(text)
        return job

    def unbroken(self, mesh: str) -> dict[str, Any]:
        """The outcome of a run without kills, computed once for each mesh."""
        if mesh not in self.expected:
            run = Run(self.write_job(f"unbroken-{mesh}", mesh), mesh, self.start)
            run.wait_until_gone()
            if set(run.codes.values()) != {0}:
                raise Violation(f"the unbroken run on {mesh} failed:\n{run.text()[-4000:]}")
            self.expected[mesh] = outcome(run.job, self.steps)
        return self.expected[mesh]

    def series(self, name: str, seed: str, mesh: str, kills: int) -> int:
        """Kills one job until it has finished, at most `kills` times; returns the number of kills.

        Raises:
            Violation: a promise was not kept; the folder of the series is left for inspection.
        """
        rng, job, done, resumed = random.Random(seed), self.write_job(name, mesh), 0, 0
        expected = self.unbroken(mesh)
        while True:
            kill = draw_kill(rng, mesh) if done < kills else None
            run = Run(job, mesh, self.start)
            try:
                hit = inject(run, kill, resumed, self.steps) if kill is not None else "none"
                run.wait_until_gone()
                newest = check_after(run, kill, hit, resumed) if kill is not None else resumed
            except Violation as error:
                raise Violation(f"series {name}, seed {seed}: {error}\n{run.text()[-4000:]}") from error
            finally:
                run.end()
            if kill is not None and hit != "ended":
                done += 1
                record = {"seed": seed, "mesh": mesh, "target": kill.target, "signal": kill.signal.name}
                codes = list(run.codes.values())
                self.write(record | {"hit": hit, "resumed": resumed, "newest": newest, "codes": codes})
            elif set(run.codes.values()) == {0}:
                break
            else:
                raise Violation(f"series {name}: ended with {run.codes}, and nobody killed it\n{run.text()[-4000:]}")
            resumed = newest
        found = outcome(job, self.steps)
        for part, value in expected.items():
            if found[part] != value:
                raise Violation(f"series {name}, seed {seed}: {part} differ from those of the unbroken run")
        if left := leftovers(job.parent):
            raise Violation(f"series {name}, seed {seed}: left {left}")
        self.write({"seed": seed, "mesh": mesh, "series": name, "kills": done, "equal": True})
        shutil.rmtree(job.parent)
        return done

    def restarted(self, mesh: str) -> None:
        """Kills a rank of a launch that may restart its ranks once, and checks that nobody notices in the end.

        Raises:
            Violation: the launch failed, or its outcome differs.
        """
        expected, job = self.unbroken(mesh), self.write_job(f"restarted-{mesh}", mesh)
        run = Run(job, mesh, self.start, restarts=1)
        try:
            first = job.parent / "run" / "checkpoint" / "step-3"
            wait_for(lambda: run.has_ended() or first.is_dir(), "no first checkpoint")
            os.kill(run.ranks()[-1], signal.SIGKILL)
            run.wait_until_gone()
        finally:
            run.end()
        if set(run.codes.values()) != {0} or not _RESUMED.findall(run.text()):
            raise Violation(f"--max-restarts on {mesh}: ended with {run.codes}\n{run.text()[-4000:]}")
        if outcome(job, self.steps) != expected:
            raise Violation(f"--max-restarts on {mesh}: not equal to the unbroken run")
        self.write({"mesh": mesh, "restarted": True, "equal": True})

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line to the log."""
        line = json.dumps({"start": self.start, **record})
        print(line, flush=True)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(line + "\n")


def finished_series(log: Path | None) -> dict[str, int]:
    """Kills of the series that a log says are complete."""
    if log is None or not log.exists():
        return {}
    records = [json.loads(line) for line in log.read_text().splitlines()]
    return {record["series"]: record["kills"] for record in records if "series" in record}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs series until `--kills` kills were survived; returns 1 after the first broken promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", choices=MESHES, nargs="*", default=list(MESHES))
    parser.add_argument("--steps", type=int, default=24, help="length of each job")
    parser.add_argument("--start", choices=("fork", "exec"), default="fork")
    parser.add_argument("--restarts", action="store_true", help="also kill a rank under --max-restarts=1 on each mesh")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    finished, survived, number = finished_series(options.log), 0, 0
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as temporary:
        campaign = Campaign(options.folder or Path(temporary), options.start, options.steps, options.log)
        while survived < options.kills:
            mesh = options.mesh[number % len(options.mesh)]
            name = f"{options.seed}-{number}-{mesh}-{options.start}"
            try:
                survived += finished.get(name) or campaign.series(name, name, mesh, min(10, options.kills - survived))
            except Violation as error:
                print(f"BROKEN: {error}", file=sys.stderr)
                return 1
            number += 1
        for mesh in options.mesh if options.restarts else ():
            try:
                campaign.restarted(mesh)
            except Violation as error:
                print(f"BROKEN: {error}", file=sys.stderr)
                return 1
    print(f"{survived} kills survived in {number} series")
    return 0


if __name__ == "__main__":
    sys.exit(main())
