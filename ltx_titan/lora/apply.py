"""Adds adapters to a transformer and initializes them."""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ltx_titan.common.tensors import local, seed_of
from ltx_titan.config import BaseDtype, LoRARank, LoRASection
from ltx_titan.lora.linear import LoRALinear
from ltx_titan.lora.targets import PRESETS, find_targets
from ltx_titan.model.parts import PARTS, matches
from ltx_titan.weights import QUANTIZED, LoRAWeights, QuantizedLinear, module_tensors, official_name
from ltx_titan.weights.quantized import dequantize

_QUANTIZED_ENDINGS = PRESETS["all_attention"] + PRESETS["video_ffn"] + PRESETS["audio_ffn"]


def apply_lora(model: nn.Module, settings: LoRASection) -> list[str]:
    """Freezes a transformer, converts its base to `settings.base_dtype` and adds trainable adapters, in place.

    Call it first, before tensor parallelism, compilation and FSDP2; the model may be on the meta device. Quantization
    covers the attention projections and feed-forward layers of all blocks, adapted or not: nearly all of the weights.
    Embeddings, AdaLN, gates, norms and output heads stay in bfloat16, since rounding them would cost the most accuracy.

    Args:
        model: a plain transformer.
        settings: targets, rank and base dtype.

    Returns:
        Official names of the adapted layers.

    Raises:
        ValueError: a target matches nothing, or the base dtype does not support the width of a layer.
    """
    assert not any(isinstance(module, LoRALinear) for module in model.modules()), "the model already has adapters"
    # Before anything changes, so that a wrong target leaves the model unchanged.
    names = find_targets(model, settings.targets)
    _freeze(model, torch.float32 if settings.base_dtype == "float32" else torch.bfloat16)
    if settings.base_dtype in QUANTIZED:
        _quantize(model, settings.base_dtype)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear | QuantizedLinear)
        chosen = rank_of(name, settings)
        model.set_submodule(name, LoRALinear(layer, settings if chosen is None else settings.with_rank(chosen)))
    return names


def rank_of(name: str, settings: LoRASection) -> LoRARank | None:
    """The entry of `lora.ranks` for an adapted layer; None if it has `lora.rank`."""
    return next((entry for entry in settings.ranks if matches(name, entry.match, entry.blocks)), None)


def check_ranks(names: Iterable[str], settings: LoRASection) -> None:
    """Checks that each entry of `lora.ranks` gives some layer its rank.

    Args:
        names: of the adapted layers, from `apply_lora`.
        settings: the job's `[lora]`.

    Raises:
        ValueError: an entry matches no adapted layer, or only layers of earlier entries.
    """
    used = {id(rank_of(name, settings)) for name in names}
    for index, entry in enumerate(settings.ranks):
        if id(entry) not in used:
            raise ValueError(
                f"lora.ranks[{index}]: match = {list(entry.match)}, blocks = {entry.blocks and list(entry.blocks)} "
                f"leaves no adapted layer that an earlier entry does not match. match takes {', '.join(PARTS)}, and "
                f"parts of names such as attn1.to_q; lora.targets selects the adapted layers."
            )


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Returns all adapted layers by official name."""
    found = {official_name(name): module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: module for name, module in found.items() if name is not None}


def adapter_weights(model: nn.Module) -> dict[str, LoRAWeights]:
    """Returns the tensors of all adapters by official layer name, detached, sharing storage with the model.

    Args:
        model: adapted by `apply_lora`, sharded or not.
    """
    tensors = module_tensors(model)
    return {
        name: LoRAWeights(
            lora_a=tensors[f"{name}.lora_A.weight"],
            lora_b=tensors[f"{name}.lora_B.weight"],
            scaling=layer.scaling,
            magnitude=tensors.get(f"{name}.magnitude"),
        )
        for name, layer in adapters(model).items()
    }


@torch.no_grad()
def init_lora_(model: nn.Module, seed: int) -> None:
    """Initializes adapters: A uniform in +-1 / sqrt(in), B zero, so that training starts from the base model.

    A DoRA magnitude is initialized to the norms of the base's rows: load the base first. Every A is drawn in full on
    the CPU from a generator keyed by (seed, name), and a rank keeps its slice: same values on every mesh and device.
    """
    for name, layer in adapters(model).items():
        weight = layer.lora_A.weight
        bound = 1 / sqrt(layer.in_features)
        generator = torch.Generator().manual_seed(seed_of(f"{seed}/{name}.lora_A"))
        # On the CPU: CUDA generators give other numbers, and rank-local draws would depend on the mesh.
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
            "lora.dora = true: expected every rank to hold whole rows of a weight, found one sharded by columns; "
            "set parallelism.tp = 1."
        )
    # Weight and magnitude are sharded by rows alike, so each rank computes the norms of its own rows.
    if isinstance(base, QuantizedLinear):
        weight = dequantize(local(base.qdata), local(base.scale), base.form, torch.float32)
    else:
        weight = local(base.weight).float()
    assert layer.magnitude is not None
    local(layer.magnitude).copy_(torch.linalg.vector_norm(weight, dim=1))


def _freeze(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # A new parameter, because the dtype of an existing one cannot change on the meta device.
            setattr(module, name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def _quantize(model: nn.Module, form: BaseDtype) -> None:
    for name, module in list(model.named_modules()):
        in_block = name.startswith("transformer_blocks.")
        if in_block and isinstance(module, nn.Linear) and name.endswith(tuple("." + e for e in _QUANTIZED_ENDINGS)):
            model.set_submodule(name, QuantizedLinear.from_linear(module, form))


def _fill(parameter: Tensor, full: Tensor) -> None:
    """Copies a tensor that every rank has in full into a parameter that may be sharded."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    # src_data_rank=None slices locally: every rank has the full tensor, so nothing is communicated.
    full = full.to(parameter.to_local().device)
    mesh, placements = parameter.device_mesh, parameter.placements
    parameter.to_local().copy_(distribute_tensor(full, mesh, placements, src_data_rank=None).to_local())
