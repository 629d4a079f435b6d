"""Writes safetensors files tensor by tensor, from plain or sharded tensors, with the metadata that loaders need.

The safetensors library wants every tensor of a file in memory at once and orders the metadata by a hash that differs
from process to process, and torch's own export drops the file's `__metadata__`, from which official loaders build the
model. Here the header is written first and the data streamed behind it: sharded tensors are gathered one at a time by
all ranks in the same order, and rank 0 writes. The same input gives the same bytes. The file appears under its name
only when it is complete, with a digest of its contents (digest.py) in its header.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ltx_titan.common.files import atomic_write, sync_folder
from ltx_titan.common.progress import ProgressLog
from ltx_titan.common.ranks import agree, is_main_rank
from ltx_titan.common.tensors import SAFETENSORS_DTYPES
from ltx_titan.weights.digest import DIGEST_KEY, DigestStream, empty_digest
from ltx_titan.weights.names import TRANSFORMER
from ltx_titan.weights.tensors import module_tensors

_DTYPE_CODES = {dtype: code for code, dtype in SAFETENSORS_DTYPES.items()}
# Ranks exchange errors this often: a full disk is noticed within this many tensors, at a negligible cost.
_TENSORS_PER_CHECK = 64


@dataclass(frozen=True)
class ExportTensor:
    """One tensor of a file to be written.

    Attributes:
        name: key in the file.
        shape: global shape.
        dtype: dtype in the file; the source is cast to it.
        source: the tensor (a DTensor is gathered by all ranks), or a function that reads it, called on rank 0 only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Tensor | Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * self.dtype.itemsize


def export_safetensors(path: str | Path, tensors: Iterable[ExportTensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file; every rank must call it with the same tensors in the same order.

    Memory: one full tensor at a time on each rank's device, one on rank 0's host. Data is sorted by decreasing element
    size (the format allows no gaps, and readers want aligned data); tensors of equal element size keep their order.

    Args:
        path: target; an existing file is replaced when the new one is complete.
        tensors: contents of the file.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: the disk is too small, or two tensors have one name.
        RuntimeError: rank 0 failed; raised on the other ranks.
    """
    path = Path(path)
    # A stable sort, so that all ranks gather in the same order and equal input gives equal bytes.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    # On every rank, so that a name that occurs twice is an error on all of them without communication.
    header = _header(path, tensors, metadata)
    what = f"export of {path}"

    # An error that leaves the stack removes the temporary file.
    with ExitStack() as stack:
        file = None
        error: Exception | None = None
        if is_main_rank():
            try:
                file = stack.enter_context(_open(path, header, sum(tensor.num_bytes for tensor in tensors)))
            except (OSError, ValueError) as failure:
                error = failure
        agree(error, what)
        progress = ProgressLog(f"writing {path.name}", sum(tensor.num_bytes for tensor in tensors), "GiB")
        for index, tensor in enumerate(tensors):
            full = _gather(tensor)
            if file is not None and error is None:
                try:
                    _write(file, tensor, full)
                except Exception as failure:  # other ranks are waiting in the next gather: join it until all know
                    error = failure
            # Freed before the next gather, or two full tensors would be on the device.
            del full
            progress.advance(tensor.num_bytes)
            if (index + 1) % _TENSORS_PER_CHECK == 0:
                agree(error, what)
        agree(error, what)
        try:
            stack.close()  # flushes and renames, which can fail as well
        except OSError as failure:
            error = failure
        agree(error, what)


def save_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors that are in memory, in the order of their names; see `export_safetensors`."""
    entries = [ExportTensor(name, tuple(tensor.shape), tensor.dtype, tensor) for name, tensor in tensors.items()]
    export_safetensors(path, sorted(entries, key=lambda entry: entry.name), dict(sorted(metadata.items())))


def transformer_tensors(module: nn.Module, dtype: torch.dtype | None = torch.bfloat16) -> list[ExportTensor]:
    """Tensors of a transformer under its official file keys.

    Args:
        module: the transformer, sharded or not; wrapper levels and float8 weight subclasses are removed.
        dtype: dtype in the file; None keeps the parameters'.
    """
    return [
        ExportTensor(TRANSFORMER.file_key(name), tuple(tensor.shape), dtype or tensor.dtype, tensor)
        for name, tensor in module_tensors(module).items()
    ]


def _header(path: Path, tensors: list[ExportTensor], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and JSON, padded so that the data starts at a multiple of 8 bytes."""
    digest = empty_digest(sum(tensor.num_bytes for tensor in tensors))
    # First, where readers look for it.
    entries: dict[str, Any] = {"__metadata__": {DIGEST_KEY: digest, **metadata}}
    end = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise ValueError(f"{path}: two tensors are called '{tensor.name}'.")
        start, end = end, end + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": _DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # Blanks behind colons tell a digest of ours from one that another writer has copied.
    text = json.dumps(entries, separators=(",", ": ")).encode()
    # Padding is allowed by the format; with data sorted by element size it aligns every tensor.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@contextmanager
def _open(path: Path, header: bytes, data_bytes: int) -> Iterator[DigestStream]:
    """Yields a temporary file after its header; on success flushes it to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = len(header) + data_bytes, shutil.disk_usage(path.parent).free
    # Checked first: a 40 GB export would otherwise fail after minutes.
    if needed > free:
        raise ValueError(
            f"{path.parent}: the export needs {needed:,} bytes, {free:,} are free. Free some space, or export to "
            "another disk."
        )
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        stream = DigestStream(file, header)
        yield stream
        stream.finish()
        # Data must be on disk before the rename, or a crash can leave a file of zeros under the final name.
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _gather(tensor: ExportTensor) -> Tensor | None:
    """The full tensor on rank 0; None on the others, which only take part in the gather, and for a function."""
    if isinstance(tensor.source, DTensor):
        with torch.no_grad():
            # An all-gather: every rank must call it, also the ones that drop the result.
            full = tensor.source.full_tensor()
        return full if is_main_rank() else None
    return tensor.source if isinstance(tensor.source, Tensor) and is_main_rank() else None


def _write(file: DigestStream, tensor: ExportTensor, full: Tensor | None) -> None:
    value = full
    if value is None:
        assert not isinstance(tensor.source, Tensor), f"{tensor.name}: gathered on another rank"
        value = tensor.source()
    assert tuple(value.shape) == tensor.shape, f"{tensor.name}: shape {tuple(value.shape)}, announced {tensor.shape}"
    value = value.detach().to("cpu", tensor.dtype).contiguous()
    # After the cast, in which large values overflow. 8-bit floats have no infinity to look for.
    if value.is_floating_point() and value.itemsize > 1 and not value.isfinite().all():
        raise ValueError(f"{tensor.name}: NaN or infinity in {tensor.dtype}; nothing was exported.")
    # As bytes, because NumPy has neither bfloat16 nor float8.
    file.write(value.reshape(-1).view(torch.uint8).numpy().data)
