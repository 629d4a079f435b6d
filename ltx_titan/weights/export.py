"""Writes safetensors files tensor by tensor, from sharded models, with the metadata that inference tools need.

The safetensors library wants every tensor of a file in memory at once, and torch's own export gives up the file's
`__metadata__`, from which official loaders build the model. Here the header is written first and the data streamed
behind it: sharded tensors are gathered one at a time by all ranks in the same order, and rank 0 writes. The file
appears under its name only when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ltx_titan.common.files import sync_folder
from ltx_titan.common.ranks import agree, is_main_rank
from ltx_titan.weights.metadata import DTYPE_BITS, CheckpointMetadata
from ltx_titan.weights.names import TRANSFORMER
from ltx_titan.weights.tensors import module_tensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Ranks compare notes this often: a full disk is noticed within this many tensors, at a negligible cost.
_TENSORS_PER_CHECK = 64


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of a file to be written.

    Attributes:
        name: key in the file.
        shape: global shape.
        dtype: dtype in the file; what `source` gives is cast to it.
        source: the tensor (a DTensor is gathered by all ranks), or a function that reads it, called on rank 0 only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Tensor | Callable[[], Tensor]


def export_safetensors(path: str | Path, tensors: Iterable[ExportTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; every rank must call it with the same tensors in the same order.

    Memory: one full tensor at a time on each rank's device, one on rank 0's host. Data is laid out by falling element
    size (the format allows no gaps, and readers want aligned data), within that in the given order.

    Args:
        path: target; written as `<path>.tmp` and renamed. An existing file is replaced.
        tensors: what to write.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: the disk is too small, or two tensors have one name.
        RuntimeError: rank 0 failed; raised on the other ranks.
    """
    path = Path(path)
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = _header(path, tensors, metadata)
    temporary = path.with_name(path.name + ".tmp")
    what = f"export of {path}"

    with ExitStack() as stack:
        file, error = None, None
        if is_main_rank():
            try:
                file = stack.enter_context(_open_with_room(temporary, header, tensors))
            except (OSError, ValueError) as failure:
                error = failure
        agree(error, what)
        for index, tensor in enumerate(tensors):
            full = _gather(tensor)
            if file is not None and error is None:
                try:
                    _write(file, tensor, full)
                except Exception as failure:  # the gathers must go on until all ranks have heard of it
                    error = failure
            del full
            if index % _TENSORS_PER_CHECK == _TENSORS_PER_CHECK - 1:
                _agree_or_remove(error, what, temporary)
        if file is not None and error is None:
            try:
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(path)
                sync_folder(path.parent)
            except OSError as failure:
                error = failure
        _agree_or_remove(error, what, temporary)


def export_transformer(
    module: nn.Module,
    path: str | Path,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    rename: Callable[[str], str | None] = lambda name: name,
    carry_over: CheckpointMetadata | None = None,
) -> None:
    """Exports a transformer under its official names, as a file that loaders of the official checkpoints read.

    Args:
        module: the transformer, sharded or not; wrapper levels and float8 weight subclasses are taken off.
        path: target file.
        config: the whole config object (`{"transformer": ..., "vae": ...}`) the model was built from.
        metadata: further header entries, usually the source checkpoint's `CheckpointMetadata.raw`; its `config` is
            replaced.
        dtype: dtype in the file; None keeps the parameters'.
        rename: module name -> official name; None leaves a tensor out.
        carry_over: a checkpoint whose tensors outside the transformer (connectors, projections, autoencoders,
            vocoder) are copied as well, for a file that inference runs from alone. By default the file holds the
            transformer only.

    Raises:
        ValueError, RuntimeError: as `export_safetensors`.
    """
    tensors = [
        ExportTensor(TRANSFORMER.file_key(official), tuple(tensor.shape), dtype or tensor.dtype, tensor)
        for name, tensor in module_tensors(module).items()
        if (official := rename(name)) is not None
    ]
    header = {**(metadata or {}), "config": json.dumps(config)}
    with ExitStack() as stack:
        if carry_over is not None:
            file = stack.enter_context(safe_open(carry_over.path, framework="pt", device="cpu"))
            for key, info in carry_over.tensors.items():
                if TRANSFORMER.module_name(key) is not None:
                    continue
                if info.dtype not in _DTYPES:
                    raise ValueError(
                        f"{carry_over.path}: tensor '{key}' is {info.dtype}, which cannot be carried over."
                    )
                read = partial(file.get_tensor, key)
                tensors.append(ExportTensor(key, info.shape, _DTYPES[info.dtype], read))
        export_safetensors(path, tensors, header)


def _header(path: Path, tensors: list[ExportTensor], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded so that the data starts at a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise ValueError(f"{path}: two tensors are called '{tensor.name}'.")
        start, end = end, end + _bytes(tensor)
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: ExportTensor) -> int:
    return prod(tensor.shape) * DTYPE_BITS[_CODES[tensor.dtype]] // 8


def _open_with_room(temporary: Path, header: bytes, tensors: list[ExportTensor]) -> BinaryIO:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.unlink(missing_ok=True)
    needed, free = len(header) + sum(map(_bytes, tensors)), shutil.disk_usage(temporary.parent).free
    if needed > free:
        raise ValueError(
            f"{temporary.parent}: the export needs {needed:,} bytes, {free:,} are free. Make room, or export elsewhere."
        )
    file = temporary.open("wb")
    file.write(header)
    return file


def _gather(tensor: ExportTensor) -> Tensor | None:
    """The full tensor on rank 0; the others take part in the gather and drop it."""
    if isinstance(tensor.source, DTensor):
        with torch.no_grad():
            full = tensor.source.full_tensor()
        return full if is_main_rank() else None
    return tensor.source if isinstance(tensor.source, Tensor) and is_main_rank() else None


def _write(file: BinaryIO, tensor: ExportTensor, full: Tensor | None) -> None:
    value = tensor.source() if full is None else full
    assert tuple(value.shape) == tensor.shape, f"{tensor.name}: shape {tuple(value.shape)}, announced {tensor.shape}"
    value = value.detach().to("cpu", tensor.dtype).contiguous()
    file.write(value.reshape(-1).view(torch.uint8).numpy())


def _agree_or_remove(error: Exception | None, what: str, temporary: Path) -> None:
    try:
        agree(error, what)
    except Exception:
        if is_main_rank():
            temporary.unlink(missing_ok=True)
        raise
