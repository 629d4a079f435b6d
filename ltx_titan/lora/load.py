"""Fills the frozen base of an adapted model from an official checkpoint, quantising on the way where asked.

Weights that stay as they are go through the checkpoint package's streamed load. A quantised layer's rows are read from
the file, quantised on the device and dropped, layer by layer: the bfloat16 model never exists in one place, and a rank
reads and quantises only the rows it holds. A row is quantised as a whole also where tensor parallelism splits it, so
every mesh holds the same numbers.

A file that is quantised itself (fp8, NVFP4) is dequantised first, except where the layer keeps weights in the file's
own form: then its bits are kept.
"""

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ltx_titan.lora.names import official_name
from ltx_titan.model.init import init_random_
from ltx_titan.weights import TRANSFORMER, StoredWeight, load_parameters, read_metadata, stored_weights
from ltx_titan.weights.quantized import QuantizedLinear, keep_fp8_rows, keep_nvfp4_rows, quantize_rows

_LISTED = 10


def load_base(model: nn.Module, path: str | Path, *, allow_unused: Callable[[str], bool] = lambda name: False) -> None:
    """Fills every frozen weight; adapters keep their values.

    Args:
        model: adapted by `apply_lora`, sharded or not, with storage.
        path: an official checkpoint.
        allow_unused: official names that may lack a place in the model, as in `checkpoint.load_parameters`.

    Raises:
        ValueError: weights are missing, left over, of another shape or of an unreadable dtype; nothing is loaded.
    """
    layers = quantized_layers(model)
    stored = stored_weights(read_metadata(path))
    keys = {name: TRANSFORMER.file_key(f"{name}.weight") for name in layers}
    problems = []
    for name, layer in layers.items():
        weight, shape = stored.get(keys[name]), (layer.out_features, layer.in_features)
        if weight is None:
            problems.append(f"{keys[name]} is missing")
        elif weight.problem:
            problems.append(f"{keys[name]} {weight.problem}")
        elif weight.shape != shape:
            problems.append(f"{keys[name]} is {list(weight.shape)}, expected {list(shape)}")
    if problems:
        more = f", and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"{path}: {len(problems)} weights to be quantised do not fit the model; nothing was loaded: "
            f"{'; '.join(problems[:_LISTED])}{more}. Use the release that the model was built from."
        )
    handled = {f"{name}.weight" for name in layers}
    load_parameters(model, path, rename=official_name, allow_unused=lambda name: name in handled or allow_unused(name))
    with safe_open(path, framework="pt", device="cpu") as file:
        # In file order: each rank then walks through the pages once, forwards.
        for name in sorted(layers, key=lambda name: stored[keys[name]].start):
            _fill(layers[name], _rows_of(stored[keys[name]], file, layers[name]))


def init_base_(model: nn.Module, seed: int) -> None:
    """Seeded random values in place of a checkpoint, for benchmarks and tests. Overwrites adapters as well."""
    init_random_(model, seed)
    for name, layer in quantized_layers(model).items():
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device=_local(layer.qdata).device)
        init_random_(linear, seed + zlib.crc32(name.encode()))
        weight = linear.weight.detach()
        _fill(layer, lambda rows, _, form=layer.form, weight=weight: quantize_rows(weight[rows], form))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """All quantised layers by official name."""
    found = {official_name(name): m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    return {name: layer for name, layer in found.items() if name is not None}


_QuantizedRows = Callable[[slice, torch.device], tuple[Tensor, Tensor]]
"""(rows, device) -> data and scales of these rows, as the layer keeps them."""


def _rows_of(weight: StoredWeight, file: Any, layer: QuantizedLinear) -> _QuantizedRows:
    columns = slice(0, layer.in_features)

    def rows_of(rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        if (weight.form, layer.form) == ("fp8", "float8"):
            return keep_fp8_rows(*weight.read_fp8(file, (rows, columns), device))
        if (weight.form, layer.form) == ("nvfp4", "nvfp4"):
            return keep_nvfp4_rows(*weight.read_nvfp4(file, rows, device))
        return quantize_rows(weight.read(file, (rows, columns), device).to(device), layer.form)

    return rows_of


@torch.no_grad()
def _fill(layer: QuantizedLinear, rows_of: _QuantizedRows) -> None:
    data, (rows, columns) = _box(layer.qdata)
    if data.numel() == 0:
        return
    scale, (_, groups) = _box(layer.scale)
    values, scales = rows_of(rows, data.device)
    data.copy_(values[:, columns])
    scale.copy_(scales[:, groups])


def _box(tensor: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """This rank's part of a parameter, and which part of the whole it is."""
    if not isinstance(tensor, DTensor):
        return tensor, tuple(slice(0, size) for size in tensor.shape)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
