"""Digest of an exported safetensors file, stored in the file's own header and compared when its weights are read.

The format has no checksum, and a flipped bit in a weight is a weight of another value. So the files that
`export_safetensors` writes have a metadata entry `ltx_titan.crc32`, the first of the header: the size of a block, the
CRC-32 of the header and that of each block of data. It travels with the file when that is copied, renamed or uploaded;
other readers ignore metadata that they do not know. The header's own CRC-32 is computed with zeros for all digests.

Other tools copy metadata into the files that they make of ours, whose weights are others. Their writers leave no blanks
in the header (safetensors does not), and ours puts one before the entry: the digest counts only behind that blank.
Files without one are read as before.

Blocks permit ranks to share the work, and a reader of a few tensors to skip the rest.
"""

import re
import zlib
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from ltx_titan.common.ranks import is_distributed

DIGEST_KEY = "ltx_titan.crc32"
_BLOCK_BYTES = 2**30
# Of larger files blocks are larger, so that the entry stays short.
_MAX_BLOCKS = 1024
_READ_BYTES = 16 * 2**20
_START = f'{{"__metadata__": {{"{DIGEST_KEY}": "'.encode()
_VALUE = re.compile(re.escape(_START) + rb'([1-9][0-9]{0,18})((?: [0-9a-f]{8})+)"')
# Files that were compared by this process: (path, time of change, size, block).
_compared: set[tuple[Path, int, int, int]] = set()


def empty_digest(data_bytes: int) -> str:
    """Value of the header's entry before anything is known, of the length that it will have."""
    block_bytes = max(_BLOCK_BYTES, ceil(data_bytes / _MAX_BLOCKS))
    return " ".join([str(block_bytes), *["0" * 8] * (1 + ceil(data_bytes / block_bytes))])


class DigestStream:
    """Writes a safetensors file and, at the end, the digest of what was written into its header.

    Args:
        file: at its start.
        header: length prefix and JSON, beginning with an `empty_digest`.
    """

    def __init__(self, file: BinaryIO, header: bytes) -> None:
        self._file = file
        match = _VALUE.match(header, 8)
        assert match is not None, "the digest is not the first entry of the header"
        self._block_bytes, self._digits = int(match[1]), match.start(2)
        self._crcs = [zlib.crc32(header)]
        self._count = 0
        file.write(header)

    def write(self, data: memoryview) -> None:
        """Appends data of tensors."""
        self._file.write(data)
        while data:
            free = self._block_bytes - self._count % self._block_bytes
            if free == self._block_bytes:
                self._crcs.append(0)
            self._crcs[-1] = zlib.crc32(data[:free], self._crcs[-1])
            self._count += len(data[:free])
            data = data[free:]

    def finish(self) -> None:
        """Writes the digest; the file is complete then."""
        self._file.seek(self._digits)
        self._file.write(b"".join(b" %08x" % crc for crc in self._crcs))


def check_contents(path: str | Path, ranges: Iterable[tuple[int, int]] | None = None, *, divided: bool = False) -> None:
    """Compares a safetensors file with the digest in its header; files without one pass. A second call reads nothing.

    Args:
        path: a file whose header has been read without errors.
        ranges: bytes of the file (start, end) that matter; None for all.
        divided: every rank calls it and compares its share; one that finds damage ends the job.

    Raises:
        ValueError: the file is not what was written.
    """
    path = Path(path).resolve()
    with path.open("rb") as file:
        prefix = file.read(8)
        header = file.read(int.from_bytes(prefix, "little"))
        if not header.startswith(_START):
            return
        stat = path.stat()
        match = _VALUE.match(header)
        if match is None:
            raise _damaged(path, "the digest in its header")
        block_bytes, (header_crc, *crcs) = int(match[1]), match[2].decode().split()
        zeroed = prefix + header[: match.start(2)] + re.sub(rb"[^ ]", b"0", match[2]) + header[match.end(2) :]
        start = len(prefix) + len(header)
        if f"{zlib.crc32(zeroed):08x}" != header_crc or len(crcs) != ceil((stat.st_size - start) / block_bytes):
            raise _damaged(path, "its header")
        wanted = set(range(len(crcs)))
        if ranges is not None:
            wanted = {
                block
                for first, end in ranges
                for block in range((first - start) // block_bytes, ceil((end - start) / block_bytes))
            }
        share, shares = (dist.get_rank(), dist.get_world_size()) if divided and is_distributed() else (0, 1)
        for block in sorted(wanted)[share::shares]:
            key = (path, stat.st_mtime_ns, stat.st_size, block)
            if key in _compared:
                continue
            first = start + block * block_bytes
            end = min(first + block_bytes, stat.st_size)
            if f"{_crc_of(file, first, end):08x}" != crcs[block]:
                raise _damaged(path, f"a weight in its bytes {first:,} to {end:,}")
            _compared.add(key)


def _crc_of(file: BinaryIO, first: int, end: int) -> int:
    file.seek(first)
    crc, buffer = 0, memoryview(bytearray(min(_READ_BYTES, end - first)))
    while first < end and (count := file.readinto(buffer[: end - first])):  # type: ignore[attr-defined]
        crc, first = zlib.crc32(buffer[:count], crc), first + count
    return crc


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: {what} is not what was written (CRC-32 differs): the disk or a copy damaged the file. Copy or "
        "download it again, or export it again from its checkpoint (ltx-titan export)."
    )
