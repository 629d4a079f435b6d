"""Loads modules from official safetensors files, strictly: every tensor of a component must match the module.

There are two destinations. `load_parameters` streams weights into a model that is already sharded: it was built on the
meta device, parallelized and materialized, and its parameters are plain tensors or DTensors of any Shard and Replicate
placements. Each rank reads only the box of each tensor that it holds, from the memory-mapped file, and casts while
copying. So no rank and no host ever holds the model twice, and starting on 64 ranks reads the file once per replica.
`load_module` replaces the tensors of a meta-device module on one device, as codecs and connectors need it.

Both find every mismatch from the header and report all of them together, before any weight is read. Quantized files
(see `stored`) are dequantized while reading, on the device.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_titan.common.progress import ProgressLog
from ltx_titan.common.tensors import on_meta
from ltx_titan.model import TextConnectors
from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.metadata import CheckpointMetadata, ModelSource, read_metadata
from ltx_titan.weights.names import CONNECTORS, TRANSFORMER, Component, listed
from ltx_titan.weights.stored import StoredWeight, stored_weights
from ltx_titan.weights.tensors import full_box, local_box, module_tensors

Rename = Callable[[str], str | None]


def keep_name(name: str) -> str | None:
    """The default `rename`: the module's names are the official ones."""
    return name


def allow_none(name: str) -> bool:
    """The default `allow_unused`: the module must use every weight of the component."""
    return False


def load_parameters(
    module: nn.Module,
    path: str | Path,
    *,
    component: Component = TRANSFORMER,
    rename: Rename = keep_name,
    allow_unused: Callable[[str], bool] = allow_none,
) -> None:
    """Fills a module's parameters and persistent buffers in place from a safetensors file.

    Args:
        module: materialized module, with or without FSDP2, tensor parallel, activation checkpointing and compile.
        path: an official checkpoint file.
        component: the part of the file that the module is.
        rename: module name (wrappers removed) -> official name, or None for a tensor that is not in the file and
            keeps its value, such as an adapter's.
        allow_unused: official names that may be in the file and not in the module, see `names.unused_by`.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or of an unreadable dtype; all are listed.
    """
    targets = _targets(module, rename)
    copy_weights(path, match_weights(read_metadata(path), _shapes(targets), component, allow_unused), targets)


def check_fits(
    module: nn.Module,
    path: str | Path,
    *,
    component: Component = TRANSFORMER,
    rename: Rename = keep_name,
    allow_unused: Callable[[str], bool] = allow_none,
) -> None:
    """Checks names, shapes and dtypes as `load_parameters` does, without reading weights.

    Works on the meta device, so a wrong checkpoint is reported before any memory is allocated.

    Raises:
        ValueError: as `load_parameters`.
    """
    match_weights(read_metadata(path), _shapes(_targets(module, rename)), component, allow_unused)


def load_module(
    module: nn.Module,
    metadata: CheckpointMetadata,
    component: Component,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> None:
    """Replaces the tensors of a module, which may be on the meta device, with those of a file.

    Args:
        module: a plain module; buffers that its state dict does not list keep their values and device.
        metadata: header of the file.
        component: the part of the file that the module is.
        device: destination; `meta` checks the file and reads nothing.
        dtype: of floating-point tensors.

    Raises:
        ValueError: as `load_parameters`.
    """
    tensors = read_tensors(metadata, _shapes(module.state_dict()), component, device=device, dtype=dtype)
    if torch.device(device).type != "meta":
        # assign, because copying into meta tensors is a no-op.
        module.load_state_dict(tensors, strict=True, assign=True)


def build_connectors(source: ModelSource, path: Path) -> TextConnectors:
    """Builds the text connectors on the meta device; names and shapes are checked against `path`."""
    with on_meta():
        connectors = TextConnectors.from_config(source.config)
    check_fits(connectors, path, component=CONNECTORS)
    return connectors


def find_connectors(source: ModelSource, connectors_path: str | None) -> Path:
    """Path of the file with a job's text connectors, checked.

    Args:
        source: the transformer, whose file usually holds its connectors as well.
        connectors_path: `model.connectors_path` of the job.

    Raises:
        ValueError: there is no file, or it does not hold the connectors.
    """
    path = connectors_path or source.path
    if path is None:
        raise ValueError(
            'the data holds text features, which need text connectors, but model.init = "random" has no file. Set '
            "model.connectors_path, or use finished contexts (data.synthetic.contexts = true)."
        )
    build_connectors(source, Path(path))
    return Path(path)


def load_text_connectors(
    path: str | Path, device: str | torch.device, dtype: torch.dtype, config_path: str | Path | None = None
) -> TextConnectors:
    """Loads both text connectors, frozen, on one device: for preprocessing and prompts. Training shards them instead.

    Args:
        path: the file with their weights.
        device: destination.
        dtype: of their weights.
        config_path: checkpoint with their config; None: `path`.

    Raises:
        ValueError: the file has no connectors, or they do not match its metadata.
    """
    metadata = read_metadata(path)
    # Sizes first, weights later: nothing is allocated twice.
    with on_meta():
        connectors = TextConnectors.from_config(read_metadata(config_path or path).config)
    load_module(connectors, metadata, CONNECTORS, device=device, dtype=dtype)
    return connectors.requires_grad_(False).eval()


def read_tensors(
    metadata: CheckpointMetadata,
    shapes: Mapping[str, tuple[int, ...]],
    component: Component,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Reads all tensors of a component into memory.

    Args:
        metadata: header of the file.
        shapes: name -> expected shape.
        component: maps file keys to these names.
        device: destination; on `meta` tensors have no values and nothing is read.
        dtype: of floating-point tensors; None keeps the stored one.

    Raises:
        ValueError: as `load_parameters`.
    """
    device = torch.device(device)
    weights = match_weights(metadata, shapes, component)
    if device.type == "meta":
        return {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    keys = [key for weight in weights.values() for key in (weight.key, *weight.companions.values())]
    check_contents(metadata.path, [metadata.range_of(key) for key in keys])
    tensors = {}
    with safe_open(metadata.path, framework="pt", device="cpu") as file:
        for name, weight in weights.items():
            # Cast one by one: two copies of the component would not fit where one just does.
            tensor = weight.read(file, full_box(weight.shape), device)
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return tensors


@torch.no_grad()
def copy_weights(path: str | Path, weights: Mapping[str, StoredWeight], targets: Mapping[str, Tensor]) -> None:
    """Copies weights of a file into tensors of the same names, each rank its own shard.

    Args:
        path: the file.
        weights: from `match_weights`.
        targets: plain tensors or DTensors.

    Raises:
        ValueError: the file is not what was written, or has weights that are not finite.
    """
    check_contents(path, divided=True)
    boxes = {name: local_box(targets[name]) for name in weights}
    progress = ProgressLog(f"reading {Path(path).name}", sum(local.nbytes for local, _ in boxes.values()), "GiB")
    with safe_open(path, framework="pt", device="cpu") as file:
        # In file order: each rank then walks through the pages once, forwards.
        for name, weight in sorted(weights.items(), key=lambda item: item[1].start):
            local, box = boxes[name]
            # FSDP2 gives ranks an empty shard if a dimension is smaller than the mesh.
            if local.numel() > 0:
                local.copy_(weight.read(file, box, local.device))
                progress.advance(local.nbytes)
    refuse_not_finite(path, targets)


def refuse_not_finite(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a file with NaN or infinite weights, which would be blamed on the job's settings later."""
    checked = {name: local_box(tensor)[0] for name, tensor in tensors.items()}
    # 8-bit floats have no such test, and quantized data is not numbers.
    checked = {name: t for name, t in checked.items() if t.is_floating_point() and t.itemsize > 1 and t.numel() > 0}
    if not checked:
        return
    # One flag per tensor on its device, and one wait for all of a device; streamed weights are on the host.
    bad = []
    for device in {tensor.device for tensor in checked.values()}:
        names = [name for name, tensor in checked.items() if tensor.device == device]
        finite = torch.stack([checked[name].isfinite().all() for name in names]).tolist()
        bad += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    if bad:
        raise ValueError(
            f"{path}: {len(bad)} tensors contain NaN or infinity: {listed(bad)}. The file is damaged or its training "
            "failed: download or export it again."
        )


def match_weights(
    metadata: CheckpointMetadata,
    shapes: Mapping[str, tuple[int, ...]],
    component: Component,
    allow_unused: Callable[[str], bool] = allow_none,
) -> dict[str, StoredWeight]:
    """Finds the stored weight of each name; the one place where strictness is decided.

    Args:
        metadata: header of the file.
        shapes: official name -> expected shape.
        component: maps file keys to these names.
        allow_unused: names that may be in the file and not in `shapes`.

    Returns:
        The weights by name, in the order of `shapes`.

    Raises:
        ValueError: as `load_parameters`.
    """
    in_file: dict[str, StoredWeight] = {}
    repeated = []
    for key, weight in stored_weights(metadata).items():
        # Both names of a lone video connector map to one parameter; silently taking either could load a stale copy.
        name = component.module_name(key)
        if name in in_file:
            repeated.append(f"{name} ({in_file[name].key} and {key})")
        elif name is not None:
            in_file[name] = weight
    weights = {name: in_file[name] for name in shapes if name in in_file}
    # All problems in one message: a wrong file usually has several, and each start of a job takes minutes.
    problems = {
        "missing from the file": [name for name in shapes if name not in in_file],
        "in the file, but not in the model": [
            name for name in in_file if name not in shapes and not allow_unused(name)
        ],
        "under two keys": repeated,
        "with another shape": [
            f"{name} (model {list(shapes[name])}, file {list(weight.shape)})"
            for name, weight in weights.items()
            # The shape of an unreadable weight is unknown (packed formats); it is listed below instead.
            if weight.shape != shapes[name] and not weight.problem
        ],
        "in a format that cannot be read; use the official release": [
            f"{name} {weight.problem}" for name, weight in weights.items() if weight.problem
        ],
    }
    lines = [f"  {len(names)} {problem}: {listed(names)}" for problem, names in problems.items() if names]
    if lines:
        raise ValueError(
            f"{metadata.path}: the {component.name} does not fit the model built for it; nothing was loaded.\n"
            + "\n".join(lines)
            + "\nExpected the tensors that the config in the file's metadata describes; use the official file."
        )
    return weights


def _targets(module: nn.Module, rename: Rename) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = {}
    for name, tensor in module_tensors(module).items():
        official = rename(name)
        if official is not None:
            # A rename that merges two names would leave one of them uninitialized.
            assert official not in targets, f"two tensors of the model are called '{official}'"
            targets[official] = tensor
    return targets


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
