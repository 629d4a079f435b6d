"""Many samples in one file: `shard-NNNNN.safetensors` in a source folder, instead of one `.pt` file for each.

A million small files are slow to copy, to list and to back up, and file systems run out of inodes. A shard holds some
dozens of samples; its header says where each tensor lies, so that a sample is read by its slices of the file and
nothing else. Tensors are called `<path of the sample>/<field>`, numbers stand in the metadata entry `samples` (JSON),
and what comes out is what the `.pt` file would have given. A `.pt` file beside a shard is newer than the shard's
sample of the same path and takes its place.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx_titan.data.layout import Fields, Kind, Value, check_fields, field_shapes

_PREFIX, _SUFFIX = "shard-", ".safetensors"
_META_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def shard_path(folder: str | Path, number: int) -> Path:
    """Where shard `number` of a source folder lies."""
    return Path(folder) / f"{_PREFIX}{number:05d}{_SUFFIX}"


def list_shards(folder: str | Path) -> list[Path]:
    """The shards of a source folder, by number."""
    return sorted(path for path in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}") if shard_number(path) is not None)


def shard_number(path: Path) -> int | None:
    """The number of a shard, None for any other file."""
    digits = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return int(digits) if digits.isdecimal() and path.name.endswith(_SUFFIX) else None


def write_shard(path: str | Path, samples: Mapping[str, Mapping[str, Value]]) -> None:
    """Writes a shard, whole or not at all; the same samples in the same order give the same bytes.

    Args:
        path: target.
        samples: path of each sample below the source folder, as `clips/a.pt` -> its fields.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    numbers: dict[str, dict[str, Any]] = {}
    for key, fields in samples.items():
        numbers[key] = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = value.contiguous()
                storage = value.untyped_storage().data_ptr()
                # The library refuses tensors that share memory, as one context for both streams would.
                tensors[f"{key}/{name}"] = value.clone() if storage in storages else value
                storages.add(storage)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    try:
        # One metadata entry only: the library writes several in an order that differs from process to process.
        save_file(tensors, temporary, metadata={"samples": json.dumps(numbers)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def shard_shapes(path: str | Path, kind: Kind | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of every field of every sample of a shard, () for numbers; only the header is read.

    Args:
        path: the shard.
        kind: what its samples must be; None accepts any.

    Raises:
        ValueError: the shard is damaged, or a sample of it is of another kind.
    """
    path = Path(path)
    with _open(path) as (file, numbers):
        samples: dict[str, Fields] = {key: dict(fields) for key, fields in numbers.items()}
        for name in file.keys():  # noqa: SIM118  (a handle, not a dict)
            key, _, field = name.rpartition("/")
            slice_ = file.get_slice(name)
            dtype = _META_DTYPES[slice_.get_dtype()]
            samples[key][field] = torch.empty(slice_.get_shape(), dtype=dtype, device="meta")
    return {key: field_shapes(_label(path, key), fields, kind) for key, fields in samples.items()}


def read_shard_sample(path: str | Path, key: str, kind: Kind | None = None) -> Fields:
    """Reads one sample of a shard and checks all of it; as `read_sample` does for a file of its own.

    Raises:
        ValueError: the shard is damaged, has no such sample, or its fields cannot be used.
    """
    path = Path(path)
    return check_fields(_label(path, key), _read(path, [key])[key], kind)


def read_shard(path: str | Path) -> dict[str, Fields]:
    """All samples of a shard as they were written, in their order.

    Raises:
        ValueError: the shard is damaged.
    """
    return _read(Path(path), None)


def _read(path: Path, keys: list[str] | None) -> dict[str, Fields]:
    with _open(path) as (file, numbers):
        names: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118
            names.setdefault(name.rpartition("/")[0], []).append(name)
        missing = [key for key in keys or () if key not in numbers]
        if missing:
            raise ValueError(f"{path}: expected the sample {missing[0]!r}, found it gone; start the run again.")
        return {
            key: {**numbers[key], **{name.rpartition("/")[2]: file.get_tensor(name) for name in names.get(key, ())}}
            for key in (numbers if keys is None else keys)
        }


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Fields]]]:
    again = "delete it and run the preprocessing again"
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})["samples"])
            yield file, numbers
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a shard, found none; run the preprocessing again.") from error
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a complete shard of samples, found {str(error)!r}; {again}.") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the disk and its permissions.") from error


def _label(path: Path, key: str) -> Path:
    """What messages call a sample."""
    return path / key
