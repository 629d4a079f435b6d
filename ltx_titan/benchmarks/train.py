"""Times training steps of a job under variations, all in one set of processes.

    torchrun --nproc-per-node 2 -m ltx_titan.benchmarks.train JOB.toml \\
        --all="--training.steps=10 --compile.enable=true" \\
        --case="4k: --data.synthetic.num_frames=89" --case="4k float8: --float8.recipe=tensorwise" --out rows.jsonl

A case is a name and overrides of the job; `--all` are overrides of every case. Each is a run of the real Trainer in a
temporary folder, without checkpoints or exports unless the case enables them. A row contains the median over the steps
after the first few (which compile), their spread, the peak memory over all ranks, the loss curve, and the time that
training was blocked by saves, and beside them what the estimate predicts, which is printed before the case runs. A
failed case is reported, and the next one runs. Rows are written before and after every case: one that was ended with
the program, or has ended it, is in the file, too.
"""

import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.predicted import describe, gpu_of, in_words, predict_plan
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.options import Maybe, Positional, Repeated, parse_options
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.config import load_job
from ltx_titan.metrics import read_metrics
from ltx_titan.parallel.mesh import init_distributed
from ltx_titan.parallel.stop import end_with_launcher
from ltx_titan.plan import plan_job
from ltx_titan.train import Trainer

# Compiling, the allocator's first rounds, and recording CUDA graphs (in the third step).
_WARMUP = 4
TIMEOUT_S = 240.0
"""A rank that fails alone leaves the others in a collective; compiling 48 layers takes a third of this."""
STARTED = "started, and did not end"
"""Error of a case until it has ended."""


@dataclass(frozen=True)
class TrainBenchOptions:
    """Options of the training benchmark."""

    job: Positional[Path]
    """Job file."""

    case: Repeated[str] = ()
    """A case as "name: --section.key=value ...". May be passed several times. Default: the job as it is."""

    all: str = ""
    """Overrides of every case, as one string."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    budget: float = 1e9
    """Seconds after which no further case starts."""


def measure(
    job: Path,
    overrides: Sequence[str],
    device: torch.device,
    inspect: Callable[[Path], dict[str, object]] | None = None,
    untimed_steps: int = 0,
) -> dict[str, object]:
    """Measures one case; every rank calls it.

    Args:
        job: job file.
        overrides: its overrides, `--section.key=value`.
        device: device of this rank.
        inspect: adds fields to the row from the folder that the job wrote, before it is deleted.
        untimed_steps: last steps that are not timed, because they are profiled.
    """
    with tempfile.TemporaryDirectory() as own:
        # All ranks write to rank 0's folder, as in a job.
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        where = f"--job.dump_folder={folder[0]}/run"
        defaults = ["--checkpoint.enable=false", f"--job.timeout_s={TIMEOUT_S}"]
        plan = plan_job(load_job(job, [*defaults, *overrides, where]), dist.get_world_size())
        # On every rank: one that fails must not fail alone.
        gpu = gpu_of(device)
        predicted = None if gpu is None else predict_plan(plan, gpu)
        if predicted is not None and dist.get_rank() == 0:
            print(f"estimated: {in_words(predicted)}", flush=True)
        started = time.perf_counter()
        trainer = Trainer(plan)
        # The trainer would save, and the next case would begin, beside whatever runs after this program.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        built_s = time.perf_counter() - started
        weights = sum(p.numel() for p in trainer.model.parameters())
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        try:
            trainer.train()
        finally:
            trainer.close()
        dist.barrier()
        row = {}
        if dist.get_rank() == 0:
            lines = read_metrics(plan.folder / "metrics.jsonl")
            row = _row(lines[: len(lines) - untimed_steps], dist.get_world_size())
            tokens = plan.sample_tokens(0)
            row |= {"tokens_per_sample": tokens, "global_batch_size": plan.job.training.global_batch_size}
            row |= {"weights": weights, "trained": trained, "build_s": built_s, "degrees": vars(plan.degrees)}
            row |= {"static_slots": plan.job.parallelism.fsdp_static_slots}
            if predicted is not None:
                row |= {"estimate": describe(predicted), "levels": dict(Counter(predicted.setup.levels))}
            row |= {} if inspect is None else inspect(plan.folder)
    return row


def _row(lines: list[dict], ranks: int) -> dict[str, object]:
    """Summary of the logged steps."""
    timed = [line for line in lines if line["step"] > _WARMUP] or lines[-1:]
    times = [line["step_time_s"] for line in timed]
    # The step closest to the median: its speed and MFU then belong to the reported time.
    middle = min(timed, key=lambda line: abs(line["step_time_s"] - median(times)))
    peaks = [line["peak_mem_gib"] for line in lines if line["peak_mem_gib"] is not None]
    return {
        "step_time_s": median(times),
        "spread": (max(times) - min(times)) / median(times),
        "steps_timed": len(times),
        "first_step_s": lines[0]["step_time_s"],
        "tokens_per_s_per_gpu": middle["tokens_per_s"] / ranks,
        "tflops_per_gpu": middle["tflops_per_gpu"],
        "mfu": middle["mfu"],
        "peak_mem_gib": max(peaks) if peaks else None,
        "save_blocked_s": [line["perf/save_blocked_s"] for line in lines if "perf/save_blocked_s" in line],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
        "step_times_s": [line["step_time_s"] for line in lines],
        # Between the ends of steps on the device; rows without this field were timed by the host.
        "clock": "device",
    }


def attempt(job: Path, overrides: Sequence[str], device: torch.device) -> dict[str, object]:
    """Measures one case and frees its memory; the row of a failed one is its error. Every rank calls it.

    Args:
        job: job file.
        overrides: its overrides, `--section.key=value`.
        device: device of this rank.
    """
    started = time.monotonic()
    try:
        row = measure(job, overrides, device)
    # A case that runs out of memory must not lose the results of the others.
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:2000]}
        traceback.print_exc()
    # Cases differ in shapes and settings; without this they would run into the recompilation limit.
    torch.compiler.reset()
    free_device_memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return {**row, "seconds": time.monotonic() - started}


def is_late(begun: float, budget: float) -> bool:
    """Whether more than `budget` seconds have passed since `time.monotonic()` was `begun`. Every rank calls it."""
    # Rank 0 decides for all: clocks differ, and ranks that disagree would wait for each other forever.
    late = [time.monotonic() - begun > budget]
    dist.broadcast_object_list(late, src=0)
    return late[0]


def main() -> int:
    """Measures all cases; returns the number of failed ones."""
    options = parse_options(TrainBenchOptions, sys.argv[1:], prog="ltx_titan.benchmarks.train", description=__doc__)
    quiet_libraries()
    end_with_launcher()
    device = init_distributed(TIMEOUT_S)
    is_main = dist.get_rank() == 0
    set_up_logging()
    common = {**environment(device), "ranks": dist.get_world_size()}
    rows, failures, begun = [], 0, time.monotonic()
    for case in options.case or ("job",):
        name, _, overrides = case.partition(":")
        if is_late(begun, options.budget):
            rows.append({**common, "case": name, "skipped": "budget used up"})
            continue
        if is_main:
            print(f"CASE {name}: {overrides.strip()}", flush=True)
            write_rows(options.out, [*rows, {**common, "case": name, "error": STARTED}])
        row = attempt(options.job, [*shlex.split(options.all), *shlex.split(overrides)], device)
        failures += "error" in row
        rows.append({**common, "case": name, **row})
        if is_main:
            print_row(rows[-1])
            write_rows(options.out, rows)
    if is_main:
        write_rows(options.out, rows)
    dist.destroy_process_group()
    return failures


def print_row(row: dict) -> None:
    """Prints what a case took, or its error."""
    if "error" in row:
        print(f"CASE {row['case']}: FAILED {row['error'][:300]}", flush=True)
        return
    mfu = "" if row["mfu"] is None else f"{row['tflops_per_gpu']:.0f} TFLOP/s/GPU, MFU {row['mfu']:.1%}, "
    memory = "" if row["peak_mem_gib"] is None else f"{row['peak_mem_gib']:.1f} GiB, "
    print(
        f"CASE {row['case']}: {row['step_time_s']:.3f} s +-{row['spread'] / 2:.0%}, "
        f"{row['tokens_per_s_per_gpu']:.0f} tokens/s/GPU, {mfu}{memory}first step {row['first_step_s']:.0f} s, "
        f"built in {row['build_s']:.0f} s, losses {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}, "
        f"blocked by saves {row['save_blocked_s']}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(min(main(), 1))
