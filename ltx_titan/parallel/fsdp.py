"""Fully sharded data parallelism (FSDP2), always applied, also on one rank.

Every parameter is then a DTensor, and one rule decides precision: parameters are stored in the dtype they were built in
(float32 for full fine-tuning), gathered in the compute dtype, and their gradients are reduced in float32. One rank has
nothing to add: gradients of weights that are stored in the compute dtype stay in it.

Where one rank holds a whole replica, frozen weights that are stored in the compute dtype stay plain parameters: FSDP2
would copy each of them twice a step. Streamed weights (stream.py) stay plain parameters on any number of ranks, each of
which has its own.

Gradients are summed, not averaged: a rank's loss is already its share of the global mean.
"""

import logging
from collections.abc import Set
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from ltx_titan.parallel import peer_memory

logger = logging.getLogger(__name__)

Choice = Literal["auto", "on", "off"]


def apply_fsdp(
    model: nn.Module,
    blocks: nn.ModuleList,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    *,
    cpu_offload: bool = False,
    streamed: Set[nn.Parameter] = frozenset(),
) -> None:
    """Shards each block as one unit and everything outside the blocks as another.

    Args:
        model: the module whose parameters are sharded, in place.
        blocks: its repeated blocks.
        mesh: 1-D, or 2-D to replicate over the first axis.
        compute_dtype: dtype of gathered parameters, hence of matmuls.
        cpu_offload: keep shards, their gradients and the optimizer's state in host memory; the parameters then need
            storage there (`to_empty(device="cpu")`).
        streamed: frozen parameters that are not sharded.
    """
    stored = {p.dtype for p in model.parameters() if p.requires_grad}
    reduce_dtype = compute_dtype if mesh.size() == 1 and stored == {compute_dtype} else torch.float32
    # The model casts its inputs itself: FSDP2 would also round float32 positions and sigmas.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if cpu_offload and mesh.device_type == "cuda" else OffloadPolicy()
    ignored = set(streamed)
    if mesh.size(mesh.ndim - 1) == 1 and not cpu_offload:
        ignored |= {p for p in model.parameters() if not p.requires_grad and p.dtype == compute_dtype}
    last = len(blocks) - 1
    for number, block in enumerate(blocks):
        # The backward pass starts with the last block, which would be gathered again at once.
        fully_shard(
            block,
            mesh=mesh,
            reshard_after_forward=number < last,
            mp_policy=policy,
            offload_policy=offload,
            ignored_params=ignored,
        )
    # The root's weights are needed at both ends of each pass (embeddings, output heads), so they stay gathered in
    # between.
    fully_shard(
        model,
        mesh=mesh,
        reshard_after_forward=False,
        mp_policy=policy,
        offload_policy=offload,
        ignored_params=ignored,
    )
    for module in model.modules():
        if isinstance(module, FSDPModule):
            if mesh.size() == 1:
                continue  # FSDP2 would divide every gradient by the factor, 1, in a pass of its own
            module.set_gradient_divide_factor(1.0)
            # A divide factor makes FSDP2 reduce with PREMUL_SUM, which gloo does not support.
            module.set_force_sum_reduction_for_comms(True)


def use_static_slots(
    model: nn.Module,
    blocks: nn.ModuleList,
    wanted: Choice,
    *,
    copy_engines: Choice = "off",
    exchange_gradients: Choice = "off",
) -> bool:
    """Makes sharded blocks gather into static slots (static_slots.py). Apply before the first forward pass.

    Args:
        model: as given to `apply_fsdp`.
        blocks: its repeated blocks.
        wanted: `parallelism.fsdp_static_slots`.
        copy_engines: `parallelism.fsdp_copy_engines`.
        exchange_gradients: `parallelism.fsdp_exchange_gradients`.

    Returns:
        Whether slots are used; the log has the reason if "auto" does without them.

    Raises:
        ValueError: "on", and the blocks cannot have it.
    """
    reason: str | None = "parallelism.fsdp_static_slots is 'off'"
    if wanted != "off":
        try:
            # Not at the top: it imports private modules of torch, which another version may lack.
            from ltx_titan.parallel.static_slots import add_static_slots, obstacle, sharding

            reason = obstacle(blocks)
        except ImportError as error:
            reason = f"FSDP2 of torch {torch.__version__} differs ({error})"
    if reason is not None:
        _refuse("fsdp_static_slots", wanted, reason)
        _refuse("fsdp_copy_engines", copy_engines, reason)
        _refuse("fsdp_exchange_gradients", exchange_gradients, reason)
        if wanted != "off":
            logger.info("FSDP2: no static slots, because %s", reason)
        return False
    group, device = sharding(blocks)
    if copy_engines != "off":
        reason = peer_memory.obstacle(group, device, on_cpu=copy_engines == "on")
        _refuse("fsdp_copy_engines", copy_engines, reason)
    _refuse("fsdp_exchange_gradients", exchange_gradients, "one rank has all gradients" if group.size() == 1 else None)
    has_peers = copy_engines != "off" and reason is None
    exchanges = exchange_gradients == "on" or (exchange_gradients == "auto" and has_peers)
    count = add_static_slots(model, blocks, copy_engines=has_peers, exchange_gradients=exchanges)
    logger.info("FSDP2: %d blocks take turns in %d static slots", len(blocks), count)
    if has_peers:
        logger.info("FSDP2: copy engines gather the weights")
    elif copy_engines != "off" and group.size() > 1 and device.type == "cuda":
        logger.info("FSDP2: NCCL gathers the weights, because %s", reason)
    if exchanges:
        logger.info("FSDP2: gradients are exchanged in the compute dtype and added in float32")
    return True


def _refuse(key: str, wanted: Choice, reason: str | None) -> None:
    if wanted == "on" and reason is not None:
        raise ValueError(f"parallelism.{key} = 'on': {reason}; set parallelism.{key} to 'auto' or 'off'.")
