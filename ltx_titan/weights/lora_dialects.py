"""Writes LoRA files in the dialects of the tools in use, and names the dialect of a file.

    dialect      read by                                           scale of B A
    comfyui      ComfyUI, ltx-pipelines, diffusers, ltx_titan      1: multiplied into B
    diffusers    diffusers (its own layer names)                   1: multiplied into B
    peft         PEFT, as a folder with adapter_config.json        alpha / rank, in the config
    kohya        kohya's scripts, musubi-tuner, ComfyUI            alpha / rank, in `.alpha` tensors

`lora_formats.py` reads all of them, so a file that is converted and converted back keeps its update.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from safetensors import safe_open
from torch import Tensor

from ltx_titan.common.files import write_text
from ltx_titan.common.tensors import on_meta
from ltx_titan.model import LTXTransformer
from ltx_titan.weights.export import save_safetensors
from ltx_titan.weights.lora_files import LoRAWeights
from ltx_titan.weights.lora_formats import DOWN, OFFICIAL_PREFIX, PEFT_PREFIX, UP, flat_prefix, read_lora_layers
from ltx_titan.weights.metadata import CheckpointMetadata, read_metadata
from ltx_titan.weights.names import name_to_diffusers
from ltx_titan.weights.shapes import RELEASED, released_config

Dialect = Literal["comfyui", "diffusers", "peft", "kohya"]
Number = TypeVar("Number", int, float)
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
# Dialects that state the scale of B A; elsewhere it is multiplied into B.
_STATED: tuple[Dialect, ...] = ("peft", "kohya")
_KOHYA_PREFIX = "lora_unet_"
_PEFT_WEIGHTS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# States a scale in the dialect that was read, and would be applied again.
_STALE_KEYS = ("lora_adapter_metadata",)


def read_lora(path: str | Path) -> tuple[dict[str, LoRAWeights], CheckpointMetadata]:
    """Reads a whole LoRA file in any dialect.

    Returns:
        Tensors of each layer by its official name, in the dtypes of the file, with the scale of its writer; and the
        header.

    Raises:
        ValueError: the file is no LoRA file, or a layer's name cannot be resolved.
    """
    metadata = read_metadata(path)
    # "_" for "." cannot be undone without the names of all layers.
    is_flat = any(flat_prefix(key) for key in metadata.tensors)
    layers = read_lora_layers(path, _released_layers() if is_flat else ())
    unresolved = [name for name in layers if flat_prefix(name)]
    if unresolved:
        raise ValueError(
            f"{path}: expected a LoRA of an LTX-2 model, found {len(unresolved)} layers that none of them has, such as "
            f"{unresolved[0]}."
        )
    with safe_open(path, framework="pt") as file:
        weights = {
            name: LoRAWeights(file.get_tensor(layer.down_key), file.get_tensor(layer.up_key), layer.scale)
            for name, layer in layers.items()
        }
    return weights, metadata


def dialect_of(metadata: CheckpointMetadata) -> str:
    """Names the dialect of a LoRA file, for messages."""
    keys = list(metadata.tensors)
    if any(flat_prefix(key) for key in keys):
        return "kohya"
    if any(key.startswith(PEFT_PREFIX) for key in keys):
        return "peft"
    if any(key.startswith("transformer.") for key in keys):
        return "diffusers"
    return "comfyui" if all(key.startswith(OFFICIAL_PREFIX) for key in keys) else "other"


def write_lora(
    layers: Mapping[str, LoRAWeights],
    path: Path,
    header: Mapping[str, str],
    dialect: Dialect = "comfyui",
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes a LoRA file.

    Args:
        layers: by official name.
        path: a file; with `peft` a folder.
        header: metadata entries.
        dialect: names of the tensors.
        dtype: of the tensors; None keeps those of `layers`.

    Returns:
        The file with the weights.
    """
    if dialect == "peft":
        # The config first: weights without it have another scale, which readers refuse.
        write_text(path / _PEFT_CONFIG, json.dumps(_peft_config(layers), indent=2) + "\n")
        path = path / _PEFT_WEIGHTS
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_b = layer.lora_b if dialect in _STATED or layer.scaling == 1.0 else layer.lora_b.float() * layer.scaling
        down, up = _keys(name, dialect)
        tensors[down] = layer.lora_a.to(dtype or layer.lora_a.dtype)
        tensors[up] = lora_b.to(dtype or layer.lora_b.dtype)
        if dialect == "kohya":
            alpha = layer.scaling * layer.lora_a.shape[0]
            tensors[down.replace(".lora_down.weight", ".alpha")] = torch.tensor(alpha, dtype=torch.float32)
    save_safetensors(path, tensors, _header_of(layers, header, dialect))
    return path


def _keys(name: str, dialect: Dialect) -> tuple[str, str]:
    """File keys of A and B of a layer."""
    if dialect == "kohya":
        flat = _KOHYA_PREFIX + name.replace(".", "_")
        return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
    module = {
        "comfyui": OFFICIAL_PREFIX + name,
        "diffusers": f"transformer.{name_to_diffusers(name)}",
        "peft": PEFT_PREFIX + name,
    }[dialect]
    return module + DOWN, module + UP


def _peft_config(layers: Mapping[str, LoRAWeights]) -> dict[str, Any]:
    """PEFT's `LoraConfig`, with the exceptions from the most frequent rank and alpha by layer."""
    ranks = {name: layer.lora_a.shape[0] for name, layer in layers.items()}
    alphas = {name: layer.scaling * ranks[name] for name, layer in layers.items()}
    rank, alpha = _most_frequent(list(ranks.values())), _most_frequent(list(alphas.values()))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(layers),
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "bias": "none",
    }


def _most_frequent(values: Sequence[Number]) -> Number:
    return max(set(values), key=lambda value: values.count(value))


def _header_of(layers: Mapping[str, LoRAWeights], header: Mapping[str, str], dialect: Dialect) -> dict[str, str]:
    """A header that describes `layers`, whatever the file that it was copied from had."""
    kept = {key: value for key, value in header.items() if key not in _STALE_KEYS}
    ranks = {layer.lora_a.shape[0] for layer in layers.values()}
    scales = {layer.scaling if dialect in _STATED else 1.0 for layer in layers.values()}
    if "ss_network_dim" in kept and len(ranks) == 1:
        kept["ss_network_dim"] = str(*ranks)
    if "ss_network_alpha" in kept and len(ranks) == 1 and len(scales) == 1:
        kept["ss_network_alpha"] = f"{ranks.pop() * scales.pop():g}"
    return kept


@cache
def _released_layers() -> list[str]:
    """Names of all modules of the released transformers."""
    names: dict[str, None] = {}
    for shape in RELEASED:
        config = released_config(shape)["transformer"]
        with on_meta():
            # Blocks are alike, so one of them is built.
            model = LTXTransformer.from_config({**config, "num_layers": 1})
        for name, _ in model.named_modules():
            first, in_block, rest = name.partition("transformer_blocks.0.")
            blocks = [f"{first}transformer_blocks.{block}.{rest}" for block in range(config["num_layers"])]
            names |= dict.fromkeys(blocks if in_block else [name])
    return list(names)
