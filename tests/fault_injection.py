"""Kills training runs at random moments and checks every promise about what is left.

    python -m tests.fault_injection --kills 200 --seed 0 --log kills.jsonl
    python -m tests.fault_injection --kills 200 --seed 1 --budget 600 --log more.jsonl   # as many as 10 minutes permit
    python -m tests.fault_injection --summary kills.jsonl more.jsonl

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
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_titan.launch import remove_stale_logs
from ltx_titan.nano.pack import make_nano
from ltx_titan.weights import read_metadata
from tests import fault_runs
from tests.fault_runs import MESHES, Run, Violation, wait_for
from tests.jobs import read_run, write_dataset, write_job

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
_PR_SET_CHILD_SUBREAPER = 36
# What a user would find after "complete": written by the save's thread or, in the last step, by the loop.
_COMPLETE = re.compile(r"checkpoint of step (\d+) is complete")
_ALONE = re.compile(r"lost the connection to another rank|rank [\d, ]+ of \d+ did not join")
_RESUMED = re.compile(r"resumed from \S*/step-(\d+):")


@dataclass
class Kill:
    """One kill, as drawn from the seed."""

    phase: str
    after_steps: int
    delay_s: float
    target: str
    signal: signal.Signals


def become_subreaper() -> None:
    """Makes this process the parent of every orphan below it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


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


def inject(run: Run, kill: Kill, resumed: int, steps: int, patience: int = 5) -> str:
    """Waits for the moment of a kill and kills; returns the phase that was hit, "ended" if the run was faster.

    The phase of the kill is awaited for `patience` steps; then any is hit.
    """
    reached = min(resumed + kill.after_steps, steps)

    def is_due() -> bool:
        phase, step = run.phase()
        if kill.phase == "starting":
            return bool(run.ranks())
        return step >= reached and (phase == kill.phase or step > reached + patience)

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
        # A rank that ended by itself in the meantime counts as killed.
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
    # Before the first step there is nothing to save: the other node loses the connection or waits in vain, and says so.
    elif 1 in codes and kill.signal == signal.SIGTERM and _ALONE.search(text):
        if "Traceback" in text:
            raise Violation(f"SIGTERM to {kill.target} while {hit}: a traceback")
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
        budget_s: no kill begins after this time; None sets no limit.
        **settings: of every job, besides `SETTINGS`.
    """

    def __init__(
        self, folder: Path, start: str, steps: int, log: Path | None, budget_s: float | None = None, **settings: Any
    ) -> None:
        self.folder, self.start, self.steps, self.log = folder, start, steps, log
        self.settings = SETTINGS | settings
        self.records: list[dict[str, Any]] = []
        self.began = time.monotonic()
        self.budget_s = float("inf") if budget_s is None else budget_s
        make_nano(folder / "nano")
        self.nano = next((folder / "nano").glob("*.safetensors"))
        self.data = write_dataset(folder / "data", self.nano)
        self.shape = folder / "shape.json"
        self.shape.write_text(read_metadata(self.nano).raw["config"])
        self.expected: dict[str, dict[str, Any]] = {}

    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() - self.began > self.budget_s

    def write_job(self, name: str, mesh: str) -> Path:
        """Writes the job of a series."""
        nodes, ranks = MESHES[mesh]
        paths = {"model__shape": str(self.shape), "validation__held_out_root": str(self.data)}
        batch = {"training__steps": self.steps, "training__local_batch_size": 4 // (nodes * ranks)}
        job = write_job(self.folder / name, self.nano, self.data, **self.settings, **paths, **batch)
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
            kill = draw_kill(rng, mesh) if done < kills and not self.is_over() else None
            launched = time.monotonic()
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
                record |= {"hit": hit, "resumed": resumed, "newest": newest, "codes": codes}
                self.write(record | {"seconds": round(time.monotonic() - launched, 1)})
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
        record = {"start": self.start, **record}
        self.records.append(record)
        line = json.dumps(record)
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


def summary(records: Sequence[dict[str, Any]]) -> str:
    """A table of the kills that were survived: target and start by the phase that was hit."""
    kills = [record for record in records if "hit" in record]
    rows: dict[tuple[str, ...], Counter[str]] = {}
    for kill in kills:
        key = (kill["mesh"], kill["start"], kill["target"].split()[0], kill["signal"])
        rows.setdefault(key, Counter())[kill["hit"]] += 1
    phases = [*PHASES, *sorted({kill["hit"] for kill in kills} - set(PHASES))]
    lines = [f"{'mesh':5}{'start':6}{'target':10}{'signal':9}" + "".join(f"{phase:>12}" for phase in phases)]
    for (mesh, start, target, name), counts in sorted(rows.items()):
        lines.append(f"{mesh:5}{start:6}{target:10}{name:9}" + "".join(f"{counts[phase]:12}" for phase in phases))
    equal = sum("series" in record for record in records)
    return "\n".join([*lines, f"{len(kills)} kills survived in {equal} series that ended equal to an unbroken run"])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs series until `--kills` kills were survived; returns 1 after the first broken promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", choices=MESHES, nargs="*", default=list(MESHES))
    parser.add_argument("--steps", type=int, default=24, help="length of each job")
    parser.add_argument("--start", choices=("fork", "exec"), default="fork")
    parser.add_argument("--restarts", action="store_true", help="also kill a rank under --max-restarts=1 on each mesh")
    parser.add_argument("--budget", type=float, help="seconds after which no kill begins")
    parser.add_argument("--limit", type=float, default=600, help="seconds that nothing may take")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="LOG", help="only print a table of these logs")
    parser.add_argument("--folder", type=Path, help="default: a temporary one")
    parser.add_argument("--log", type=Path)
    options = parser.parse_args(argv)
    if options.summary:
        print(summary([json.loads(line) for log in options.summary for line in log.read_text().splitlines()]))
        return 0
    fault_runs.LIMIT_S = options.limit
    become_subreaper()
    finished, survived, number = finished_series(options.log), 0, 0
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as temporary:
        folder = options.folder or Path(temporary)
        campaign = Campaign(folder, options.start, options.steps, options.log, options.budget)
        while survived < options.kills and not campaign.is_over():
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
    if campaign.is_over():
        print(f"the {options.budget:.0f} s are over")
    print(summary(campaign.records))
    print(f"{survived} kills survived in {number} series")
    return 0


if __name__ == "__main__":
    sys.exit(main())
