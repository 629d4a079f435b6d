"""Loads the frozen base of an adapted model from an official checkpoint, quantizing while reading if requested.

Unquantized weights go through the streamed load of `ltx_titan.weights`. A quantized layer's rows are read from the
file, quantized on the device and dropped, layer by layer: the bfloat16 model never exists as a whole, and a rank
reads and quantizes only the rows it holds. A row is quantized as a whole even if tensor parallelism splits it, so the
quantized values are the same on every mesh.

A file that is quantized itself (fp8, NVFP4) is dequantized first, unless the layer has the file's own form: then its
bits are kept.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_titan.common.tensors import local
from ltx_titan.config import BaseDtype
from ltx_titan.model.init import draw_parameter, init_random_
from ltx_titan.weights import (
    TRANSFORMER,
    QuantizedLinear,
    StoredWeight,
    load_parameters,
    match_weights,
    official_name,
    read_metadata,
    refuse_not_finite,
)
from ltx_titan.weights.quantized import keep_fp8_rows, keep_nvfp4_rows, quantize_rows
from ltx_titan.weights.tensors import local_box

_ReadRows = Callable[[slice, torch.device], tuple[Tensor, Tensor]]
"""(rows, device) -> data and scales of these rows, as `QuantizedLinear` stores them."""


def load_base(
    model: nn.Module,
    path: str | Path,
    *,
    allow_unused: Callable[[str], bool] = lambda name: False,
    device: torch.device | None = None,
) -> None:
    """Fills every frozen weight; adapters keep their values.

    Args:
        model: adapted by `apply_lora`, sharded or not, with storage.
        path: an official checkpoint.
        allow_unused: official names that may be in the file and not in the model, as in `weights.load_parameters`.
        device: that weights are quantized on, if they are not stored there; None: where they are.

    Raises:
        ValueError: weights are missing, unexpected, of another shape or of an unreadable dtype; nothing is loaded.
    """
    layers = {f"{name}.weight": layer for name, layer in quantized_layers(model).items()}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    weights = match_weights(read_metadata(path), shapes, TRANSFORMER, allow_unused=lambda name: True)
    # The rest, strictly; the file's weights of quantized layers are the only ones that it may skip.
    load_parameters(model, path, rename=official_name, allow_unused=lambda name: name in layers or allow_unused(name))
    with safe_open(path, framework="pt", device="cpu") as file:
        # In file order: each rank then walks through the pages once, forwards.
        for name, weight in sorted(weights.items(), key=lambda item: item[1].start):
            _fill(layers[name], _row_reader(weight, file, layers[name]), device)
    # A row with a NaN has no finite scale; the packed values themselves are not numbers.
    refuse_not_finite(path, {name: layer.scale for name, layer in layers.items()})


def init_base_(model: nn.Module, seed: int, device: torch.device | None = None) -> None:
    """Fills the base with seeded random values instead of a checkpoint's. Overwrites adapters as well.

    Args:
        model: as for `load_base`.
        seed: of all generators.
        device: that values are drawn and quantized on; None: where they are stored.
    """
    init_random_(model, seed, device)
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        # Drawn at full size, one layer at a time: the bfloat16 weights that the layer would have without quantization.
        shape = layer.out_features, layer.in_features
        weight = draw_parameter(f"{name}.weight", shape, seed, device or local(layer.qdata).device)
        _fill(layer, _quantizer(weight.bfloat16(), layer.form), device)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Returns all quantized layers by official name."""
    found = {official_name(name): m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {name: layer for name, layer in found.items() if name is not None}


def _quantizer(weight: Tensor, form: BaseDtype) -> _ReadRows:
    return lambda rows, device: quantize_rows(weight[rows], form)


def _row_reader(weight: StoredWeight, file: Any, layer: QuantizedLinear) -> _ReadRows:
    columns = slice(0, layer.in_features)

    def read(rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        # Same form in file and layer: no second rounding.
        if (weight.form, layer.form) == ("fp8", "float8"):
            return keep_fp8_rows(*weight.read_fp8(file, (rows, columns), device))
        if (weight.form, layer.form) == ("nvfp4", "nvfp4"):
            return keep_nvfp4_rows(*weight.read_nvfp4(file, rows, device))
        return quantize_rows(weight.read(file, (rows, columns), device).to(device), layer.form)

    return read


@torch.no_grad()
def _fill(layer: QuantizedLinear, read: _ReadRows, device: torch.device | None) -> None:
    data, (rows, columns) = local_box(layer.qdata)
    if data.numel() == 0:
        return
    scale, (_, groups) = local_box(layer.scale)
    # Whole rows are quantized; a rank that holds some of the columns keeps its part of data and scales.
    values, scales = read(rows, device or data.device)
    data.copy_(values[:, columns])
    scale.copy_(scales[:, groups])
