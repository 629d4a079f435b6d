"""LoRA files, as ComfyUI, ltx-pipelines and diffusers load them: written, read, and merged into weights.

We write the official form, `diffusion_model.<module>.lora_A.weight` and `.lora_B.weight`, which all three load, and
read those of `lora_formats.py`. The official form stores no alpha: readers add B A as it is, so the adapter's scale is
multiplied into B. Everything here works on named tensors; `ltx_titan.lora` owns the modules.

Merging computes the sum in float32 and rounds once; loaders of LoRA files usually round B A to bfloat16 first.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from ltx_titan.common.ranks import is_main_rank
from ltx_titan.common.tensors import SAFETENSORS_DTYPES, local
from ltx_titan.config import ExportLayout
from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.export import ExportTensor, export_safetensors
from ltx_titan.weights.layout import complete_export
from ltx_titan.weights.load import copy_weights, match_weights
from ltx_titan.weights.lora_formats import DOWN, OFFICIAL_PREFIX, UP, LoRALayer, read_lora_layers
from ltx_titan.weights.metadata import CheckpointMetadata, ModelSource, read_metadata
from ltx_titan.weights.names import TRANSFORMER, Component, listed
from ltx_titan.weights.stored import StoredWeight, stored_weights
from ltx_titan.weights.tensors import full_box


@dataclass(frozen=True)
class LoRAWeights:
    """Tensors of one adapted layer, plain or sharded.

    Attributes:
        lora_a: down projection [rank, in].
        lora_b: up projection [out, rank].
        scaling: factor on B A: alpha / rank, or alpha / sqrt(rank).
        magnitude: DoRA's norm of each row [out]; None for plain LoRA.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    magnitude: Tensor | None = None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape (out, in) of the adapted weight."""
        return self.lora_b.shape[0], self.lora_a.shape[1]


def export_lora(
    adapters: Mapping[str, LoRAWeights],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes adapters in the official form; every rank calls it.

    Args:
        adapters: by official layer name, sharded or not.
        path: target file.
        metadata: header entries, strings to strings; see `reference_metadata`.
        dtype: of the tensors in the file. Most readers merge in bfloat16.

    Raises:
        ValueError: the adapters are DoRA.
    """
    if any(adapter.magnitude is not None for adapter in adapters.values()):
        raise ValueError(
            "lora.dora = true: LoRA files cannot store DoRA's magnitudes. Diffusers and ltx-pipelines would ignore "
            "them and compute another model; export a merged checkpoint instead."
        )
    entries = []
    for name, adapter in adapters.items():
        # Into B rather than A or both: B starts at zero, so its range depends on training anyway.
        lora_b = adapter.lora_b if adapter.scaling == 1.0 else adapter.lora_b * adapter.scaling
        for suffix, tensor in ((DOWN, adapter.lora_a), (UP, lora_b)):
            entries.append(ExportTensor(OFFICIAL_PREFIX + name + suffix, tuple(tensor.shape), dtype, tensor))
    export_safetensors(path, entries, metadata or {})


def reference_metadata(spatial: int, temporal: int) -> dict[str, str]:
    """Header entries for an in-context LoRA: how much smaller than the target its references are.

    Args:
        spatial: factor of width and height.
        temporal: factor of the number of frames.
    """
    return {
        "reference_downscale_factor": str(spatial),
        "reference_spatial_scale_factor": str(spatial),
        "reference_temporal_scale_factor": str(temporal),
    }


@torch.no_grad()
def load_lora(adapters: Mapping[str, LoRAWeights], path: str | Path) -> None:
    """Fills adapters in place from a LoRA file in any form that `lora_formats.py` reads.

    Args:
        adapters: by official layer name, with the file's rank and targets; sharded or not, with storage.
        path: a LoRA file.

    Raises:
        ValueError: the file's adapters are not the model's; all differences are listed and nothing is loaded.
    """
    # Before any tensor is read, so that a wrong file leaves the adapters as they are.
    layers = _match_layers(adapters, path)
    targets = {name + DOWN: adapter.lora_a for name, adapter in adapters.items()}
    targets |= {name + UP: adapter.lora_b for name, adapter in adapters.items()}
    copy_weights(path, _match_weights(targets, layers, path), targets)
    # Our scale is multiplied in the forward pass; the writer's is in B, or in its alpha.
    for name, adapter in adapters.items():
        if layers[name].scale != adapter.scaling:
            local(adapter.lora_b).mul_(layers[name].scale / adapter.scaling)


def check_lora(adapters: Mapping[str, LoRAWeights], path: str | Path) -> None:
    """Checks names, shapes and dtypes as `load_lora` does, without reading weights; adapters may be on the meta device.

    Raises:
        ValueError: as `load_lora`.
    """
    layers = _match_layers(adapters, path)
    targets = {name + DOWN: adapter.lora_a for name, adapter in adapters.items()}
    _match_weights(targets | {name + UP: adapter.lora_b for name, adapter in adapters.items()}, layers, path)


def _match_layers(adapters: Mapping[str, LoRAWeights], path: str | Path) -> dict[str, LoRALayer]:
    """Layers of the file, which are those of the model."""
    if any(adapter.magnitude is not None for adapter in adapters.values()):
        raise ValueError(f"{path}: LoRA files store no DoRA magnitudes; set lora.dora = false to start from one.")
    layers = read_lora_layers(path, adapters)
    check_layers(path, layers, {name: adapter.weight_shape for name, adapter in adapters.items()}, complete=True)
    _check_rank(path, layers, {adapter.lora_a.shape[0] for adapter in adapters.values()})
    return layers


def _match_weights(
    targets: Mapping[str, Tensor], layers: Mapping[str, LoRALayer], path: str | Path
) -> dict[str, StoredWeight]:
    keys = {name + DOWN: layer.down_key for name, layer in layers.items()}
    keys |= {name + UP: layer.up_key for name, layer in layers.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    return match_weights(read_metadata(path), shapes, Component.from_keys("adapter", keys))


def export_merged(
    adapters: Mapping[str, LoRAWeights],
    base_path: str | Path,
    path: str | Path,
    connectors_path: str | Path | None = None,
    layout: ExportLayout = "with_connectors",
    *,
    done: Callable[[], None] = lambda: None,
) -> None:
    """Writes the base transformer with every adapter merged in; every rank calls it.

    The base is read from the file it was trained from, not from the model, so that adapters on a base that was
    quantized while loading merge into the original weights. One weight at a time is in memory, and all adapters on
    rank 0's host. Dtypes and header are those of the base file, except that weights quantized in the file are written
    in bfloat16: rounding the sum to 8 bits again would undo small adapters.

    Args:
        adapters: by official layer name, sharded or not.
        base_path: the checkpoint that the base was loaded from.
        path: target file.
        connectors_path, layout: as `complete_export`.
        done: called on rank 0 after each weight of the transformer is merged.

    Raises:
        ValueError: an adapted layer is not in the base file, or has another shape there.
    """
    metadata = read_metadata(base_path)
    shapes = {f"{name}.weight": adapter.weight_shape for name, adapter in adapters.items()}
    # Only the adapted layers must match: the rest of the file is copied as it is.
    match_weights(metadata, shapes, TRANSFORMER, allow_unused=lambda name: True)
    # All ranks gather all adapters first: rank 0 alone reads and merges weights below, without collectives.
    gathered = {f"{name}.weight": _gather(adapter) for name, adapter in adapters.items()}
    with ExitStack() as stack:
        file = stack.enter_context(safe_open(base_path, framework="pt", device="cpu"))
        tensors = []
        for key, weight in stored_weights(metadata).items():
            name = TRANSFORMER.module_name(key)
            if name is None:  # connectors and codecs, which no adapter changes
                continue
            is_plain = weight.form == "plain"
            dtype = SAFETENSORS_DTYPES[metadata.tensors[key].dtype] if is_plain else torch.bfloat16
            # Called when the tensor is written, so that one weight at a time is in memory.
            read = partial(_read_merged, metadata, file, weight, gathered.get(name), done)
            tensors.append(ExportTensor(key, weight.shape, dtype, read))
        # All weights are plain in the new file, so the declaration of quantized layers must not be copied.
        header = {key: value for key, value in metadata.raw.items() if key != "_quantization_metadata"}
        source = ModelSource(metadata.config, header, metadata.path)
        export_safetensors(path, *complete_export(tensors, source, connectors_path, layout))


def merged_weight(base: Tensor, adapter: LoRAWeights) -> Tensor:
    """Computes the single weight [out, in] that is equivalent to base and adapter, in float32.

    LoRA: W + s B A. DoRA: m * (W + s B A) / |W + s B A|, with the norm of each row.
    """
    weight = base.float() + adapter.scaling * (adapter.lora_b.float() @ adapter.lora_a.float())
    if adapter.magnitude is not None:
        # The norm is of the merged weight, so it must follow the sum.
        weight *= (adapter.magnitude.float() / torch.linalg.vector_norm(weight, dim=1))[:, None]
    return weight


def _read_merged(
    base: CheckpointMetadata, file: Any, weight: StoredWeight, adapter: LoRAWeights | None, done: Callable[[], None]
) -> Tensor:
    check_contents(base.path, [base.range_of(key) for key in (weight.key, *weight.companions.values())])
    tensor = weight.read(file, full_box(weight.shape), torch.device("cpu"))
    done()
    return tensor if adapter is None else merged_weight(tensor, adapter)


@torch.no_grad()
def _gather(adapter: LoRAWeights) -> LoRAWeights:
    """The full tensors on rank 0's host; on the meta device on other ranks, which take part in the collectives."""

    def gather(tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        # Other ranks need the shapes alone: a copy on each rank's host would count once per GPU of a node.
        return full.cpu() if is_main_rank() else full.to("meta")

    magnitude = None if adapter.magnitude is None else gather(adapter.magnitude)
    return replace(adapter, lora_a=gather(adapter.lora_a), lora_b=gather(adapter.lora_b), magnitude=magnitude)


def check_layers(
    path: str | Path,
    layers: Mapping[str, LoRALayer | LoRAWeights],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    complete: bool,
) -> None:
    """Compares a file's layers with the model's.

    Args:
        path: of the file.
        layers: of the file, by official name.
        shapes: of the model's weights, by layer.
        complete: whether the file must have all layers of `shapes`.

    Raises:
        ValueError: with all differences.
    """
    missing = [name for name in shapes if complete and name not in layers]
    unexpected = [name for name in layers if name not in shapes]
    different = [
        f"{name} (model {list(shapes[name])}, file {list(layer.weight_shape)})"
        for name, layer in layers.items()
        if name in shapes and layer.weight_shape != shapes[name]
    ]
    lines = []
    if missing:
        lines.append(f"  {len(missing)} layers missing from the file: {listed(missing)}")
    if unexpected:
        problem = "that have no adapter in the model" if complete else "that are not in the model"
        lines.append(f"  {len(unexpected)} layers {problem}: {listed(unexpected)}")
    if complete and lines:
        lines.append("  lora.targets selects the adapted layers: set it to those of the file.")
    if different:
        lines.append(f"  {len(different)} layers with another shape: {listed(different)}")
        lines.append("  The LoRA was trained on another model generation; use one for this checkpoint.")
    if lines:
        raise ValueError(f"{path}: the LoRA does not fit this model; nothing was loaded.\n" + "\n".join(lines))


def _check_rank(path: str | Path, layers: Mapping[str, LoRALayer], expected: set[int]) -> None:
    found = {layer.rank for layer in layers.values()}
    if found != expected:
        file_rank, job_rank = (" or ".join(map(str, sorted(ranks))) for ranks in (found, expected))
        raise ValueError(
            f"{path}: the LoRA does not fit this model; nothing was loaded. The file's rank is {file_rank}, lora.rank "
            f"is {job_rank}: set lora.rank to the file's."
        )
