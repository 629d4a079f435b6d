"""What happened to each item: a progress bar with the time left while it runs, a table and the failures at the end."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Report:
    """Counts outcomes per stage and remembers why items failed."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[tuple[str, str, str]] = []
        self.notes: Counter[str] = Counter()

    def add(self, stage: str, outcome: str) -> None:
        """Count one item as `done` or `skipped` (it was there already)."""
        self.counts.setdefault(stage, Counter())[outcome] += 1

    def fail(self, stage: str, item: str, reason: str) -> None:
        """Count one item as failed; the run goes on."""
        self.add(stage, "failed")
        self.failures.append((stage, item, reason))

    @contextmanager
    def progress(self, stage: str, total: int) -> Iterator["Ticker"]:
        """Show a bar for one stage; call `advance` after each item."""
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(stage, total=total)
            yield Ticker(bar, task)

    def succeeded(self) -> bool:
        """Whether at least one item was done, now or before."""
        return any(counts["done"] or counts["skipped"] for counts in self.counts.values())

    def print(self, title: str = "process-dataset") -> None:
        """Print the table, the notes and the failures."""
        table = Table("stage", "done", "skipped (already there)", "failed", title=title)
        for stage, counts in self.counts.items():
            table.add_row(stage, *(str(counts[outcome]) for outcome in ("done", "skipped", "failed")))
        self.console.print(table)
        for note, count in self.notes.items():
            self.console.print(f"{note}: {count}", markup=False, highlight=False, soft_wrap=True)
        for stage, item, reason in self.failures:
            self.console.print(f"[red]failed[/red] {stage}: {escape(item)}: {escape(reason)}", soft_wrap=True)


class Ticker:
    """Moves one progress bar."""

    def __init__(self, bar: Progress, task: int) -> None:
        self._bar, self._task = bar, task

    def advance(self) -> None:
        """One item is through."""
        self._bar.advance(self._task)
