"""Reads what an offline run of Weights & Biases has written: records of protobuf in LevelDB's log format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK, _PART_HEADER = 7, 32768, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


def run_folders(folder: Path) -> list[Path]:
    """Folders of the offline runs below a job's folder, in the order in which they were started.

    `Run.finish` returns before W&B's service process has written the last records; `teardown` waits until it has
    exited.
    """
    wandb.teardown()
    return sorted((folder / "wandb").glob("offline-run-*"))


def history(run: Path) -> list[dict]:
    """Logged values, call by call; a field of an image, clip or audio is `<tag>.<field>`."""
    rows = []
    for record in _records(next(run.glob("*.wandb"))):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def _records(path: Path) -> Iterator[Record]:
    data, offset, parts = path.read_bytes(), _FILE_HEADER, b""
    while offset + _PART_HEADER.size <= len(data):
        left = _BLOCK - offset % _BLOCK
        if left < _PART_HEADER.size:
            offset += left
            continue
        _, length, kind = _PART_HEADER.unpack_from(data, offset)
        offset += _PART_HEADER.size
        parts += data[offset : offset + length]
        offset += length
        if kind in (_FULL, _LAST):
            yield Record.FromString(parts)
            parts = b""
