"""Times `process-dataset` on rows that are all done, for two checkouts in turn.

    python -m ltx_titan.benchmarks.rerun OLD NEW --pack ltx-2.3-nano.safetensors --table d.jsonl [--repeats 3]

The table is prepared before, by the old checkout; the new one adopts it in a run that is not timed. Whole processes are
timed, as a user waits for them, and the two alternate, so that other load meets both.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.common.options import Maybe, Positional, parse_options


@dataclass(frozen=True)
class RerunOptions:
    """Options of the rerun benchmark."""

    old: Positional[Path]
    """Checkout to compare with."""

    new: Positional[Path]
    """Checkout to measure."""

    pack: Path
    """Checkpoint; its text encoder is in `text_encoder` next to it."""

    table: Path
    """Table that is prepared already, into `.precomputed` next to it."""

    resolution_buckets: str = "64x32x9"
    """Buckets that it was prepared with."""

    repeats: int = 3
    """Timed runs of each checkout."""

    out: Maybe[Path] = None
    """File for the row, as JSON lines."""


def run_once(checkout: Path, options: RerunOptions) -> float:
    """Runs `process-dataset` of a checkout; returns seconds of wall time and fails if anything was encoded."""
    arguments = ["process-dataset", options.table, "--model-path", options.pack, "--device", "cpu"]
    arguments += ["--text-encoder-path", options.pack.parent / "text_encoder"]
    arguments += ["--resolution-buckets", options.resolution_buckets]
    environment_ = {**os.environ, "PYTHONPATH": str(checkout)}
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ltx_titan.cli", *map(str, arguments)],
        cwd=checkout,
        env=environment_,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - started


def main(options: RerunOptions) -> None:
    """Measures and writes one row."""
    run_once(options.new, options)
    seconds: dict[str, list[float]] = {"old_s": [], "new_s": []}
    for _ in range(options.repeats):
        seconds["old_s"].append(run_once(options.old, options))
        seconds["new_s"].append(run_once(options.new, options))
    row = {
        **environment(torch.device("cpu")),
        "rows": len(options.table.read_text(encoding="utf-8").splitlines()),
        **{name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "new_over_old": round(median(seconds["new_s"]) / median(seconds["old_s"]), 3),
    }
    print(row)
    write_rows(options.out, [row])


if __name__ == "__main__":
    main(parse_options(RerunOptions, sys.argv[1:], prog="ltx_titan.benchmarks.rerun", description=__doc__))
