"""Shapes of sample files, remembered between runs.

The batch plan needs the shapes of all samples before the first step. They are kept in an index file in the data root,
so that only new and changed files are opened. Shards need no index: a header gives the shapes of all their samples.
"""

import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ltx_titan.data.layout import Kind, read_shapes

logger = logging.getLogger(__name__)

INDEX_NAME = ".shapes.json"
# Opening files waits for the disk, so that more threads than cores help on network storage.
READERS = 16


class SampleFile(NamedTuple):
    """A sample's file in one source folder, by path relative to the data root, with what tells that it changed."""

    name: str
    size: int
    mtime_ns: int


class ShapeIndex:
    """Shapes of sample files, remembered in a file of the data root while a file's size and time stay the same."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / INDEX_NAME

    def shapes(self, files: Mapping[SampleFile, Kind | None]) -> dict[SampleFile, dict[str, tuple[int, ...]]]:
        """Shape of every field of each file, () for numbers.

        Args:
            files: files with the kind that each must be.

        Raises:
            ValueError: if a file cannot be used; with its name.
        """
        known = self._remembered()
        found = {
            file: known[self._entry(file, kind)] for file, kind in files.items() if self._entry(file, kind) in known
        }
        new = [(file, kind) for file, kind in files.items() if file not in found]
        if new:
            logger.info("%s: reading the shapes of %d files", self._root, len(new))
            with ThreadPoolExecutor(max_workers=READERS) as pool:
                shapes = pool.map(lambda item: read_shapes(self._root / item[0].name, item[1]), new)
                found |= {file: shape for (file, _), shape in zip(new, shapes, strict=True)}
            self._remember(known | {self._entry(file, files[file]): shape for file, shape in found.items()})
        return found

    @staticmethod
    def _entry(file: SampleFile, kind: Kind | None) -> tuple[str, int, int, str]:
        return (*file, kind or "")

    def _remembered(self) -> dict[tuple[str, int, int, str], dict[str, tuple[int, ...]]]:
        try:
            rows = json.loads(self._path.read_text())
            return {tuple(entry): {key: tuple(shape) for key, shape in fields.items()} for entry, fields in rows}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # Only a cache: a missing or foreign file costs one more reading.

    def _remember(self, shapes: Mapping[tuple[str, int, int, str], Mapping[str, tuple[int, ...]]]) -> None:
        latest = {entry[0] + "\0" + entry[3]: (entry, fields) for entry, fields in shapes.items()}
        temporary = self._path.with_name(f"{self._path.name}.tmp.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            temporary.write_text(json.dumps(list(latest.values())))
            os.replace(temporary, self._path)
        except OSError as error:
            logger.info("%s: not written (%s); the shapes are read again next time", self._path, error.strerror)
