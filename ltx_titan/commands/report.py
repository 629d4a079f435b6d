"""Outcome of every item: a progress bar while a command runs, a table and the failures at its end."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ltx_titan.common.files import printable

_OUTCOMES = ("done", "skipped", "failed")
# Seconds between two lines if the output is a log and not a terminal.
_LINE_INTERVAL_S = 30.0
# Items that are named with a note.
_EXAMPLES = 3


class Report:
    """Counts outcomes per stage and keeps the reasons of failures."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[tuple[str, str, str]] = []
        self.notes: Counter[str] = Counter()
        self.named: dict[str, list[str]] = {}
        self.seconds: Counter[str] = Counter()
        self.plans: dict[str, Counter[str]] = {}
        self.bytes: Counter[str] = Counter()

    def add(self, stage: str, outcome: str) -> None:
        """Counts one item as `done`, or as `skipped` if its output exists already."""
        self.counts.setdefault(stage, Counter())[outcome] += 1

    def fail(self, stage: str, item: str, reason: str) -> None:
        """Counts one item as failed; the run continues."""
        self.add(stage, "failed")
        self.failures.append((stage, item, reason))

    def note(self, notes: Iterable[str], item: str) -> None:
        """Counts notes about an item and keeps the names of the first few."""
        for note in notes:
            self.notes[note] += 1
            names = self.named.setdefault(note, [])
            if len(names) < _EXAMPLES:
                names.append(item)

    def plan(self, stage: str, label: str, size_bytes: int) -> None:
        """Counts one item of a dry run with a description and the size of its output."""
        self.add(stage, "done")
        self.plans.setdefault(stage, Counter())[label] += 1
        self.bytes[stage] += size_bytes

    def tally(self) -> dict[str, Any]:
        """All counts in a form that can be sent to another process."""
        return {name: getattr(self, name) for name in ("counts", "failures", "notes", "named", "seconds")}

    def merge(self, others: Iterable[dict[str, Any]]) -> None:
        """Adds the counts of other processes; they ran in parallel, so times are the maximum instead of the sum."""
        for other in others:
            for stage, counts in other["counts"].items():
                self.counts.setdefault(stage, Counter()).update(counts)
            self.failures += other["failures"]
            self.notes.update(other["notes"])
            for note, names in other["named"].items():
                self.named[note] = (self.named.get(note, []) + names)[:_EXAMPLES]
            # `|` of two Counters takes the maximum of each key.
            self.seconds |= other["seconds"]

    @contextmanager
    def progress(self, stage: str, total: int) -> Iterator["Ticker"]:
        """Shows a progress bar with the remaining time; call `advance` after each item."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        started = time.perf_counter()
        # A long window: clips differ widely in length, and the default of 30 s would make the remaining time jump.
        with Progress(*columns, console=self.console, speed_estimate_period=600) as bar:
            task = bar.add_task(stage, total=total)
            yield Ticker(self, stage, total, bar, task)
        # A Counter adds floats as well; its stub knows integers only.
        self.seconds[stage] += time.perf_counter() - started  # type: ignore[assignment]

    def succeeded(self) -> bool:
        """Whether at least one item was done, in this run or before."""
        return any(counts["done"] or counts["skipped"] for counts in self.counts.values())

    def status(self, strict: bool, dry_run: bool = False) -> int:
        """Exit status of a command: 1 if nothing was done, except in a dry run, or if any item failed with `strict`."""
        return 1 if (strict and self.failures) or not (dry_run or self.succeeded()) else 0

    def write(self, text: str) -> None:
        """Prints a line as it is: file names may contain what rich takes for markup."""
        self.console.print("\n".join(map(printable, text.split("\n"))), markup=False, highlight=False, soft_wrap=True)

    def print(self, title: str = "process-dataset") -> None:
        """Prints the table, the notes and the failures."""
        is_dry = bool(self.plans)
        table = Table(
            "stage", "to do" if is_dry else "done", "skipped (already done)", "failed", "size" if is_dry else "speed"
        )
        table.title = f"{title}, dry run" if is_dry else title
        for stage, counts in self.counts.items():
            last = f"{self.bytes[stage] / 2**20:,.1f} MiB" if is_dry else self._speed(stage)
            table.add_row(stage, *(str(counts[outcome]) for outcome in _OUTCOMES), last)
        self.console.print(table)
        for stage, labels in self.plans.items():
            for label, count in sorted(labels.items()):
                self.write(f"{stage}: {count} x {label}")
        for note, count in self.notes.items():
            names = [printable(name) for name in self.named.get(note, [])]
            examples = f" ({', '.join(names)}{', ...' if count > len(names) else ''})" if names else ""
            self.write(f"{note}: {count}{examples}")
        for stage, item, reason in self.failures:
            self.console.print(
                f"[red]failed[/red] {stage}: {escape(printable(item))}: {escape(printable(reason))}", soft_wrap=True
            )

    def _speed(self, stage: str) -> str:
        done, seconds = self.counts[stage]["done"], self.seconds[stage]
        return f"{done / seconds:.2f}/s" if done and seconds else ""


class Ticker:
    """Advances one progress bar; prints a line every 30 s instead if the output is not a terminal."""

    def __init__(self, report: Report, stage: str, total: int, bar: Progress, task: int) -> None:
        self._report, self._stage, self._total, self._bar, self._task = report, stage, total, bar, task
        self._started = self._printed = time.perf_counter()
        self._count = 0

    def advance(self) -> None:
        """Counts one processed item."""
        self._count += 1
        self._bar.advance(self._task)
        now = time.perf_counter()
        # On a terminal rich draws the bar; in a log it shows nothing until the end.
        if self._report.console.is_terminal or now - self._printed < _LINE_INTERVAL_S:
            return
        self._printed = now
        left_s = round((now - self._started) / self._count * (self._total - self._count))
        failed = self._report.counts.get(self._stage, Counter())["failed"]
        self._report.write(
            f"{self._stage}: {self._count}/{self._total}, {failed} failed, "
            f"{left_s // 3600}:{left_s // 60 % 60:02d}:{left_s % 60:02d} left"
        )
