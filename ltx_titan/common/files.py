"""Writing files so that readers see a complete file or none, locks, and errors of the disk in one line."""

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
MAX_NAME_BYTES = 255
"""Longest file name of ext4, XFS, Lustre, NFS and others."""
NAME_ERRORS = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EILSEQ)
"""Errors of a name alone: the next file can be written."""
_LONGEST_SUFFIX = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
# A save needs more: a folder, its metadata and a file of each rank.
_FEW_INODES = 8
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
    temporary = path.with_name(_shortened(path.name, f".tmp.{os.getpid()}.{os.urandom(4).hex()}{suffix}"))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        # After success the name no longer exists.
        temporary.unlink(missing_ok=True)


def _shortened(name: str, ending: str) -> str:
    """`name` with an ending; the stem is cut if both are longer than a file name can be, the suffix stays."""
    suffix = Path(name).suffix
    # A name without a real suffix may be one long one.
    if len(os.fsencode(suffix)) > _LONGEST_SUFFIX:
        suffix = ""
    stem, ending = os.fsencode(name.removesuffix(suffix)), suffix + ending
    room = MAX_NAME_BYTES - len(os.fsencode(ending))
    # Whole characters only: some file systems refuse names that are not UTF-8.
    return (os.fsdecode(stem) if len(stem) <= room else stem[:room].decode("utf-8", "ignore")) + ending


def name_problem(path: Path) -> str | None:
    """Why no file can have this relative or absolute path; None if one can."""
    for part in path.parts:
        if (length := len(os.fsencode(part))) > MAX_NAME_BYTES:
            return f"the name {printable(part[:20])}... has {length} bytes, file systems allow {MAX_NAME_BYTES}"
        if "\0" in part:
            return f"the name {printable(part)} contains a NUL byte"
    return None


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with characters of all scripts as they are; names that are not UTF-8 are escaped, as \\udcff."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent)
    return text


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
    with path.with_name(_shortened(f".{path.name}", ".lock")).open("w") as lock:
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


def describe_free(folder: Path) -> str:
    """Free bytes on the disk of a folder, which need not exist yet, in words; or that it has no inodes left."""
    free = free_bytes(folder)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    disk = os.statvfs(folder)
    # Some file systems count no inodes and report 0 of 0. A few may be left when a save that failed has been removed.
    if disk.f_files > 0 and disk.f_favail < _FEW_INODES:
        return f"{disk.f_favail} inodes are free on its disk"
    return f"{free / 2**30:.2f} GiB are free on its disk"


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
    shortage = describe_free(Path(os.fsdecode(path)) if isinstance(path, (str, bytes)) else folder)
    return f"{text} ({shortage}). Complete checkpoints are whole: free some space and rerun the same command."


def printable(name: str | Path) -> str:
    """A file name for one line of text: control characters and bytes that are no UTF-8 as escapes, such as \\n.

    A terminal or log raises on the latter, and a line break in a name would look like two reports.
    """
    text = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
