"""Times whole training steps of a job under variations, all in one set of processes.

    torchrun --nproc-per-node 2 -m ltx_titan.benchmarks.train JOB.toml \\
        --all="--training.steps=10 --compile.enable=true" \\
        --case="4k: --data.synthetic.num_frames=89" --case="4k float8: --float8.recipe=tensorwise" --out rows.jsonl

A case is a name and overrides of the job; `--all` are overrides of every case. Each is a run of the real Trainer in a
folder that is deleted afterwards, without checkpoints or exports unless the case asks for them. A row holds the median
over the steps after the first few (which compile), their spread, peak memory of the fullest rank, the loss curve, and
how long saves made training wait. A case that fails is reported, and the next goes on.
"""

import argparse
import gc
import logging
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.config import load_job
from ltx_titan.metrics import read_metrics
from ltx_titan.parallel.mesh import init_distributed
from ltx_titan.plan import plan_job
from ltx_titan.quiet import quieten
from ltx_titan.train import Trainer

# Compiling, the allocator's first rounds, and recording CUDA graphs (in the third step).
_WARMUP = 4


def measure(
    job: Path,
    overrides: Sequence[str],
    inspect: Callable[[Path], dict[str, object]] | None = None,
    untimed_steps: int = 0,
) -> dict[str, object]:
    """The row of one case; every rank calls it.

    Args:
        job: job file.
        overrides: of it, `--section.key=value`.
        inspect: further fields of the row, from the folder that the job wrote, before it is deleted.
        untimed_steps: last steps that do not count, for they were profiled.
    """
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder, src=0)
        where = f"--job.dump_folder={folder[0]}/run"
        plan = plan_job(load_job(job, ["--checkpoint.enable=false", *overrides, where]), dist.get_world_size())
        started = time.perf_counter()
        trainer = Trainer(plan)
        built_s = time.perf_counter() - started
        weights = sum(p.numel() for p in trainer.model.parameters())
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
        dist.barrier()
        row = {}
        if dist.get_rank() == 0:
            lines = read_metrics(plan.folder / "metrics.jsonl")
            row = _row(lines[: len(lines) - untimed_steps], dist.get_world_size())
            tokens = plan.sample_tokens(0)
            row |= {"tokens_per_sample": tokens, "global_batch_size": plan.job.training.global_batch_size}
            row |= {"weights": weights, "trained": trained, "build_s": built_s, "degrees": vars(plan.degrees)}
            row |= {} if inspect is None else inspect(plan.folder)
    return row


def _row(lines: list[dict], ranks: int) -> dict[str, object]:
    """What the logged steps come to."""
    timed = [line for line in lines if line["step"] > _WARMUP] or lines[-1:]
    times = [line["step_time_s"] for line in timed]
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


def _free(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> int:
    """Measures all cases; returns the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="job file")
    parser.add_argument("--all", default="", help="overrides of every case, as one string")
    parser.add_argument("--case", action="append", required=True, help='"name: --section.key=value ..."')
    parser.add_argument("--out", type=Path, help="write rows as JSON lines")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further case starts")
    arguments = parser.parse_args()
    quieten()
    device = init_distributed()
    is_main = dist.get_rank() == 0
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logging.getLogger("ltx_titan").setLevel(logging.INFO if is_main else logging.CRITICAL)
    common = {**environment(device), "ranks": dist.get_world_size()}
    rows, failures, begun = [], 0, time.monotonic()
    for case in arguments.case:
        name, _, overrides = case.partition(":")
        late = [time.monotonic() - begun > arguments.budget]
        dist.broadcast_object_list(late, src=0)
        if late[0]:
            rows.append({**common, "case": name, "skipped": "budget used up"})
            continue
        started = time.monotonic()
        try:
            row = measure(arguments.job, [*shlex.split(arguments.all), *shlex.split(overrides)])
        # One case that does not fit must not cost the others' measurements.
        except Exception as error:
            failures += 1
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
            traceback.print_exc()
        rows.append({**common, "case": name, **row, "seconds": time.monotonic() - started})
        _free(device)
        if is_main:
            _print_row(rows[-1])
            write_rows(arguments.out, rows)
    if is_main:
        write_rows(arguments.out, rows)
    dist.destroy_process_group()
    return failures


def _print_row(row: dict) -> None:
    if "error" in row:
        print(f"CASE {row['case']}: FAILED {row['error'][:300]}", flush=True)
        return
    mfu = "" if row["mfu"] is None else f"{row['tflops_per_gpu']:.0f} TFLOP/s/GPU, MFU {row['mfu']:.1%}, "
    memory = "" if row["peak_mem_gib"] is None else f"{row['peak_mem_gib']:.1f} GiB, "
    print(
        f"CASE {row['case']}: {row['step_time_s']:.3f} s +-{row['spread'] / 2:.0%}, "
        f"{row['tokens_per_s_per_gpu']:.0f} tokens/s/GPU, {mfu}{memory}first step {row['first_step_s']:.0f} s, "
        f"built in {row['build_s']:.0f} s, losses {row['losses'][0]:.4f} .. {row['losses'][-1]:.4f}, "
        f"saves waited {row['save_blocked_s']}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(min(main(), 1))
