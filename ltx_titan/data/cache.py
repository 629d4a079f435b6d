"""Caches on disk: facts about files, such as their shapes, and encoded samples.

Every file of a cache may be deleted at any time, by a user or by another process; it is then made again. Several ranks
and jobs can share a cache without synchronizing: an entry is named after everything that it depends on, and is written
atomically.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ltx_titan.common.files import atomic_write
from ltx_titan.data.layout import Fields, Kind, UnreadableError, read_sample, read_shapes, write_sample

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

INDEX_NAME = ".shapes.json"
# Opening files waits for the disk, so more threads than cores help on network storage.
READER_THREADS = 16
# Making room lists the whole folder, so it frees more than it must.
_KEPT_FRACTION = 0.9


def read_index(path: Path, parse: Callable[[Any], Value]) -> dict[tuple[Any, ...], Value]:
    """Reads facts about files from a JSON index.

    Args:
        path: the index.
        parse: converts the JSON value of an entry.

    Returns:
        entry (what identifies a file's version: name, size, time) -> value; empty if the index is missing or damaged.
    """
    try:
        return {tuple(entry): parse(value) for entry, value in json.loads(path.read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def write_index(path: Path, entries: Mapping[tuple[Any, ...], Any]) -> None:
    """Writes facts about files to a JSON index; on a read-only disk it only logs that there is none."""
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(list(entries.items())), encoding="utf-8")
    except OSError as error:
        logger.info("%s: not written (%s); the next run opens the files again", path, error.strerror)


class SampleFile(NamedTuple):
    """A sample file of a source folder, by path relative to the data root, with the size and time of its version."""

    name: str
    size: int
    mtime_ns: int


class ShapeIndex:
    """Shapes of sample files, indexed in the data root so that only new and changed files are opened.

    The batch plan needs the shapes of all samples before the first step. Shards need no index: one header has the
    shapes of all samples of a shard.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / INDEX_NAME

    def shapes(
        self, files: Mapping[SampleFile, Kind | None], damaged: dict[SampleFile, str] | None = None
    ) -> dict[SampleFile, dict[str, tuple[int, ...]]]:
        """Returns the shape of every field of each file, () for numbers.

        Args:
            files: files with the kind that each must be.
            damaged: filled with the reason for each file that cannot be used, instead of raising. Such a file keeps the
                shapes of its last usable version if the index has them, and has none otherwise.

        Raises:
            ValueError: a file cannot be used; with its name.
        """
        known = read_index(self._path, lambda fields: {key: tuple(shape) for key, shape in fields.items()})
        found = {
            file: known[self._entry(file, kind)] for file, kind in files.items() if self._entry(file, kind) in known
        }
        new = [(file, kind) for file, kind in files.items() if file not in found]
        if new:
            logger.info("%s: reading the shapes of %d files", self._root, len(new))
            with ThreadPoolExecutor(max_workers=READER_THREADS) as pool:
                for (file, _), shape in zip(
                    new, pool.map(lambda item: self._read(item[0], item[1], damaged), new), strict=True
                ):
                    if shape is not None:
                        found[file] = shape
            # Entries of files outside of this job stay: jobs with other sources share the index.
            merged = known | {self._entry(file, files[file]): shape for file, shape in found.items()}
            # Of several versions of a file, the latest alone.
            latest = {(entry[0], entry[3]): entry for entry in merged}
            write_index(self._path, {entry: merged[entry] for entry in latest.values()})
        # With the shapes of before, a run whose file was damaged keeps its order of data.
        before = {(name, kind): shape for (name, _, _, kind), shape in known.items()}
        for file in damaged or ():
            if (shape := before.get((file.name, files[file] or ""))) is not None:
                found[file] = shape
        return found

    def _read(
        self, file: SampleFile, kind: Kind | None, damaged: dict[SampleFile, str] | None
    ) -> dict[str, tuple[int, ...]] | None:
        try:
            return read_shapes(self._root / file.name, kind)
        except UnreadableError:
            raise
        except ValueError as error:
            if damaged is None:
                raise
            damaged[file] = str(error)
            return None

    @staticmethod
    def _entry(file: SampleFile, kind: Kind | None) -> tuple[str, int, int, str]:
        return (*file, kind or "")


class SampleCache:
    """Encoded samples in a folder of limited size; the least recently used are removed first."""

    def __init__(self, folder: str | Path, limit_bytes: float) -> None:
        """Opens a cache.

        Args:
            folder: folder of the entries; made when the first is stored.
            limit_bytes: size above which entries are removed.
        """
        self._folder, self._limit = Path(folder), limit_bytes
        self._lock = threading.Lock()
        self._size = sum(size for _, size, _ in self._entries())

    def get(self, key: str, kind: Kind) -> Fields | None:
        """Returns an entry, or None if it is missing or unreadable."""
        path = self._path(key)
        try:
            os.utime(path)  # Marks the use: access times are switched off on many disks.
            return read_sample(path, kind)
        except (OSError, ValueError):
            return None

    def put(self, key: str, fields: Fields) -> None:
        """Stores an entry.

        Raises:
            OSError: the disk is full or not writable.
        """
        path = self._path(key)
        write_sample(path, fields)
        with self._lock:
            self._size += path.stat().st_size
            if self._size > self._limit:
                self._make_room()

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.pt"

    def _make_room(self) -> None:
        entries = sorted(self._entries())
        # Counted again, since other processes write to the folder as well.
        self._size = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if self._size <= _KEPT_FRACTION * self._limit:
                return
            path.unlink(missing_ok=True)
            self._size -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use, size, file) of all entries."""
        found = []
        for path in self._folder.glob("*/*.pt"):
            try:
                status = path.stat()
            except FileNotFoundError:  # Another rank made room.
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found
