"""Named faults, each once, under the real launcher: on two GPUs over NCCL if there are any, otherwise over gloo.

    python -m tests.fault_scenarios --log scenarios.jsonl

tests/fault_injection.py draws its kills at random over gloo; these are few, and include a rank that is stopped, which
takes longer than `job.timeout_s`. Each scenario has a process and a dump folder of its own, and all run at the same
time. A scenario hurts a run, checks what is left, starts the same command again and compares the end with an unbroken
run, bit for bit. The log also says whether two unbroken runs are equal with `job.deterministic`, which all scenarios
use, and without.

SIGTERM, SIGINT and the end of `--budget` end the program and all its processes, stopped ones too; a scenario that has
not ended by then writes the end of its log. `stop-rank-1` takes, from the signal on, `--timeout`, up to 20 s in which
the time-out is explained and NCCL writes its record, and the 30 s after which torchrun kills a rank that does not
answer SIGTERM; starting before and again after that takes about half a minute each.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ltx_titan.common.files import atomic_write
from tests import fault_runs
from tests.fault_injection import Campaign, Kill, become_subreaper, check_after, inject, leftovers, outcome
from tests.fault_runs import Run, Violation, descendants, end_descendants, wait_for

_PR_SET_PDEATHSIG = 1
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
# The copy of a save takes a few milliseconds: it may not be seen in the first save, nor in the second.
PATIENCE = 20


class Scenario(NamedTuple):
    """One fault: the phase in which a target receives a signal, and the launcher's exit codes that are right."""

    phase: str
    target: str
    signal: signal.Signals
    codes: tuple[int, ...]


SCENARIOS = {
    "kill-rank-0-in-step": Scenario("training", "rank 0", signal.SIGKILL, (137,)),
    "kill-rank-1-in-step": Scenario("training", "rank 1", signal.SIGKILL, (137,)),
    "kill-rank-1-in-copy-of-save": Scenario("saving", "rank 1", signal.SIGKILL, (137,)),
    "kill-rank-0-in-write-of-save": Scenario("writing", "rank 0", signal.SIGKILL, (137,)),
    "kill-rank-1-in-write-of-save": Scenario("writing", "rank 1", signal.SIGKILL, (137,)),
    "kill-launcher-in-step": Scenario("training", "launcher 0", signal.SIGKILL, (-9,)),
    "kill-job-in-save": Scenario("writing", "job", signal.SIGKILL, (-9,)),
    "terminate-launcher": Scenario("training", "launcher 0", signal.SIGTERM, (0,)),
    "terminate-rank-1": Scenario("training", "rank 1", signal.SIGTERM, (0,)),
    # gloo raises in the rank that waits; NCCL's watchdog ends it with SIGABRT.
    "stop-rank-1": Scenario("training", "rank 1", signal.SIGSTOP, (1, 134)),
}


class Ended(BaseException):
    """The program has received a signal that ends it."""


def _end(number: int, _: object) -> None:
    # One is enough: the processes below are ended while this one unwinds.
    for other in _END_SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Ended(f"ended by {signal.Signals(number).name}")


def play(campaign: Campaign, name: str, start: str, expected: Path) -> None:
    """Body of a scenario's process; exits with 1 and says why if a promise was not kept.

    Args:
        campaign: writes jobs and the log.
        name: of the scenario.
        start: "fork" or "exec".
        expected: file in which the outcome of the unbroken run appears.
    """
    become_subreaper()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    scenario = SCENARIOS[name]
    job = campaign.write_job(name, "2")
    kill = Kill(scenario.phase, 9, 0.0, scenario.target, scenario.signal)
    started = time.monotonic()
    run = Run(job, "2", start)
    try:
        hit = inject(run, kill, 0, campaign.steps, PATIENCE)
        injected = time.monotonic()
        campaign.write({"scenario": name, "signaled": hit, "after_s": round(injected - started, 1)})
        run.wait_until_gone()
        took = time.monotonic() - injected
        newest = check_after(run, kill, hit, 0)
        text, code = run.text(), run.codes[run.launchers[0]]
        if code not in scenario.codes or newest == 0:
            raise Violation(f"exit code {code}, expected one of {scenario.codes}; newest checkpoint {newest}")
        record = {"scenario": name, "hit": hit, "code": code, "newest": newest, "ended_after_s": round(took, 1)}
        record["start"] = start
        if scenario.signal == signal.SIGSTOP:
            record |= _check_stopped(job.parent / "run", text)
        run = Run(job, "2", start)
        run.wait_until_gone()
        if set(run.codes.values()) != {0} or f"step-{newest}: step {newest} of" not in run.text():
            raise Violation(f"the restart ended with {run.codes} and did not resume from step {newest}")
        found = outcome(job, campaign.steps)
        wait_for(expected.exists, "no outcome of the unbroken run")
        unequal = [part for part, value in pickle.loads(expected.read_bytes()).items() if found[part] != value]
        if unequal:
            raise Violation(f"{unequal} differ from those of the unbroken run")
        if left := leftovers(job.parent):
            raise Violation(f"left {left}")
    except (Violation, Ended) as error:
        seconds = round(time.monotonic() - started, 1)
        campaign.write({"scenario": name, "broken": str(error), "seconds": seconds, "log": run.text()[-6000:]})
        sys.exit(1)
    finally:
        run.end()
    campaign.write(record | {"equal": True, "seconds": round(time.monotonic() - started, 1)})


def _check_stopped(folder: Path, text: str) -> dict[str, Any]:
    """Messages about a stopped rank 1, and the stacks that were written."""
    named = re.findall(r"[^\n]*rank 1, which does not answer[^\n]*", text)
    if not named:
        raise Violation("the stopped rank is not named")
    stacks = sorted(path.name for path in (folder / "stacks").iterdir())
    if "rank-0.txt" not in stacks or "File" not in (folder / "stacks" / "rank-0.txt").read_text():
        raise Violation(f"no stack of rank 0 in {stacks}")
    return {"named": named, "stacks": stacks, "end": text[-3000:]}


def compare_unbroken(campaign: Campaign) -> dict[str, Any]:
    """Runs unbroken jobs, twice each with and without `job.deterministic`; returns the deterministic outcome."""
    runs, settings = {}, campaign.settings
    for name, deterministic in (("plain", False), ("plain-again", False), ("exact", True), ("exact-again", True)):
        campaign.settings = settings | {"job__deterministic": deterministic}
        runs[name] = Run(campaign.write_job(f"unbroken-{name}", "2"), "2", campaign.start)
    campaign.settings = settings
    outcomes = {}
    for run in runs.values():
        wait_for(run.has_ended, "the unbroken runs do not end")
    for name, run in runs.items():
        if set(run.codes.values()) != {0}:
            raise Violation(f"the unbroken run {name} ended with {run.codes}\n{run.text()[-6000:]}")
        outcomes[name] = outcome(run.job, campaign.steps)
    for name in ("plain", "exact"):
        equal = {part: value == outcomes[f"{name}-again"][part] for part, value in outcomes[name].items()}
        campaign.write({"unbroken": name, "equal_twice": equal})
    if outcomes["exact"] != outcomes["exact-again"]:
        raise Violation("two unbroken runs differ in spite of job.deterministic")
    return outcomes["exact"]


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=f"default: all of {', '.join(SCENARIOS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--start", choices=("fork", "exec"), default="exec")
    parser.add_argument("--exec", nargs="*", default=[], metavar="SCENARIO", help="started with exec nevertheless")
    parser.add_argument("--limit", type=float, default=300, help="seconds that nothing may take")
    parser.add_argument("--budget", type=float, default=900, help="seconds after which everything is ended")
    parser.add_argument("--timeout", type=float, default=60, help="job.timeout_s")
    parser.add_argument("--copy-engines", action="store_true", help="bfloat16, weights gathered by copy engines")
    parser.add_argument("--log", type=Path)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the scenarios; returns 1 if a promise was not kept."""
    options = make_parser().parse_args(argv)
    fault_runs.LIMIT_S = options.limit
    become_subreaper()
    for number in _END_SIGNALS:
        signal.signal(number, _end)
    signal.alarm(math.ceil(options.budget))
    processes: list[ForkProcess] = []
    try:
        with tempfile.TemporaryDirectory(prefix="fault-scenarios-") as folder:
            try:
                _run(options, Path(folder), processes)
            finally:
                _end_all(processes)
    except Ended as error:
        print(f"BROKEN: {error}", file=sys.stderr)
    kept = sum(process.exitcode == 0 for process in processes)
    print(json.dumps({"scenarios": len(processes), "kept": kept}))
    return 0 if processes and kept == len(processes) else 1


def _run(options: argparse.Namespace, folder: Path, processes: list[ForkProcess]) -> None:
    """Plays all scenarios beside the unbroken runs; their processes are added to `processes`."""
    campaign = Campaign(folder, options.start, options.steps, options.log)
    campaign.settings |= {"job__timeout_s": options.timeout, "job__deterministic": True}
    if options.copy_engines:
        campaign.settings |= {"parallelism__fsdp_copy_engines": "on", "training__dtype": "bfloat16"}
    gpus = subprocess.run(["sh", "-c", "nvidia-smi -L"], capture_output=True, text=True, check=False).stdout
    campaign.write({"torch": torch.__version__, "nccl": _nccl(), "gpus": gpus.splitlines()})
    expected = folder / "expected.pickle"
    for name in options.names or SCENARIOS:
        start = "exec" if name in options.exec else options.start
        process = multiprocessing.get_context("fork").Process(target=play, args=(campaign, name, start, expected))
        process.start()
        processes.append(process)
    try:
        unbroken = compare_unbroken(campaign)
        with atomic_write(expected) as path:
            path.write_bytes(pickle.dumps(unbroken))
    except Violation as error:
        print(f"BROKEN: {error}", file=sys.stderr)
        for process in processes:  # they could only wait for it
            process.terminate()
    for process in processes:
        process.join()


def _end_all(processes: list[ForkProcess]) -> None:
    """Ends whatever lives; scenarios have a few seconds to write why they ended."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + 5
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    if left := descendants():
        print(f"ending {len(left)} processes", file=sys.stderr, flush=True)
    end_descendants()


def _nccl() -> str | None:
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None


if __name__ == "__main__":
    sys.exit(main())
