"""Measures a column of the scaling table: the cases of `scaling_cases.py` on the GPUs of this run.

    torchrun --nproc-per-node 8 -m ltx_titan.benchmarks.scaling docs/benchmarks/ltx23_full_step.toml --out scaling.jsonl

The file collects the columns of 1, 2, 4 and 8 GPUs; `ltx-titan bench scaling` makes table and plot of it. A row has the
measurement of `ltx_titan.benchmarks.train` and, beside it, the estimate for the same job. A failed case does not end
the column. The same command continues an interrupted one: cases with a measurement are skipped, failed ones come last.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.predicted import describe, find_gpu
from ltx_titan.benchmarks.scaling_cases import all_cases, predict
from ltx_titan.benchmarks.train import STARTED, TIMEOUT_S, attempt, is_late, print_row
from ltx_titan.common.hardware import GIB, Gpu
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.options import Maybe, Overrides, Positional, parse_options
from ltx_titan.parallel.mesh import init_distributed
from ltx_titan.parallel.stop import end_with_launcher


@dataclass(frozen=True)
class ScalingOptions:
    """Options of the scaling benchmark."""

    job: Positional[Path]
    """Job file of full fine-tuning on synthetic clips of 4,032 tokens."""

    out: Path
    """File for the rows, as JSON lines. Rows of other numbers of GPUs, and finished ones of this, stay in it."""

    cases: tuple[str, ...] = ("*",)
    """Names of the cases to run; `*` stands for anything."""

    layers: Maybe[int] = None
    """Blocks in full fine-tuning where one GPU cannot train all of them. Default: as many as it can by the estimate."""

    gpu: Maybe[str] = None
    """Kind of GPU for the estimate, as in `ltx-titan estimate`. Default: that of this machine."""

    budget: float = 1e9
    """Seconds after which no further case starts."""

    overrides: Overrides = ()
    """Overrides of every case."""


def read_rows(path: Path) -> list[dict]:
    """Rows of a file; none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _column(options: ScalingOptions, gpu: Gpu, ranks: int) -> list[dict]:
    """The rows of a column before they are measured."""
    found = []
    for case in all_cases(options.job, gpu, options.layers, options.overrides, options.cases):
        for one in predict(options.job, case, (ranks,), gpu, options.overrides).values():
            row = {
                "case": case.name,
                "layers": case.layers,
                "all_layers": case.is_whole,
                "gpu": gpu.name,
                "settings": [*case.settings(ranks, gpu.gpus_per_node), *options.overrides],
                "estimate": describe(one),
            }
            if not one.fits:
                row["not_run"] = f"the estimate needs {one.memory.needed / GIB:.1f} of {gpu.memory / GIB:.1f} GiB"
            found.append(row)
    return found


def _key(row: dict) -> tuple:
    return row["device"], row["ranks"], row["case"], *row["settings"]


class _File:
    """The rows of all columns, on rank 0; written after every change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = {_key(row): row for row in read_rows(path)}

    def find(self, row: dict) -> dict:
        """The row of the same case and settings on as many of the same GPUs, or an empty one."""
        return self._rows.get(_key(row), {})

    def put(self, row: dict) -> None:
        self._rows[_key(row)] = row
        write_rows(self._path, list(self._rows.values()))


def _plan(options: ScalingOptions, file: _File, device: torch.device) -> list[dict]:
    """The rows that are still to be measured; those of which no run was tried come first."""
    ranks = dist.get_world_size()
    common = environment(device)
    gpu = find_gpu(options.gpu, common["device"])
    column = [{**common, "ranks": ranks, **row} for row in _column(options, gpu, ranks)]
    if not column:
        raise ValueError(f"--cases: no case is named {' or '.join(options.cases)} on {ranks} GPUs.")
    for row in column:
        if "not_run" in row:
            file.put(row)
            print(f"CASE {row['case']}: not run, {row['not_run']}", flush=True)
    open_rows = [row for row in column if "not_run" not in row and "step_time_s" not in file.find(row)]
    return sorted(open_rows, key=lambda row: "error" in file.find(row))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the column of this run; returns the number of failed cases."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse_options(ScalingOptions, argv, prog="ltx_titan.benchmarks.scaling", description=__doc__)
    quiet_libraries()
    end_with_launcher()
    device = init_distributed(TIMEOUT_S)
    set_up_logging()
    file = _File(options.out) if dist.get_rank() == 0 else None
    # Rank 0 decides for all, because it is the one that reads the file and writes it.
    planned = [None if file is None else _plan(options, file, device)]
    dist.broadcast_object_list(planned, src=0)
    rows = planned[0] or []
    failures, left, begun = 0, len(rows), time.monotonic()
    for row in rows:
        if is_late(begun, options.budget):
            break
        if file is not None:
            # Stays if the case ends the process, so that the next run tries the others first.
            file.put({**row, "error": STARTED})
        found = {**row, **attempt(options.job, row["settings"], device), "estimate": row["estimate"]}
        left -= 1
        failures += "error" in found
        if file is not None:
            file.put(found)
            print_row(found)
            print(f"  estimated: {row['estimate']['step_time_s']:.3f} s, {row['estimate']['peak_mem_gib']:.1f} GiB")
    if file is not None and left:
        print(f"{left} cases left: the same command continues", flush=True)
    dist.destroy_process_group()
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
