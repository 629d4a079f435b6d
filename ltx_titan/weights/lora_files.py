"""Adapter files: what ComfyUI, ltx-pipelines and diffusers load, written and read.

    official     diffusion_model.<official module>.lora_A.weight  [rank, in]     and  .lora_B.weight  [out, rank]
    diffusers    transformer.<diffusers module>.lora_A.weight                     and  .lora_B.weight

Readers know no alpha and apply B A as it stands, so the adapter's scale is multiplied into B. ComfyUI and diffusers
take the official form; the second one is for tools that know only diffusers' own names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ltx_titan.lora.apply import adapters
from ltx_titan.lora.names import diffusers_name, is_adapter
from ltx_titan.weights.export import ExportTensor, export_safetensors
from ltx_titan.weights.load import load_parameters
from ltx_titan.weights.metadata import TensorInfo, read_metadata
from ltx_titan.weights.names import Component
from ltx_titan.weights.tensors import module_tensors

OFFICIAL_PREFIX = "diffusion_model."
DIFFUSERS_PREFIX = "transformer."
Layout = Literal["official", "diffusers"]
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
_LISTED = 10


def export_lora(
    model: nn.Module,
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    layout: Layout = "official",
) -> None:
    """Writes all adapters; every rank calls it.

    Args:
        model: the adapted model, sharded or not.
        path: target file.
        metadata: header entries, strings to strings; see `reference_metadata`.
        dtype: of the tensors in the file. Readers merge in bfloat16 anyway.
        layout: naming, see above.

    Raises:
        ValueError: the adapters are DoRA.
    """
    layers, tensors = adapters(model), module_tensors(model)
    if any(layer.magnitude is not None for layer in layers.values()):
        raise ValueError(
            "lora.dora = true: adapter files have no place for DoRA's magnitudes. Diffusers and ltx-pipelines drop "
            "them and would apply another model; export a merged checkpoint instead."
        )
    entries = []
    for name, layer in layers.items():
        key = OFFICIAL_PREFIX + name if layout == "official" else DIFFUSERS_PREFIX + diffusers_name(name)
        for suffix in _SUFFIXES:
            tensor = tensors[name + suffix]
            if suffix == _SUFFIXES[1] and layer.scaling != 1.0:
                tensor = tensor * layer.scaling
            entries.append(ExportTensor(key + suffix, tuple(tensor.shape), dtype, tensor))
    export_safetensors(path, entries, metadata or {})


def reference_metadata(spatial: int, temporal: int) -> dict[str, str]:
    """Header entries that tell inference how much smaller an in-context reference is than the target."""
    return {
        "reference_downscale_factor": str(spatial),
        "reference_spatial_scale_factor": str(spatial),
        "reference_temporal_scale_factor": str(temporal),
    }


@torch.no_grad()
def load_lora(model: nn.Module, path: str | Path) -> None:
    """Fills all adapters from a file of either layout, with or without the official prefix.

    Args:
        model: adapted with the file's rank and targets; sharded or not, with storage.
        path: an adapter file.

    Raises:
        ValueError: the file's adapters are not the model's; all differences are listed and nothing is loaded.
    """
    layers = adapters(model)
    if any(layer.magnitude is not None for layer in layers.values()):
        raise ValueError(f"{path}: adapter files hold no DoRA magnitudes; set lora.dora = false to start from one.")
    header = read_metadata(path).tensors
    by_key = _names_by_key(list(header), list(layers))
    _check(path, layers, header, by_key)
    component = Component("adapter", by_key.get, lambda name: OFFICIAL_PREFIX + name)
    load_parameters(model, path, component=component, rename=lambda name: name if is_adapter(name) else None)
    for layer in layers.values():
        if layer.scaling != 1.0:
            weight = layer.lora_B.weight
            (weight.to_local() if isinstance(weight, DTensor) else weight).div_(layer.scaling)


def _names_by_key(keys: list[str], names: list[str]) -> dict[str, str]:
    """Parameter name of each file key that looks like an adapter's, whether the model has it or not."""
    official = {diffusers_name(name): name for name in names}
    found = {}
    for key in keys:
        for suffix in _SUFFIXES:
            if key.endswith(suffix):
                module = key.removesuffix(suffix)
                if module.startswith(DIFFUSERS_PREFIX):
                    module = module.removeprefix(DIFFUSERS_PREFIX)
                    module = official.get(module, module)
                found[key] = module.removeprefix(OFFICIAL_PREFIX) + suffix
    return found


def _check(path: str | Path, layers: dict, header: dict[str, TensorInfo], by_key: dict[str, str]) -> None:
    expected = {}
    for name, layer in layers.items():
        expected[name + _SUFFIXES[0]] = tuple(layer.lora_A.weight.shape)
        expected[name + _SUFFIXES[1]] = tuple(layer.lora_B.weight.shape)
    found = {name: header[key].shape for key, name in by_key.items()}
    ranks = {shape[0] for name, shape in found.items() if name.endswith(_SUFFIXES[0])}
    ours = {shape[0] for name, shape in expected.items() if name.endswith(_SUFFIXES[0])}
    lines = []
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    foreign = [key for key in header if key not in by_key]
    for what, names in (
        ("missing from the file", missing),
        ("in the file without an adapter in the model", unexpected),
        ("of another kind than lora_A/lora_B weights", foreign),
    ):
        if names:
            lines.append(f"  {len(names)} {what}: {_first(names)}")
    if missing or unexpected:
        lines.append("  lora.targets decides which layers have an adapter: set it to those of the file.")
    if ranks != ours:
        lines.append(f"  The file's rank is {_or(ranks)}, lora.rank is {_or(ours)}.")
    else:
        other = [
            f"{name} (model {list(expected[name])}, file {list(found[name])})"
            for name in expected
            if name in found and found[name] != expected[name]
        ]
        if other:
            lines.append(f"  {len(other)} of another shape: {_first(other)}")
            lines.append("  The adapter belongs to another model generation; adapters do not carry over.")
    if lines:
        raise ValueError(f"{path}: the adapter does not fit this model; nothing was loaded.\n" + "\n".join(lines))


def _first(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _or(values: set[int]) -> str:
    return " or ".join(map(str, sorted(values)))
