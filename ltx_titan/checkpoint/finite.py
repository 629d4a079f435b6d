"""Finds weights and optimizer states that are NaN or infinite, before they are saved or exported.

A step's loss is computed before its update, so it cannot show that the update itself overflowed; with updates in the
backward pass there is no gradient norm either. Reading all tensors once is the only check that holds for every
optimizer.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_titan.common.ranks import is_distributed
from ltx_titan.common.tensors import local


@torch.no_grad()
def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the name of the first tensor with a NaN or infinite value on any rank, on every rank; None without one.

    Memory: a scalar per tensor. Time: one read of this rank's shards, and one all-reduce of a number.

    Args:
        tensors: this rank's shards, or plain tensors; every rank calls it.
    """
    # The largest absolute value is not finite if any value is not: max propagates NaN. By dtype and device, because
    # that is the unit of the fused kernel. 8-bit floats are outputs of a quantizer, and have no such norm.
    groups: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        shard = local(tensor.detach())
        if shard.is_floating_point() and shard.itemsize > 1 and shard.numel() > 0:
            groups[shard.device, shard.dtype][name] = shard
    bad = set()
    for shards in groups.values():
        largest = torch.stack(torch._foreach_norm(list(shards.values()), float("inf")))
        bad |= {name for name, is_finite in zip(shards, largest.isfinite().tolist(), strict=True) if not is_finite}
    first = next((name for name in tensors if name in bad), None)
    if not is_distributed():
        return first
    vote = torch.tensor([len(bad)], dtype=torch.int64)
    dist.all_reduce(vote)
    if not vote.item():
        return None
    names: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(names, first)
    return next(name for name in names if name is not None)
