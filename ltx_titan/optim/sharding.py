"""Helpers for update rules that work on the local shards of DTensor parameters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Shard

from ltx_titan.common.tensors import local

BLOCK = 128
"""Columns that share a scale in moments of 8 or 4 bits."""
CHUNK = 1 << 26
"""Weights of a rank that are updated together: 256 MiB in float32 for each temporary tensor."""
# As in torchao and bitsandbytes: below this, quantization saves nothing worth its error.
_SMALLEST = 4096


def has_blocks(shape: Sequence[int]) -> bool:
    """Whether a parameter of this global shape has quantized moments: large matrices whose rows are whole blocks."""
    return len(shape) >= 2 and shape[-1] % BLOCK == 0 and prod(shape) >= _SMALLEST


def cuts_blocks(shape: Sequence[int], shard: Sequence[int]) -> bool:
    """Whether a shard of a parameter holds a part of a block, whose scale is a maximum over all of its elements."""
    return has_blocks(shape) and shard[-1] % BLOCK != 0


def like(
    parameter: Tensor,
    shard: Tensor,
    shape: Sequence[int],
    placement: Callable[[Placement], Placement] = lambda placement: placement,
) -> Tensor:
    """Wraps `shard` as this rank's shard of a tensor of global `shape` that is sharded like `parameter`.

    Args:
        parameter: a DTensor; for a plain tensor `shard` is returned as is.
        shard: local data, whose storage is shared.
        shape: global shape of the result; FSDP2 shards can be uneven, so it cannot be inferred from `shard`.
        placement: maps each of the parameter's placements to the result's.
    """
    if not isinstance(parameter, DTensor):
        return shard
    # Contiguous strides of the global tensor, from the last dim to the first.
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.insert(0, step)
        step *= size
    placements = [placement(p) for p in parameter.placements]
    mesh = parameter.device_mesh
    return DTensor.from_local(shard, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride))


def sum_shards(value: Tensor, parameter: Tensor, dims: Sequence[int]) -> Tensor:
    """Sums `value`, in place, over the ranks that hold different shards of `parameter` along `dims`.

    Args:
        value: a statistic of this rank's shard, of equal shape on those ranks.
        parameter: plain or sharded; a plain tensor is whole, and nothing is summed.
        dims: dims of the parameter that the statistic reduces, from 0.
    """
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            # Only along axes that split the dim: replicas hold equal values, which a sum would multiply.
            is_split = isinstance(placement, Shard) and placement.dim % parameter.ndim in dims
            if is_split and parameter.device_mesh.size(axis) > 1:
                dist.all_reduce(value, group=parameter.device_mesh.get_group(axis))
    return value


def sum_over_shards(sums: dict[Tensor, Tensor]) -> Tensor:
    """Adds up sums over the local shards of several parameters, each element counted once; a collective call.

    Args:
        sums: tensors of one shape by parameter, in the same order on all ranks.

    Returns:
        The total in float64, the same on every rank.
    """
    by_sharding: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for parameter, value in sums.items():
        mesh: DeviceMesh | None = None
        axes: tuple[int, ...] = ()
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            # Replicas hold equal values, which a sum over them would multiply.
            sharded = [axis for axis, placement in enumerate(parameter.placements) if not placement.is_replicate()]
            axes = tuple(axis for axis in sharded if mesh.size(axis) > 1)
        by_sharding[mesh, axes].append(value)
    totals = []
    for (mesh, axes), values in by_sharding.items():
        total = torch.stack(values).double().sum(0)
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(axis))
        totals.append(total)
    return torch.stack(totals).sum(0)


def chunks(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Splits parameters into lists of at most `CHUNK` local elements, or of one parameter.

    Operations over a list are few launches, but their temporary tensors are as large as the list.
    """
    chunk: list[Tensor] = []
    size = 0
    for parameter in parameters:
        elements = local(parameter).numel()
        if chunk and size + elements > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append(parameter)
        size += elements
    if chunk:
        yield chunk


def reshard(model: nn.Module) -> None:
    """Frees the gathered weights of FSDP2 units, after the sharded ones were replaced.

    A gathered unit computes with its copy of the old weights until it gathers again; the last block and the root stay
    gathered after a forward pass.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
