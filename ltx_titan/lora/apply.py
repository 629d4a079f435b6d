"""Puts adapters into a transformer and gives them their first values."""

from hashlib import blake2b
from math import sqrt

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ltx_titan.config import BaseDtype, LoRASection
from ltx_titan.lora.linear import LoRALinear
from ltx_titan.lora.names import official_name
from ltx_titan.lora.targets import PRESETS, find_targets
from ltx_titan.weights.quantized import QUANTIZED, QuantizedLinear, dequantize

_QUANTIZED_ENDINGS = PRESETS["all_attention"] + PRESETS["video_ffn"] + PRESETS["audio_ffn"]


def apply_lora(model: nn.Module, settings: LoRASection) -> list[str]:
    """Freezes a transformer, brings its base to `settings.base_dtype` and adds trainable adapters, in place.

    Call it first, before tensor parallelism, compilation and FSDP2; the model may be on the meta device. A quantised
    base means the attention projections and feed-forward layers of all blocks, adapted or not: nearly all of the
    weights. Embeddings, modulation, gates, norms and output heads stay in bfloat16, where rounding would cost most.

    Args:
        model: a plain transformer.
        settings: what to adapt, and how.

    Returns:
        Official names of the adapted layers.

    Raises:
        ValueError: a target matches nothing, or the base cannot be quantised as asked.
    """
    assert not any(isinstance(module, LoRALinear) for module in model.modules()), "the model has adapters already"
    names = find_targets(model, settings.targets)
    _freeze(model, torch.float32 if settings.base_dtype == "float32" else torch.bfloat16)
    if settings.base_dtype in QUANTIZED:
        _quantize(model, settings.base_dtype)
    for name in names:
        model.set_submodule(name, LoRALinear(model.get_submodule(name), settings))
    return names


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """All adapted layers by official name."""
    found = {official_name(name): module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: module for name, module in found.items() if name is not None}


@torch.no_grad()
def init_lora_(model: nn.Module, seed: int) -> None:
    """First values: A uniform in +-1 / sqrt(in), B zero, so that training starts from the base model.

    A DoRA magnitude starts as the norms of the base's rows: load the base first. Every A is drawn in full on the CPU
    from a generator keyed by (seed, name), and a rank keeps its slice: the same values on every mesh and device.
    """
    for name, layer in adapters(model).items():
        weight = layer.lora_A.weight
        bound = 1 / sqrt(layer.in_features)
        generator = torch.Generator().manual_seed(_key(seed, name))
        full = torch.rand(weight.shape, generator=generator).mul_(2 * bound).sub_(bound)
        _fill(weight, full)
        layer.lora_B.weight.zero_()
        if layer.magnitude is not None:
            _init_magnitude(layer)


def _init_magnitude(layer: LoRALinear) -> None:
    base = layer.base
    sharded = base.qdata if isinstance(base, QuantizedLinear) else base.weight
    if isinstance(sharded, DTensor) and any(placement.is_shard(1) for placement in sharded.placements):
        raise ValueError(
            "lora.dora = true: expected every rank to hold whole rows of a weight, found one split by columns; "
            "set parallelism.tp = 1."
        )
    # Rows are whole and split alike, so each rank's norms are those of its own rows.
    if isinstance(base, QuantizedLinear):
        weight = dequantize(_local(base.qdata), _local(base.scale), base.form, torch.float32)
    else:
        weight = _local(base.weight).float()
    _local(layer.magnitude).copy_(torch.linalg.vector_norm(weight, dim=1))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _freeze(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def _quantize(model: nn.Module, form: BaseDtype) -> None:
    for name, module in list(model.named_modules()):
        in_block = name.startswith("transformer_blocks.")
        if in_block and isinstance(module, nn.Linear) and name.endswith(tuple("." + e for e in _QUANTIZED_ENDINGS)):
            model.set_submodule(name, QuantizedLinear.from_linear(module, form))


def _fill(parameter: nn.Parameter, full: Tensor) -> None:
    """Writes a tensor that every rank has in full into a parameter that may be sharded."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    full = full.to(parameter.to_local().device)
    mesh, placements = parameter.device_mesh, parameter.placements
    parameter.to_local().copy_(distribute_tensor(full, mesh, placements, src_data_rank=None).to_local())


def _key(seed: int, name: str) -> int:
    return int.from_bytes(blake2b(f"{seed}/{name}.lora_A".encode(), digest_size=8).digest()) >> 1
