"""Adds LoRA files to the weights of a model in place: for good, or for a while.

Works on plain and sharded weights alike: each rank adds the part of B A that its shard covers, without communication.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltx_titan.weights.lora_files import LoRAWeights, check_layers, merged_weight
from ltx_titan.weights.lora_formats import read_lora_layers
from ltx_titan.weights.names import official_name
from ltx_titan.weights.tensors import local_box, module_tensors


def fuse_lora(
    model: nn.Module, path: str | Path, strength: float = 1.0, *, before: Callable[[Tensor], None] = lambda shard: None
) -> int:
    """Adds a LoRA file to weights in place, for sampling: W <- W + strength B A.

    Args:
        model: the transformer, sharded or not; of an adapted one the frozen base is changed.
        path: a LoRA file in any form that `lora_formats.py` reads.
        strength: factor on its change.
        before: called with this rank's shard of each weight before it is changed.

    Returns:
        Number of layers that were changed.

    Raises:
        ValueError: the file cannot be read, or one of its layers has no counterpart of its shape in the model; nothing
            is changed then.
    """
    weights = _linear_weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    layers = read_lora_layers(path, shapes)
    check_layers(path, layers, shapes, complete=False)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, layer in layers.items():
            shard, (rows, columns) = local_box(weights[name])
            if shard.numel() == 0:
                continue
            before(shard)
            lora_a = file.get_tensor(layer.down_key)[:, columns].to(shard.device)
            lora_b = file.get_tensor(layer.up_key)[rows].to(shard.device)
            # One rounding to the dtype of the weight, in `copy_`.
            shard.copy_(merged_weight(shard, LoRAWeights(lora_a, lora_b, strength * layer.scale)))
    return len(layers)


@contextmanager
def fused_loras(model: nn.Module, loras: Sequence[tuple[str | Path, float]]) -> Iterator[None]:
    """Context in which LoRA files are added to a model's weights, each with its strength.

    The changed shards are copied to the host and restored from there: subtracting would round a second time.

    Raises:
        ValueError: as `fuse_lora`; the weights are as before.
    """
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(shard: Tensor) -> None:
        # Two LoRAs may change one weight; its first copy is the original.
        kept.setdefault(shard.data_ptr(), (shard, shard.to("cpu", copy=True)))

    try:
        for path, strength in loras:
            fuse_lora(model, path, strength, before=keep)
        yield
    finally:
        with torch.no_grad():
            for shard, original in kept.values():
                shard.copy_(original)


def check_fusion(model: nn.Module, path: str | Path) -> None:
    """Checks that `fuse_lora` can add a file to a model, which may be on the meta device.

    Raises:
        ValueError: as `fuse_lora`.
    """
    shapes = {name: tuple(weight.shape) for name, weight in _linear_weights(model).items()}
    check_layers(path, read_lora_layers(path, shapes), shapes, complete=False)


def _linear_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Weights by official layer name. Adapters are of linear layers, so biases, norms and tables are not candidates."""
    named = ((official_name(name), tensor) for name, tensor in module_tensors(model).items())
    found = {name: tensor for name, tensor in named if name is not None and tensor.ndim == 2}
    return {name.removesuffix(".weight"): tensor for name, tensor in found.items()}
