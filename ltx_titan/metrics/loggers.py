"""Writes a step's figures to `metrics.jsonl`, TensorBoard, Weights & Biases and the console.

Only rank 0 writes. Every JSON line has the same keys, with null for values that are not finite or that the device does
not report. A line is flushed at once, so the file of a killed job is complete up to its last logged step. A resumed job
first drops the lines after the checkpoint that it resumes from.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from torch.utils.tensorboard import SummaryWriter

from ltx_titan.common.files import write_text
from ltx_titan.metrics.console import Console
from ltx_titan.metrics.step import StepMetrics
from ltx_titan.metrics.wandb import end_wandb

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger(__name__)

_TAGS = {
    "loss": "loss/total",
    "loss_video": "loss/video",
    "loss_audio": "loss/audio",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "step_time_s": "perf/step_time_s",
    "tokens_per_s": "perf/tokens_per_s",
    "tflops_per_gpu": "perf/tflops_per_gpu",
    "mfu": "perf/mfu",
    "peak_mem_gib": "mem/peak_gib",
}


class MetricsLogger:
    """Writes `metrics.jsonl` and `tensorboard/` under the dump folder, and the console lines.

    Args:
        dump_folder: the job's folder.
        total_steps: last step of the run, for progress and remaining time.
        resumed_step: the step of the checkpoint that training resumes from, 0 for a new run. Later lines of an earlier
            run are dropped, and later points hidden in TensorBoard.
        is_writer: False on all ranks but 0: every method then does nothing.
        tensorboard: whether to write TensorBoard files.
        wandb: run of Weights & Biases, ended by `close`; None without one.
        intervals: steps between interruptions by kind, for the remaining time; `pause` records them.
    """

    def __init__(
        self,
        dump_folder: str | Path,
        *,
        total_steps: int,
        resumed_step: int = 0,
        is_writer: bool = True,
        tensorboard: bool = True,
        wandb: "Run | None" = None,
        intervals: Mapping[str, int | None] | None = None,
    ) -> None:
        self.tensorboard: SummaryWriter | None = None
        self.wandb = wandb
        self.newest: Mapping[str, float | None] = {}
        """Values of the newest line by name; empty on other ranks."""
        self._file: IO[str] | None = None
        self._console: Console | None = None
        if not is_writer:
            return
        folder = Path(dump_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        # Before the file is opened: the rewrite replaces it, and an earlier handle would append to the old one.
        drop_later_lines(path, resumed_step)
        self._file = path.open("a")
        self._console = Console(total_steps, resumed_step, intervals)
        if tensorboard:
            # The event files of the earlier run stay; TensorBoard hides their points from this step on.
            self.tensorboard = SummaryWriter(folder / "tensorboard", purge_step=resumed_step + 1)

    def log(self, metrics: StepMetrics) -> None:
        """Records a step. Values that are not finite become null, with a warning that names them."""
        if self._file is None or self._console is None:
            return
        values = asdict(metrics)
        # Extra figures share the line: their tags contain a slash, so they cannot collide with a field.
        values |= values.pop("extra")
        broken = [name for name, value in values.items() if value is not None and not math.isfinite(value)]
        if broken:
            described = ", ".join(f"{name} = {values[name]}" for name in broken)
            logger.warning("Step %d: %s. Logged as null.", metrics.step, described)
            values |= dict.fromkeys(broken)
        self.newest = values
        # NaN is not JSON, and other readers refuse a file that contains it.
        self._file.write(json.dumps(values, allow_nan=False) + "\n")
        self._file.flush()
        shown = {_TAGS.get(name, name): value for name, value in values.items() if name != "step" and value is not None}
        self.show(shown, metrics.step)
        self._console.step(metrics)

    @contextmanager
    def paused(self, kind: str) -> Iterator[None]:
        """Times an interruption of training, such as a validation, which the remaining time counts apart from steps."""
        started = time.monotonic()
        yield
        if self._console is not None:
            self._console.remaining.pause(kind, time.monotonic() - started)

    def show(self, scalars: Mapping[str, float], step: int) -> None:
        """Adds scalars to TensorBoard and W&B only, such as those of step 0, for which `metrics.jsonl` has no line."""
        if self.tensorboard is not None:
            for tag, value in scalars.items():
                self.tensorboard.add_scalar(tag, value, step)
        if self.wandb is not None and scalars:
            self.wandb.log({**scalars, "step": step})

    def close(self) -> None:
        """Flushes and closes everything, also if one of them fails, as files on a full disk do."""
        file, console, tensorboard, wandb = self._file, self._console, self.tensorboard, self.wandb
        self._file = self._console = self.tensorboard = self.wandb = None
        # From the last one to the first; an error is raised when all have been called.
        with ExitStack() as stack:
            if wandb is not None:
                stack.callback(end_wandb, wandb)
            for part in (tensorboard, console, file):
                if part is not None:
                    stack.callback(part.close)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Reads the lines of a `metrics.jsonl`; skips an incomplete last line, as a killed job leaves it.

    Raises:
        ValueError: another line is not a JSON object with a step.
    """
    path = Path(path)
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            # Only the last line can be incomplete, since each is flushed as a whole; damage elsewhere is an error.
            if number == len(lines):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with 'step', found {line[:80]!r}; remove the line."
            ) from error
        records.append(record)
    return records


def drop_later_lines(path: Path, step: int) -> None:
    """Rewrites a `metrics.jsonl`, if it exists, without lines after `step` and without an incomplete last line."""
    if not path.exists():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
