"""Encoded samples on disk, up to a size: what was not used for longest goes first.

A cache and nothing more: an entry is named after all that it was made from, is written whole or not at all, and may
vanish at any time. So several ranks, or several jobs, can share a folder without talking to each other.
"""

import os
import threading
from pathlib import Path

from ltx_titan.data import read_sample, write_sample
from ltx_titan.data.layout import Fields, Kind

# Making room goes through the whole folder, so it makes some for later as well.
_FILLED_AFTER = 0.9


class DiskCache:
    """A folder of at most `limit_bytes`."""

    def __init__(self, folder: str | Path, limit_bytes: float) -> None:
        """Opens a folder; it is made when there is something to keep.

        Args:
            folder: of the entries.
            limit_bytes: size that the folder is brought below whenever it has grown beyond.
        """
        self._folder, self._limit = Path(folder), limit_bytes
        self._lock = threading.Lock()
        self._size = sum(size for _, size, _ in self._entries())

    def get(self, key: str, kind: Kind) -> Fields | None:
        """The entry of that name, or None where there is none that can be read."""
        path = self._path(key)
        try:
            os.utime(path)  # the time of last use; read times are switched off on many disks
            return read_sample(path, kind)
        except (OSError, ValueError):
            return None

    def put(self, key: str, fields: Fields) -> None:
        """Keeps an entry.

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
        self._size = sum(size for _, size, _ in entries)  # others write here as well
        for _, size, path in entries:
            if self._size <= _FILLED_AFTER * self._limit:
                return
            path.unlink(missing_ok=True)
            self._size -= size

    def _entries(self) -> list[tuple[int, int, Path]]:
        """(time of last use, size, file) of all entries."""
        found = []
        for path in self._folder.glob("*/*.pt"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another rank made room
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found
