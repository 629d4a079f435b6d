"""Codecs in the official layout: one safetensors file, or a split pack of several, whose metadata says what is in it.

Every codec is loaded the same way. Its constructor arguments are derived from the metadata object `config`; the names
of its parameters are translated into the names in the file (module to file, never the other way, so that one map
serves loading, writing and checking); and the weights are loaded strictly. A misspelled prefix passes a non-strict
load in silence and leaves layers at their random values, so missing and left-over tensors are one error that names
them. All of that is found from the header, before any weight is read; on the device `meta` nothing else is done.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_titan.weights.metadata import CheckpointMetadata, read_metadata


@dataclass(frozen=True)
class SingleFile:
    """What the header of a checkpoint file says, as codecs ask for it.

    Attributes:
        metadata: the header.
        names: names of all tensors.
    """

    metadata: CheckpointMetadata
    names: frozenset[str]

    @property
    def path(self) -> Path:
        """The file."""
        return self.metadata.path

    @property
    def config(self) -> dict[str, Any]:
        """The metadata object `config`; a section that the file does not hold is absent or empty."""
        return self.metadata.config

    def section(self, name: str, component: str) -> dict[str, Any]:
        """Section `name` of the config, for instance `vae`.

        Raises:
            ValueError: the file does not describe that component.
        """
        section = self.config.get(name)
        if not section:
            present = sorted(key for key, value in self.config.items() if value)
            raise ValueError(
                f"{self.path}: metadata config has no section {name!r} (it has {present}), so the file holds no "
                f"{component}; give the file that does"
            )
        return section

    def prefix(self, prefix: str) -> str:
        """`prefix` where tensors carry it, else the empty string: files of a split pack use bare names."""
        return prefix if any(name.startswith(prefix) for name in self.names) else ""


def open_header(path: str | Path) -> SingleFile:
    """Read the header of a file that need not have a `config`, such as a packed text encoder.

    Raises:
        ValueError: the path is no whole safetensors file.
    """
    metadata = read_metadata(path)
    return SingleFile(metadata, frozenset(metadata.tensors))


def open_single_file(path: str | Path) -> SingleFile:
    """Read the header of a checkpoint, no tensor.

    Raises:
        ValueError: the path is no whole safetensors file, or its metadata has no readable `config`.
    """
    file = open_header(path)
    if not file.config:
        raise ValueError(
            f"{path}: its metadata has no JSON object 'config' (found keys {sorted(file.metadata.raw)}); the sizes of "
            "a model are read from there, so use the official file rather than a converted one"
        )
    return file


def read_tensors(
    file: SingleFile, shapes: Mapping[str, tuple[int, ...]], device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Read some tensors in the dtype they are stored in.

    Args:
        file: the checkpoint.
        shapes: name in the file -> the shape that it must have there.
        device: where they go; on `meta` they have no values.

    Raises:
        ValueError: one of them is not in the file, or has another shape.
    """
    missing = sorted(set(shapes) - file.names)
    if missing:
        raise ValueError(f"{file.path}: lacks {some(missing)}; the file is incomplete or of another layout")
    check_shapes(file, shapes)
    if torch.device(device).type == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with safe_open(file.path, framework="pt") as handle:
        return {name: handle.get_tensor(name).to(device) for name in shapes}


def load_strictly(
    module: nn.Module,
    file: SingleFile,
    names: Mapping[str, str],
    covers: tuple[str, ...],
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> None:
    """Fill `module`, which may sit on the meta device, with weights cast to `dtype`.

    Args:
        module: receives the weights; they replace its own tensors.
        file: the checkpoint.
        names: name in `module.state_dict()` -> name in the file, for every entry of the state dict.
        covers: prefixes of the file whose tensors must all be used.
        dtype: what floating-point weights are cast to.
        device: where the weights go; `meta` checks the file and reads nothing.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape than the metadata promises.
    """
    own = module.state_dict()
    assert own.keys() == names.keys()
    check_names(file, set(names.values()), covers)
    check_shapes(file, {stored: tuple(own[name].shape) for name, stored in names.items()})
    if torch.device(device).type == "meta":
        return
    weights = {}
    with safe_open(file.path, framework="pt") as handle:
        for name, stored in names.items():
            tensor = handle.get_tensor(stored)
            weights[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.load_state_dict(weights, strict=True, assign=True)


def check_names(file: SingleFile, expected: set[str], covers: tuple[str, ...]) -> None:
    """Check that a file has all `expected` tensors and no other ones below the prefixes `covers`.

    Raises:
        ValueError: with the names.
    """
    missing = sorted(expected - file.names)
    left_over = sorted(name for name in file.names - expected if name.startswith(covers))
    if missing or left_over:
        raise ValueError(
            f"{file.path}: weights do not match the metadata: missing {some(missing)}; not expected "
            f"{some(left_over)}; the file is damaged, or of a layout this version does not know"
        )


def check_shapes(file: SingleFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that tensors have the shapes that the metadata asks for.

    Raises:
        ValueError: with the first that has not.
    """
    for name, expected in shapes.items():
        found = file.metadata.tensors[name].shape
        if found != expected:
            raise ValueError(
                f"{file.path}: tensor {name} has shape {list(found)}, the metadata config asks for {list(expected)}"
            )


def some(names: Iterable[str], limit: int = 6) -> str:
    """`names` for a message: how many, and the first few."""
    names = list(names)
    if not names:
        return "none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)} ({', '.join(names[:limit])}{more})"


_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def write_single_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, byte for byte the same for the same input, under a temporary name until complete.

    safetensors' own writer orders the metadata by a hash that differs from process to process.
    """
    path = Path(path)
    # Widest first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    with temporary.open("wb") as handle:
        handle.write(len(encoded).to_bytes(8, "little"))
        handle.write(encoded)
        for name in order:
            handle.write(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    temporary.rename(path)
