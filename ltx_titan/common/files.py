"""Writing files so that readers see a complete file or none."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path, *, suffix: str = "") -> Iterator[Path]:
    """Yields a temporary path next to `path`; renames it to `path` on success and removes it on any error.

    The folder is made. The name holds the process id and random bits, since nodes that share a disk can have equal ids.

    Args:
        path: final path; an existing file is replaced.
        suffix: ending of the temporary name, for writers that choose a format by it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}.{os.urandom(4).hex()}{suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        # After success the name no longer exists.
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically, with newlines as they are in `text`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def sync_folder(folder: Path) -> None:
    """Flushes a folder's entries to disk: without it a rename can be lost in a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_empty_folders(folder: Path, base: Path) -> None:
    """Removes `folder` and its parents below `base` as far as they are empty."""
    while folder != base and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock for `path`; other processes wait. The lock is a hidden file next to it that stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        # The kernel releases the lock of a process that dies, so none can become stale. Removing the file would let two
        # processes lock two files of this name.
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
