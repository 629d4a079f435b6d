"""One line per logged step on the console, with a progress bar below if it is a terminal."""

import sys
from collections.abc import Mapping

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ltx_titan.metrics.remaining import RemainingTime
from ltx_titan.metrics.step import StepMetrics

# About a screen, so that the column names stay in sight.
_HEADER_EVERY = 40


class Console:
    """Prints steps.

    Args:
        total_steps: last step of the run.
        first_step: the step that it resumes from.
        intervals: steps between interruptions by kind, see `RemainingTime`.
    """

    def __init__(
        self, total_steps: int, first_step: int = 0, intervals: Mapping[str, int | None] | None = None
    ) -> None:
        self._total_steps = total_steps
        self._lines = 0
        self.remaining = RemainingTime(total_steps, first_step, intervals)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        # A progress bar moves the cursor, which would fill a log file with control characters.
        if sys.stdout.isatty():
            columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[left]}"))
            # Soft wrap and no highlighting: rich would otherwise break and color lines that are formatted already.
            self._progress = Progress(*columns, console=RichConsole(highlight=False, soft_wrap=True))
            self._task = self._progress.add_task("train", total=total_steps, completed=first_step, left="")
            self._progress.start()

    def step(self, metrics: StepMetrics) -> None:
        """Prints a step, with the column names before every 40th line."""
        if self._lines % _HEADER_EVERY == 0:
            self._print(header())
        self._lines += 1
        left = duration(self.remaining.seconds(metrics.step))
        if self.remaining.is_lower_bound(metrics.step) and left != "-":
            left += "+"
        self._print(format_line(metrics, self._total_steps, left))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=metrics.step, left=f"{left} left")

    def close(self) -> None:
        """Restores the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def _print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False)
        else:
            # Under torchrun standard output is a pipe, which Python buffers by blocks.
            print(line, flush=True)


_COLUMNS = (
    ("step", 13),
    ("epoch", 6),
    ("loss", 8),
    ("video", 8),
    ("audio", 8),
    ("grad norm", 9),
    ("lr", 8),
    ("s/step", 8),
    ("tokens/s", 9),
    ("TFLOP/s", 8),
    ("MFU", 6),
    ("mem GiB", 8),
    ("left", 9),
)


def header() -> str:
    """The column names."""
    return " ".join(name.rjust(width) for name, width in _COLUMNS)


def format_line(metrics: StepMetrics, total_steps: int, left: str) -> str:
    """A step in columns of fixed width; "-" for a missing value. `left` is the time until the last step."""
    cells = (
        f"{metrics.step}/{total_steps}",
        _cell(metrics.extra.get("data/epochs"), ".1f"),
        _cell(metrics.loss, ".4f"),
        _cell(metrics.loss_video, ".4f"),
        _cell(metrics.loss_audio, ".4f"),
        _cell(metrics.grad_norm, ".4f"),
        _cell(metrics.lr, ".2e"),
        _cell(metrics.step_time_s, ".3f"),
        _cell(metrics.tokens_per_s, ",.0f"),
        _cell(metrics.tflops_per_gpu, ".1f"),
        _cell(metrics.mfu, ".1%"),
        _cell(metrics.peak_mem_gib, ".2f"),
        left,
    )
    return " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds; "-" for None."""
    if seconds is None:
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
