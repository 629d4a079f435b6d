"""Digests of a step folder's files: computed while they are written, stored with the save, compared when it is loaded.

A flipped bit in a shard is a weight of another value, which nothing else notices; so is a shard of another save under
the same name. Both have another CRC-32. It finds every change of up to 32 adjacent bits and all but one in 4 billion of
the others; it does not protect against someone who wants to forge a checkpoint.

zlib computes it at about 2 GB/s per core, outside Python's global lock. Saving is bound by the disk and pays next to
nothing. Loading reads each file once more, shared among the ranks: of the page cache if the host has room for it.
"""

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

Digests = dict[str, dict[str, int]]
"""File name -> `bytes` and `crc32`."""

FILES_KEY, SELF_KEY = "files", "crc32"
_BLOCK = 16 * 2**20


class DigestWriter(FileSystemWriter):
    """torch's writer of this rank's shards, which also computes their digests.

    Attributes:
        digests: of the files written so far.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.digests: Digests = {}
        self.fs = _DigestFileSystem(self.digests)


class _DigestFileSystem(FileSystem):
    def __init__(self, digests: Digests) -> None:
        self._digests = digests

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = _Crc32Stream(cast(BinaryIO, stream))
            yield counted
        # Shards keep their names; torch renames the metadata, whose digest is taken from its final file.
        self._digests[Path(path).name] = {"bytes": counted.count, "crc32": counted.crc}


class _Crc32Stream(io.IOBase):
    """Passes on what is written; counts it and its CRC-32. Cannot seek, so no byte is written twice."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.count = self.crc = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        written = self._stream.write(view)
        self.crc = zlib.crc32(view[:written], self.crc)
        self.count += written
        return written

    def tell(self) -> int:
        return self.count

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        # torch asks for it to sync the file, without flushing what is still buffered.
        self._stream.flush()
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def file_digest(path: Path) -> dict[str, int]:
    """Reads a file and computes its digest."""
    count = crc = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            count, crc = count + len(block), zlib.crc32(block, crc)
    return {"bytes": count, "crc32": crc}


def changed_file(
    folder: Path, digests: Mapping[str, Mapping[str, int]], *, share: int = 0, shares: int = 1
) -> str | None:
    """Reads every `shares`-th file and compares it with its digest; returns the first difference, None without one."""
    for name in sorted(digests)[share::shares]:
        try:
            found = file_digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != digests[name]:
            return f"{name} is not what was saved (a damaged disk, or the file of another save)"
    return None


def signed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the digest of a JSON object to it, so that a change of the file that holds it is found."""
    return {**content, SELF_KEY: _json_crc(content)}


def check_signed(content: Mapping[str, Any]) -> None:
    """Compares a JSON object with its own digest, if it has one.

    Raises:
        ValueError: it has changed since it was written.
    """
    if SELF_KEY in content and content[SELF_KEY] != _json_crc(content):
        raise ValueError("it is not what was saved: its digest differs")


def _json_crc(content: Mapping[str, Any]) -> int:
    # Of the values rather than the text: another layout of the same values is not damage.
    plain = {key: value for key, value in content.items() if key != SELF_KEY}
    return zlib.crc32(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())
