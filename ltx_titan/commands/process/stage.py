"""One stage of the preparation, and the loop that all stages share.

A stage reads a sample's file, turns it into fields with its encoder and writes them. Reading decodes and scales on the
CPU, so threads do it ahead of the encoder. A file that cannot be used is reported and left out; whatever else goes
wrong (a full disk, a GPU out of memory) would go wrong for the next file as well, and ends the run.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ltx_titan.commands.process.store import Store
from ltx_titan.commands.report import Report
from ltx_titan.data.layout import Value
from ltx_titan.media import MediaError
from ltx_titan.media.tables import SampleRow

Output = dict[str, dict[str, Value]]
"""Source folder -> fields; written in this order."""


@dataclass(frozen=True)
class Plan:
    """What a sample would become.

    Attributes:
        label: in words, the same for samples that become alike.
        size_bytes: of what would be written, about.
    """

    label: str
    size_bytes: int


@dataclass(frozen=True)
class Stage:
    """What one stage does.

    Attributes:
        name: in the bar and in the report.
        folders: source folders it writes; a sample is done when all of them have it.
        subject: what messages call a sample in this stage, usually its file.
        plan: what a sample would become; looks at headers only. Raises ValueError for a file that cannot be used.
        read: reads a sample's file, in a thread. Raises ValueError or OSError for a file that cannot be used.
        load: loads the encoder; what it returns turns what was read into fields. Called only if there is work.
    """

    name: str
    folders: tuple[str, ...]
    subject: Callable[[SampleRow], str]
    plan: Callable[[SampleRow], Plan]
    read: Callable[[SampleRow], Any]
    load: Callable[[], Callable[[SampleRow, Any], Output]]


def run_stage(
    stage: Stage, samples: Sequence[SampleRow], store: Store, report: Report, *, num_workers: int, overwrite: bool
) -> list[SampleRow]:
    """Runs a stage on what is not there yet.

    Args:
        stage: the stage.
        samples: this process' share, groups of the store together.
        store: where to write.
        report: told about every sample.
        num_workers: threads that read ahead; each holds a decoded clip.
        overwrite: make again what is there.

    Returns:
        The samples that are there, now or before.
    """
    done, todo = _split(stage, samples, store, report, overwrite)
    usable = {sample.key for sample in done}
    if todo:
        encode = stage.load()
        ahead = deque(todo)
        with report.progress(stage.name, len(todo)) as bar:
            for sample, item in _read_ahead(stage.read, todo, num_workers):
                ahead.popleft()
                if _encode(stage, sample, item, encode, store, report):
                    usable.add(sample.key)
                if not ahead or store.group(ahead[0]) != store.group(sample):
                    _seal(stage, [sample], store)
                bar.advance()
        del encode
        _free_memory()
    # What an earlier run has made but not put together.
    _seal(stage, samples, store)
    return [sample for sample in samples if sample.key in usable]


def plan_stage(
    stage: Stage, samples: Sequence[SampleRow], store: Store, report: Report, *, num_workers: int, overwrite: bool
) -> list[SampleRow]:
    """As `run_stage`, but only reports what would be done."""
    usable, todo = _split(stage, samples, store, report, overwrite)
    with report.progress(stage.name, len(todo)) as bar:
        for sample, plan in _read_ahead(stage.plan, todo, num_workers):
            if isinstance(plan, Exception):
                report.fail(stage.name, stage.subject(sample), _reason(plan))
            else:
                report.plan(stage.name, plan.label, plan.size_bytes)
                usable.append(sample)
            bar.advance()
    return usable


def _split(
    stage: Stage, samples: Sequence[SampleRow], store: Store, report: Report, overwrite: bool
) -> tuple[list[SampleRow], list[SampleRow]]:
    """Samples that are there, and those that are not."""
    done, todo = [], []
    for sample in samples:
        if not overwrite and all(store.has(folder, sample.key) for folder in stage.folders):
            report.add(stage.name, "skipped")
            done.append(sample)
        else:
            todo.append(sample)
    return done, todo


def _read_ahead(
    read: Callable[[SampleRow], Any], samples: Iterable[SampleRow], num_workers: int
) -> Iterator[tuple[SampleRow, Any]]:
    """Each sample with what `read` gives, or with the error where its file cannot be used."""

    def attempt(sample: SampleRow) -> Any:
        try:
            return read(sample)
        except (ValueError, OSError) as error:
            return error

    if num_workers == 0:
        yield from ((sample, attempt(sample)) for sample in samples)
        return
    remaining = iter(samples)
    waiting: deque[tuple[SampleRow, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(num_workers, "ltx-titan-read")

    def refill() -> None:
        # As many as there are threads, no more: a decoded clip of 121 frames in 720p is 1.3 GB.
        for sample in islice(remaining, num_workers - len(waiting)):
            waiting.append((sample, pool.submit(attempt, sample)))

    try:
        refill()
        while waiting:
            sample, future = waiting.popleft()
            item = future.result()
            refill()
            yield sample, item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode(
    stage: Stage,
    sample: SampleRow,
    item: Any,
    encode: Callable[[SampleRow, Any], Output],
    store: Store,
    report: Report,
) -> bool:
    if isinstance(item, Exception):
        report.fail(stage.name, stage.subject(sample), _reason(item))
        return False
    try:
        for folder, fields in encode(sample, item).items():
            store.write(folder, sample.key, fields)
    except ValueError as error:
        report.fail(stage.name, stage.subject(sample), _reason(error))
        return False
    report.add(stage.name, "done")
    return True


def _seal(stage: Stage, samples: Iterable[SampleRow], store: Store) -> None:
    for group in dict.fromkeys(store.group(sample) for sample in samples):
        for folder in stage.folders:
            store.seal(folder, group)


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, MediaError) else str(error)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
