"""The loop over the rows of one stage: skips what is stored, reads ahead, reports bad files, and completes shards.

Reading decodes and scales on the CPU, so threads do it ahead of the encoder. A file that cannot be used is reported and
skipped; any other error (a full disk, a GPU out of memory) would recur for the next file, and ends the run.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ltx_titan.commands.process.changes import Changes, MadeOf
from ltx_titan.commands.process.store import Store
from ltx_titan.commands.report import Report, Ticker
from ltx_titan.common.files import NAME_ERRORS
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.data.layout import Fields
from ltx_titan.media import MediaError
from ltx_titan.tables.samples import SampleRow

Item = TypeVar("Item")
Encoder = TypeVar("Encoder")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PlannedOutput:
    """Output that a row would have, for a dry run.

    Attributes:
        label: description, the same for rows with outputs of one shape.
        size_bytes: approximate size on disk.
        notes: as in `Output`, as far as headers tell.
    """

    label: str
    size_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Output:
    """Output of a row.

    Attributes:
        fields: source folder -> fields, in the order in which they are written; None if the row has none there.
        notes: anything unusual; the report counts equal notes and names the first rows.
    """

    fields: Mapping[str, Fields | None]
    notes: tuple[str, ...] = ()


class Stage(ABC, Generic[Item, Encoder]):
    """One kind of output. Subclasses are in `stages`; the loop calls their methods in the order below.

    Attributes:
        name: name in the progress bar and the report.
        is_required: whether later stages skip rows that fail here. A row without one of its extras is still of use to
            jobs that do not read it.
    """

    name: str
    is_required: ClassVar[bool] = False

    @property
    @abstractmethod
    def folders(self) -> tuple[str, ...]:
        """Source folders that it writes; a row is done when all of them have it."""

    def applies_to(self, row: SampleRow) -> bool:
        """Whether the row has the file of this stage."""
        return True

    @abstractmethod
    def sources(self, row: SampleRow) -> dict[str, Path]:
        """Role -> file that the outputs of a row depend on."""

    def text(self, row: SampleRow) -> str | None:
        """Caption that the outputs of a row depend on."""
        return None

    @abstractmethod
    def subject(self, row: SampleRow) -> str:
        """Name of the row in messages, usually its file."""

    @abstractmethod
    def plan(self, row: SampleRow) -> PlannedOutput:
        """Describes the output from headers alone. Raises ValueError or OSError for an unusable file."""

    @abstractmethod
    def load(self) -> Encoder:
        """Loads the encoder; called only if there is work."""

    @abstractmethod
    def read(self, row: SampleRow) -> Item:
        """Reads the row's file, in a thread. Raises ValueError or OSError for an unusable file."""

    @abstractmethod
    def encode(self, row: SampleRow, item: Item, encoder: Encoder) -> Output:
        """Encodes what was read. Raises ValueError for an unusable file."""


@dataclass(frozen=True)
class Run:
    """Settings that all stages of a run share.

    Attributes:
        store: prepared data that the run writes to.
        changes: rows that are up to date, and what others are made of.
        report: counts outcomes.
        num_workers: threads that read ahead; each holds one decoded clip.
        overwrite: make samples again that are stored.
        dry_run: only report what would be done.
    """

    store: Store
    changes: Changes
    report: Report
    num_workers: int
    overwrite: bool
    dry_run: bool


def run_stages(stages: Iterable[Stage[Any, Any]], rows: Sequence[SampleRow], run: Run) -> None:
    """Runs one stage after the other.

    Args:
        stages: the stages, in order.
        rows: this process' share, the rows of a shard next to each other.
        run: settings of the run.
    """
    for stage in stages:
        failed = _run_stage(stage, rows, run)
        # A clip that failed needs neither reference nor caption, and the text encoder is not loaded for it.
        if stage.is_required:
            rows = [row for row in rows if row.key not in failed]


def _run_stage(stage: Stage[Any, Any], rows: Sequence[SampleRow], run: Run) -> set[Path]:
    """Runs a stage on the rows that have its file and are not stored yet; returns the keys of those that failed."""
    applicable = [row for row in rows if stage.applies_to(row)]
    if missing := len(rows) - len(applicable):
        run.report.notes[f"rows without a file for {stage.name}"] += missing
    todo = []
    for row in applicable:
        if not run.overwrite and run.changes.is_done(stage, row):
            run.report.add(stage.name, "skipped")
        else:
            todo.append(row)
    failed: set[Path] = set()
    if todo:
        with run.report.progress(stage.name, len(todo)) as bar:
            handle_rows = _plan_rows if run.dry_run else _encode_rows
            failed = handle_rows(stage, todo, run, bar)
    if not run.dry_run:
        # Shards whose samples an interrupted run made but did not merge.
        _seal(stage, applicable, run.store)
    return failed


def _plan_rows(stage: Stage[Any, Any], todo: Sequence[SampleRow], run: Run, bar: Ticker) -> set[Path]:
    failed = set()
    for row, planned in _read_ahead(stage.plan, todo, run.num_workers):
        if isinstance(planned, Exception):
            run.report.fail(stage.name, stage.subject(row), _reason(planned))
            failed.add(row.key)
        else:
            run.report.plan(stage.name, planned.label, planned.size_bytes)
            run.report.note(planned.notes, stage.subject(row))
        bar.advance()
    return failed


def _encode_rows(stage: Stage[Any, Any], todo: Sequence[SampleRow], run: Run, bar: Ticker) -> set[Path]:
    failed = set()
    # Only here, after the rows that are stored were skipped: a finished run loads no model.
    encoder = stage.load()
    remaining = deque(todo)

    def read(row: SampleRow) -> tuple[MadeOf, Any]:
        # In this order: a file that is replaced in between differs from its fingerprint and is read again next time.
        return run.changes.made_of(stage, row), stage.read(row)

    for row, item in _read_ahead(read, todo, run.num_workers):
        remaining.popleft()
        try:
            if isinstance(item, Exception):
                # Errors of reading and of encoding are reported alike.
                raise item
            made_of, content = item
            output = stage.encode(row, content, encoder)
            # In the order of the stage: a row counts as done when all of its folders have it.
            for folder, fields in output.fields.items():
                run.store.write(folder, row.key, fields, made_of.files, made_of.text)
        except (ValueError, OSError) as error:
            # A name that cannot be written, such as one below another sample, concerns this row alone; a full disk not.
            if isinstance(error, OSError) and error.errno not in NAME_ERRORS:
                raise
            run.report.fail(stage.name, stage.subject(row), _reason(error))
            failed.add(row.key)
        else:
            run.report.note(output.notes, stage.subject(row))
            run.report.add(stage.name, "done")
        # Rows of a shard are adjacent: it is complete when the next row belongs to another.
        if not remaining or run.store.group(remaining[0]) != run.store.group(row):
            _seal(stage, [row], run.store)
        bar.advance()
    # VAE and text encoder never share a GPU: this one is freed before the next stage loads its own.
    del encoder
    free_device_memory()
    return failed


def _read_ahead(
    read: Callable[[SampleRow], Result], rows: Iterable[SampleRow], num_workers: int
) -> Iterator[tuple[SampleRow, Result | ValueError]]:
    """Yields each row with the result of `read`, or with the error if its file cannot be used."""

    def attempt(row: SampleRow) -> Result | ValueError:
        try:
            return read(row)
        except ValueError as error:
            return error
        # An unreadable file, not a full disk: only `read` runs here, and outputs are written elsewhere.
        except OSError as error:
            return MediaError(row.key, str(error))

    if num_workers == 0:
        for row in rows:
            yield row, attempt(row)
        return
    waiting_rows = iter(rows)
    pending: deque[tuple[SampleRow, Future[Result | ValueError]]] = deque()
    pool = ThreadPoolExecutor(num_workers, "ltx-titan-read")

    def refill() -> None:
        # One per thread and no more: a decoded clip of 121 frames in 720p is 1.3 GB.
        for row in islice(waiting_rows, num_workers - len(pending)):
            pending.append((row, pool.submit(attempt, row)))

    try:
        refill()
        while pending:
            row, future = pending.popleft()
            # In the order of the rows: outputs and shards are then the same for any number of threads.
            result = future.result()
            refill()
            yield row, result
    finally:
        # Waits: a thread that still decodes would hold memory that the next stage needs.
        pool.shutdown(wait=True, cancel_futures=True)


def _seal(stage: Stage[Any, Any], rows: Iterable[SampleRow], store: Store) -> None:
    for group in dict.fromkeys(store.group(row) for row in rows):
        for folder in stage.folders:
            store.seal(folder, group)


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, MediaError) else str(error)
