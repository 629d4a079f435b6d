"""Streams official weights from one safetensors file into a model that is already sharded.

The model was built on the meta device, parallelised and materialised; its parameters are plain tensors or DTensors of
any Shard and Replicate placements. Each rank reads only the box of each tensor that it holds, straight from the
memory-mapped file, and casts it while copying. So no rank and no host ever holds the model twice, and starting on 64
ranks reads the file once per replica. Quantised files (see `stored`) are dequantised on the way, on the device.

Every mismatch is found from the header first and reported together, before any weight is read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ltx_titan.weights.metadata import CheckpointMetadata, read_metadata
from ltx_titan.weights.names import TRANSFORMER, Component
from ltx_titan.weights.stored import StoredWeight, stored_weights
from ltx_titan.weights.tensors import module_tensors

Rename = Callable[[str], str | None]
_LISTED = 10


@dataclass(frozen=True)
class _Read:
    """One tensor to fill: where it is in the file and what receives it."""

    weight: StoredWeight
    target: Tensor


def keep_name(name: str) -> str | None:
    """The default `rename`: the module's names are the official ones."""
    return name


def allow_none(name: str) -> bool:
    """The default `allow_unused`: every weight of the component must have a place in the module."""
    return False


def load_parameters(
    module: nn.Module,
    path: str | Path,
    *,
    component: Component = TRANSFORMER,
    rename: Rename = keep_name,
    allow_unused: Callable[[str], bool] = allow_none,
) -> None:
    """Fills a module's parameters and persistent buffers from a safetensors file.

    Args:
        module: materialised module; FSDP2, tensor parallel, activation-checkpoint and compile wrappers may be on it.
        path: an official checkpoint file.
        component: which part of the file the module is.
        rename: module name (wrappers removed) -> official name, or None for a tensor that is not in the file and
            keeps its value, such as an adapter's.
        allow_unused: official names that may be in the file without having a place in the module, see
            `names.unused_by`.

    Raises:
        ValueError: tensors are missing, left over, of another shape or kept in a form that cannot be read; all are
            listed.
    """
    reads = _plan(module, read_metadata(path), component, rename, allow_unused)
    with torch.no_grad(), safe_open(path, framework="pt", device="cpu") as file:
        # In file order: each rank then walks through the pages once, forwards.
        for read in sorted(reads, key=lambda read: read.weight.start):
            local, box = _local_box(read.target)
            if local.numel() > 0:
                local.copy_(read.weight.read(file, box, local.device))


def check_fits(
    module: nn.Module,
    path: str | Path,
    *,
    component: Component = TRANSFORMER,
    rename: Rename = keep_name,
    allow_unused: Callable[[str], bool] = allow_none,
) -> None:
    """Checks names, shapes and dtypes as `load_parameters` does, without reading weights.

    Works on the meta device, so a wrong checkpoint is reported before any memory is taken.

    Raises:
        ValueError: as `load_parameters`.
    """
    _plan(module, read_metadata(path), component, rename, allow_unused)


def _plan(
    module: nn.Module,
    metadata: CheckpointMetadata,
    component: Component,
    rename: Rename,
    allow_unused: Callable[[str], bool],
) -> list[_Read]:
    stored = stored_weights(metadata)
    in_file = {name: weight for key, weight in stored.items() if (name := component.module_name(key)) is not None}
    targets: dict[str, Tensor] = {}
    for name, tensor in module_tensors(module).items():
        if (official := rename(name)) is not None:
            assert official not in targets, f"two tensors of the model are called '{official}'"
            targets[official] = tensor

    shared = [name for name in targets if name in in_file]
    problems = (
        _listing("missing from the file", (name for name in targets if name not in in_file)),
        _listing(
            "in the file without a place in the model",
            (name for name in in_file if name not in targets and not allow_unused(name)),
        ),
        _listing(
            "of another shape",
            (
                f"{name} (model {list(targets[name].shape)}, file {list(in_file[name].shape)})"
                for name in shared
                if tuple(targets[name].shape) != in_file[name].shape and not in_file[name].problem
            ),
        ),
        _listing(
            "in a form that cannot be read; use the official release",
            (f"{name} {in_file[name].problem}" for name in shared if in_file[name].problem),
        ),
    )
    found = [problem for problem in problems if problem]
    if found:
        raise ValueError(
            f"{metadata.path}: the {component.name} does not fit the model built for it; nothing was loaded.\n"
            + "\n".join(found)
            + "\nIs the model config the one in this file's metadata?"
        )
    return [_Read(in_file[name], targets[name]) for name in shared]


def _listing(what: str, names: Iterable[str]) -> str:
    names = list(names)
    if not names:
        return ""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"  {len(names)} {what}: {', '.join(names[:_LISTED])}{more}"


def _local_box(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a tensor, and the slices of the whole tensor that it is (none for a scalar)."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    assert not any(placement.is_partial() for placement in tensor.placements), "parameters are never partial sums"
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor._local_tensor
    assert tuple(local.shape) == tuple(shape), f"local shape {tuple(local.shape)}, expected {tuple(shape)}"
    return local, tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
