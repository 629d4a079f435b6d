"""Writing files so that readers see a complete file or none, locks, and errors of the disk in one line."""

import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TEMPORARY = re.compile(r"\.tmp\.\d+\.[0-9a-f]{8}")


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


def remove_temporaries(folder: Path) -> list[Path]:
    """Deletes what killed processes left of `atomic_write` anywhere below `folder`; no process may be writing there."""
    found = [path for path in folder.rglob("*.tmp.*") if _TEMPORARY.search(path.name) and path.is_file()]
    for path in found:
        path.unlink(missing_ok=True)
    return found


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


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process; another process that claims it is refused, on any node that shares the disk.

    The lock is a flock on a hidden file that stays. It ends with the process, however that ends.

    Raises:
        ValueError: the folder is in use; the message names host, process id and start of its user.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {owner}. Wait until that run ends, stop it, or set another job.dump_folder. "
                f"The lock ends with its process."
            ) from error
        except OSError as error:
            logger.warning(
                "%s: its file system has no locks (%s), so nothing stops a second run from writing there.",
                folder,
                error.strerror,
            )
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        lock.flush()
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Marks a folder as in use by this process, however that ends; see `is_held`."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a living process holds a folder; True if its file system cannot tell."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def free_bytes(folder: Path) -> int:
    """Free space on the disk of a folder, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def describe_os_error(error: OSError, folder: Path) -> str:
    """One line for an error of the outside world: path, reason, and for a full disk what is free and what to do.

    Args:
        error: from the system.
        folder: where the process was writing, for errors that name no path.
    """
    path = error.filename or folder
    text = f"{path}: {error.strerror or error}"
    if error.errno not in _FULL:
        return text
    free = free_bytes(Path(os.fsdecode(path)) if isinstance(path, (str, bytes)) else folder)
    inodes = os.statvfs(folder).f_favail if folder.exists() else 1
    shortage = "no inodes are left" if inodes == 0 else f"{free / 2**30:.2f} GiB are free"
    return (
        f"{text} ({shortage} on its disk). Complete checkpoints are whole: free some space and rerun the same command."
    )
