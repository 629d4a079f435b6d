"""Adds a LoRA file to a model's weights, for sampling: W <- W + strength B A.

The sum is made in float32 and rounded once to the weight's dtype. Files hold no alpha; it is part of B.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

_PREFIX = "diffusion_model."
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_LISTED = 5


@torch.no_grad()
def fuse_lora(model: nn.Module, path: str | Path, strength: float = 1.0) -> int:
    """Fuses a LoRA into plain weights, in place.

    Args:
        model: the transformer, not sharded.
        path: file with `diffusion_model.<layer>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].
        strength: factor on its change.

    Returns:
        How many layers it changed.

    Raises:
        ValueError: the file cannot be read, or a tensor in it has no partner or no layer of its shape in the model;
            nothing is changed then.
    """
    weights = dict(model.named_parameters())
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            layers = sorted(name.removesuffix(_DOWN) for name in names if name.endswith(_DOWN))
            expected = {layer + end for layer in layers for end in (_DOWN, _UP)}
            strange = sorted(names ^ expected)
            missing = [layer for layer in layers if _weight_name(layer) not in weights]
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names & expected}
            wrong = [] if strange or missing else [layer for layer in layers if not _fits(layer, shapes, weights)]
            for what, found in (
                ("without a partner, or no LoRA weight", strange),
                ("for no layer of this model", missing),
                ("of another shape than the model's layer", wrong),
            ):
                if found:
                    listed = ", ".join(found[:_LISTED]) + (
                        f" and {len(found) - _LISTED} more" if found[_LISTED:] else ""
                    )
                    raise ValueError(
                        f"{path}: {len(found)} tensors {what}: {listed}; is it a LoRA for this checkpoint?"
                    )
            if not layers:
                raise ValueError(f"{path}: holds no LoRA weights ({_PREFIX}<layer>{_DOWN}); give a LoRA file.")
            for layer in layers:
                weight = weights[_weight_name(layer)]
                down, up = (file.get_tensor(layer + end).to(weight.device).float() for end in (_DOWN, _UP))
                weight.copy_(weight.float() + strength * (up @ down))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}).") from error
    return len(layers)


def _weight_name(layer: str) -> str:
    return layer.removeprefix(_PREFIX) + ".weight"


def _fits(layer: str, shapes: dict[str, tuple[int, ...]], weights: dict[str, nn.Parameter]) -> bool:
    (rank, width), (height, other_rank) = shapes[layer + _DOWN], shapes[layer + _UP]
    return rank == other_rank and (height, width) == tuple(weights[_weight_name(layer)].shape)
