"""Shards: many samples in one `shard-NNNNN.safetensors` of a source folder, instead of a `.pt` file for each.

A million small files are slow to copy, to list and to back up, and file systems run out of inodes. A shard holds some
dozens of samples; its header has the offset of each tensor, so reading a sample reads only its slices of the file.
Tensors are named `<path of the sample>/<field>`, numbers are stored in the metadata entry `samples` (JSON), and a
sample reads exactly as from its `.pt` file. A `.pt` file in the same folder is newer than the shard's sample of that
path and overrides it.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltx_titan.common.files import atomic_write
from ltx_titan.common.tensors import SAFETENSORS_DTYPES
from ltx_titan.data.layout import Fields, Kind, UnreadableError, Value, check_fields, field_shapes

_PREFIX, _SUFFIX = "shard-", ".safetensors"
# Among a sample's numbers in the metadata. safetensors has no checksums, and a rotten bit is another latent.
_DIGEST = "crc32"


def shard_path(folder: str | Path, number: int) -> Path:
    """Path of shard `number` of a source folder."""
    return Path(folder) / f"{_PREFIX}{number:05d}{_SUFFIX}"


def list_shards(folder: str | Path) -> list[Path]:
    """The shards of a source folder, by number."""
    return sorted(path for path in Path(folder).glob(f"{_PREFIX}*{_SUFFIX}") if shard_number(path) is not None)


def shard_number(path: Path) -> int | None:
    """The number of a shard, None for any other file."""
    digits = path.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return int(digits) if digits.isdecimal() and path.name.endswith(_SUFFIX) else None


def write_shard(path: str | Path, samples: Mapping[str, Mapping[str, Value]]) -> None:
    """Writes a shard atomically; the same samples in the same order give the same bytes.

    Args:
        path: target.
        samples: path of each sample below the source folder, such as `clips/a.pt` -> its fields.
    """
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    numbers: dict[str, dict[str, Any]] = {}
    for key, fields in samples.items():
        _check_key(Path(path), key)
        numbers[key] = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
        numbers[key][_DIGEST] = _crc32(fields)
        for name, value in fields.items():
            if isinstance(value, Tensor):
                value = value.contiguous()
                storage = value.untyped_storage().data_ptr()
                # safetensors refuses tensors that share memory, such as one context for both streams.
                tensors[f"{_prefix(key)}/{name}"] = value.clone() if storage in storages else value
                storages.add(storage)
    with atomic_write(path) as temporary:
        # One metadata entry only: safetensors writes several in an order that differs from process to process.
        save_file(tensors, temporary, metadata={"samples": json.dumps(numbers)})


def shard_shapes(path: str | Path, kind: Kind | None = None) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of every field of every sample of a shard, () for numbers; only the header is read.

    Args:
        path: the shard.
        kind: kind that its samples must be; None accepts any.

    Raises:
        ValueError: the shard is damaged, or a sample of it is of another kind.
    """
    path = Path(path)
    with _open(path) as (file, numbers):
        samples: dict[str, Fields] = {key: _without_digest(fields) for key, fields in numbers.items()}
        keys = {_prefix(key): key for key in numbers}
        for name in file.keys():  # noqa: SIM118  (a handle, not a dict)
            # Paths of samples contain slashes, field names do not.
            prefix, _, field = name.rpartition("/")
            key = keys[prefix]
            slice_ = file.get_slice(name)
            dtype = SAFETENSORS_DTYPES[slice_.get_dtype()]
            # Meta tensors have dtype and shape, so they pass through the same checks as loaded ones.
            samples[key][field] = torch.empty(slice_.get_shape(), dtype=dtype, device="meta")
    return {key: field_shapes(_label(path, key), fields, kind) for key, fields in samples.items()}


def read_shard_sample(path: str | Path, key: str, kind: Kind | None = None) -> Fields:
    """Reads one sample of a shard and checks all of it, as `read_sample` does for a `.pt` file.

    Args:
        path: the shard.
        key: path of the sample below the source folder, such as `clips/a.pt`.
        kind: kind that it must be; None accepts any.

    Raises:
        ValueError: the shard is damaged, lacks the sample, or its fields cannot be used.
    """
    path = Path(path)
    return check_fields(_label(path, key), _read(path, [key])[key], kind)


def read_shard(path: str | Path) -> dict[str, Fields]:
    """Reads all samples of a shard as they were written, in their order.

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
            raise ValueError(f"{path}: expected the sample {missing[0]!r}, found it removed; start the run again.")
        samples: dict[str, Fields] = {}
        for key in numbers if keys is None else keys:
            samples[key] = _without_digest(numbers[key])
            samples[key] |= {name.rpartition("/")[2]: file.get_tensor(name) for name in names.get(_prefix(key), ())}
            # Shards of earlier versions have none.
            if _DIGEST in numbers[key] and numbers[key][_DIGEST] != _crc32(samples[key]):
                raise ValueError(
                    f"{_label(path, key)}: damaged bytes: its checksum differs; delete the shard and run the "
                    "preprocessing again."
                )
        return samples


@contextmanager
def _open(path: Path) -> Iterator[tuple[Any, dict[str, Fields]]]:
    again = "delete it and run the preprocessing again"
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _parse_samples(path, (file.metadata() or {})["samples"])
    except FileNotFoundError as error:
        raise ValueError(f"{path}: expected a shard, found none; run the preprocessing again.") from error
    except (SafetensorError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a complete shard of samples, found {str(error)!r}; {again}.") from error
    except OSError as error:
        raise UnreadableError(
            f"{path}: cannot be read ({error.strerror}); check the disk and its permissions."
        ) from error


def _parse_samples(path: Path, text: str) -> dict[str, Fields]:
    """Numbers of each sample, from the metadata entry `samples`."""
    samples = json.loads(text)
    if not isinstance(samples, dict) or not all(isinstance(fields, dict) for fields in samples.values()):
        raise json.JSONDecodeError("samples are no table of tables", text, 0)
    for key, fields in samples.items():
        _check_key(path, key)
        for name, value in fields.items():
            if not isinstance(value, (int, float)):
                raise ValueError(f"{_label(path, key)}: {name}: expected a number, found {value!r}; delete the shard.")
    return samples


def _check_key(path: Path, key: str) -> None:
    """Refuses names of samples that are no path below a folder: commands write files of these names."""
    parts = key.split("/")
    if key.startswith("/") or "\0" in key or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path}: expected paths of samples below the folder, found {key!r}; delete the shard.")


def _without_digest(fields: Mapping[str, Value]) -> Fields:
    return {name: value for name, value in fields.items() if name != _DIGEST}


def _crc32(fields: Mapping[str, Value]) -> int:
    """CRC-32 of a sample: names, types, shapes and bytes of its fields, in the order of their names."""
    crc = 0
    for name, value in sorted(fields.items()):
        if isinstance(value, Tensor):
            value = value.detach().contiguous()
            crc = zlib.crc32(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode(), crc)
            # Flat first: a scalar has no dimension whose elements could be split into bytes.
            crc = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, crc)
        else:
            crc = zlib.crc32(f"{name}\0{json.dumps(value)}\0".encode(), crc)
    return crc


def _prefix(key: str) -> str:
    """Name of a sample before those of its tensors: its path; one that is not UTF-8 in JSON's escapes."""
    return key if key.isascii() or key.encode("utf-8", "ignore").decode() == key else json.dumps(key)[1:-1]


def _label(path: Path, key: str) -> Path:
    """Name of a sample in messages."""
    return path / key
