"""Profiles a real training step of a job: kernels by class, communication, optimizer, host and gaps.

    ltx-titan bench step JOB.toml [--section.key=value ...] [--out FILE]
    torchrun --nproc-per-node 2 -m ltx_titan.cli bench step JOB.toml --model.num_layers=12

Runs the job's own Trainer for a few steps on the local ranks, without checkpoints, and profiles the last one on rank 0.
Kernels are listed by class, with the sum of their times and what of it is exposed: not overlapped with compute.
`host and gaps` is the rest of an unprofiled step, in which the device waits for the host or between kernels.

Set `--training.global_batch_size` to the number of data-parallel ranks, so that a step is one micro-batch. Compare
`--compile.graphs=off` and `auto`, activation checkpointing modes, or numbers of layers.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.step_trace import CLASSES, read_trace, split_step
from ltx_titan.benchmarks.train import TIMEOUT_S, measure
from ltx_titan.common.logs import set_up_logging
from ltx_titan.common.options import Maybe, Overrides, Positional
from ltx_titan.parallel.mesh import init_distributed
from ltx_titan.parallel.stop import end_with_launcher

DESCRIPTION = __doc__


@dataclass(frozen=True)
class StepBenchOptions:
    """Options of `ltx-titan bench step`."""

    job: Positional[Path]
    """Job file."""

    steps: int = 10
    """Steps to run; all but the first few are timed."""

    out: Maybe[Path] = None
    """File for the row, as a JSON line."""

    overrides: Overrides = ()
    """Overrides of the job."""


def run(options: StepBenchOptions) -> int:
    """Runs, profiles and prints; every rank calls it."""
    end_with_launcher()
    device = init_distributed(TIMEOUT_S)
    set_up_logging()
    row = {**environment(device), "ranks": dist.get_world_size()}
    row |= profile_job(options.job, options.overrides, options.steps, device)
    if dist.get_rank() == 0:
        # The file first: a console may be gone.
        write_rows(options.out, [row])
        print(table(row) if "split" in row else row, flush=True)
    dist.destroy_process_group()
    return 1 if "error" in row else 0


def profile_job(job: Path, overrides: Sequence[str], steps: int, device: torch.device) -> dict[str, object]:
    """Measures a job: `benchmarks.train.measure`, and `split`, the profiled step's classes in milliseconds."""
    window = [f"--training.steps={steps}", f"--profiling.trace_start={steps}", "--profiling.trace_steps=1"]
    return measure(job, [*overrides, *window, "--metrics.interval=1"], device, split_of, untimed_steps=1)


def split_of(folder: Path) -> dict[str, object]:
    """Splits the trace in a job's folder by class."""
    try:
        (path,) = (folder / "profile").glob("*-rank-0.json.gz")
        found = split_step(read_trace(path))
    # Not for want of a trace is the time of the steps to be lost.
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
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
