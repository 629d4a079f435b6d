"""Seeded random weights for benchmarks, miniature packs and tests.

Each parameter is drawn in full from a separate generator, keyed by (seed, name), and every rank keeps its slice: the
same weights on every mesh, at the cost of one whole parameter at a time in memory.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ltx_titan.common.tensors import local, seed_of, without_wrappers

# Small first predictions: an untrained model then starts near the loss of predicting zero.
_OUTPUT_HEAD_SCALE = 0.1


@torch.no_grad()
def init_random_(module: nn.Module, seed: int, device: torch.device | None = None) -> None:
    """Fills every parameter in place. Parameters may be DTensors; buffers are not changed.

    Norm weights become 1, biases 0, registers N(0, 1); everything else is N(0, 1 / fan_in), the output heads a tenth of
    that.

    Args:
        module: with storage.
        seed: of all generators.
        device: that numbers are drawn on, whose generators give other numbers than a CPU's; None: each parameter's.
    """
    for name, parameter in module.named_parameters():
        shard = local(parameter)
        full = draw_parameter(name, parameter.shape, seed, device or shard.device)
        if isinstance(parameter, DTensor):
            # Every rank drew the same tensor, so there is nothing to broadcast.
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
        # `copy_` casts: drawn in float32 for any dtype of the parameter, so a bfloat16 model is the rounded float32
        # one.
        shard.copy_(full)


def draw_parameter(name: str, shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """The initial values of a parameter in float32.

    Args:
        name: in the model. Wrappers in it do not count: compiled and checkpointed modules get the weights of the plain
            one.
        shape: its full shape.
        seed: of all generators.
        device: that numbers are drawn on.
    """
    generator = torch.Generator(device).manual_seed(seed_of(f"{seed}/{without_wrappers(name)}"))
    mean, std = initial_spread(name, shape)
    if std == 0:
        return torch.full(shape, mean, device=device)
    return torch.randn(shape, generator=generator, device=device) * std


def initial_spread(name: str, shape: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter's initial values.

    Args:
        name: of the parameter.
        shape: its full shape.
    """
    if name.endswith("_norm.weight"):
        return 1.0, 0.0
    if name.endswith(".bias"):
        return 0.0, 0.0
    std = 1.0 if name.endswith("learnable_registers") else 1 / sqrt(shape[-1])
    return 0.0, std * _OUTPUT_HEAD_SCALE if "proj_out." in name else std
