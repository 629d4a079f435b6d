"""Profiles a real training step of a job and says where its time goes.

    ltx-titan bench step JOB.toml [--section.key=value ...] [--out FILE]
    torchrun --nproc-per-node 2 -m ltx_titan.cli bench step JOB.toml --model.num_layers=12

Runs the job's own Trainer for a few steps on the local ranks, without checkpoints, and profiles the last one on rank 0.
Kernels are listed by class, with the sum of their times and what of it is exposed: not hidden beside computation.
`host and gaps` is the rest of an unprofiled step, in which the device waits for the host or between kernels.

Set `--training.global_batch_size` to the number of data-parallel ranks, so that a step is one micro-batch. Compare
`--compile.graphs=off` and `auto`, activation checkpointing modes, or numbers of layers.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.step_trace import CLASSES, read_trace, split_step
from ltx_titan.benchmarks.train import measure
from ltx_titan.parallel.mesh import init_distributed

DESCRIPTION = __doc__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("job", type=Path, help="job file")
    parser.add_argument("--steps", type=int, default=10, help="steps to run; all but the first few are timed")
    parser.add_argument("--out", type=Path, help="write the row as a JSON line")
    parser.set_defaults(overrides=[])


def run(arguments: argparse.Namespace) -> int:
    """Runs, profiles and prints; every rank calls it."""
    device = init_distributed()
    is_main = dist.get_rank() == 0
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("ltx_titan").setLevel(logging.INFO if is_main else logging.CRITICAL)
    row = {**environment(device), "ranks": dist.get_world_size()}
    row |= profile_job(arguments.job, arguments.overrides, arguments.steps)
    if is_main:
        write_rows(arguments.out, [row])
        print(table(row), flush=True)
    dist.destroy_process_group()
    return 0


def profile_job(job: Path, overrides: list[str], steps: int) -> dict[str, object]:
    """The row of a job: `benchmarks.train.measure`, and `split`, the profiled step's classes in milliseconds."""
    window = [f"--training.steps={steps}", f"--profiling.trace_start={steps}", "--profiling.trace_steps=1"]
    return measure(job, [*overrides, *window, "--metrics.interval=1"], split_of, untimed_steps=1)


def split_of(folder: Path) -> dict[str, object]:
    """What the trace below a job's folder comes to."""
    (path,) = (folder / "profile").glob("*-rank-0.json.gz")
    found = split_step(read_trace(path))
    return {
        "split": {kind: vars(share) for kind, share in found.shares.items()},
        "recomputed_ms": found.recomputed_ms,
        "busy_ms": found.busy_ms,
        "host_launches": found.host_launches,
        "largest_kernels_ms": found.largest,
    }


def table(row: dict) -> str:
    """The row as a table for the console."""
    step_ms = row["step_time_s"] * 1e3
    lines = [f"{'':18} {'kernels ms':>11} {'exposed ms':>11} {'of step':>8} {'launches':>9}"]

    def line(name: str, kernels: float | None, exposed: float, launches: int | None = None) -> str:
        cells = f"{'' if kernels is None else format(kernels, '.2f'):>11} {exposed:>11.2f} {exposed / step_ms:>8.1%}"
        return f"{name:18} {cells} {'' if launches is None else launches:>9}"

    for kind in CLASSES:
        share = row["split"][kind]
        if share["launches"]:
            lines.append(line(kind, share["kernel_ms"], share["exposed_ms"], share["launches"]))
    lines.append(line("host and gaps", None, step_ms - row["busy_ms"]))
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}"
    lines.append(f"{'step':18} {'':>11} {step_ms:>11.2f} (median of {row['steps_timed']}{mfu})")
    lines.append(
        f"of these, recomputed in backward: {row['recomputed_ms']:.2f} ms; enqueued by the host: "
        f"{row['host_launches']} launches"
    )
    return "\n".join(lines)
