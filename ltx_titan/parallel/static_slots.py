"""Static slots: FSDP2 gathers blocks straight into the memory of their weights, without copies on the compute stream.

FSDP2 casts and gathers a block into a staging buffer, and the compute stream then copies every weight out of it: four
bytes per weight read and written twice a step. Here two slots, each as large as one block, take turns:

    gather stream    gather 0 | gather 1 | gather 2 | ...    block n into slot n mod 2, once block n - 2 no longer
    compute stream            | block 0  | block 1  | ...    reads it

A shard is a range of rows, so a weight's shards in the order of ranks are the weight: each rank casts its own shard
into place, and one group of all-gathers fills in the others, or copies from the memory of the other GPUs
(peer_memory.py). Weights below 1 MiB share one all-gather and are copied out of it, on the gather stream as well.
Values and gradients are those of FSDP2, bit by bit.

In the backward pass, the gradients are copied to the input of their reduce-scatter on that collective's stream, beside
the compute of the next block, which keeps them in memory until then. gradient_exchange.py may replace the collective.

This is the module that relies on private parts of FSDP2 (torch 2.11 to 2.14; `RELIED_ON` lists them). Where they are
missing, or a model's weights do not fit, plain FSDP2 runs, and the log says why.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import AllGatherResult
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.profiler import record_function

from ltx_titan.parallel.gradient_exchange import GradientExchange, InPlaceSum
from ltx_titan.parallel.peer_memory import PeerTensor, allocate

# One computes, the other is being gathered.
_SLOTS = 2
DIRECT_BYTES = 1 << 20
"""Gathered bytes from which a weight has an all-gather of its own: below, its latency exceeds the copy's."""
RELIED_ON = {
    "group": (
        *("unshard", "wait_for_unshard", "_to_sharded", "_to_unsharded", "is_unsharded", "reshard", "post_backward"),
        *("finalize_backward", "_wait_all_gather_streams_on_event", "_all_gather_process_group", "_with_fqn"),
        *("_use_post_forward_mesh", "_all_gather_output", "_all_gather_result", "_training_state", "comm_ctx"),
        *("device", "device_handle", "fsdp_params", "mesh_info", "reduce_grads", "reshard_after_backward"),
        *("unshard_in_backward", "_reduce_scatter_comm", "_reduce_scatter_process_group", "mp_policy"),
    ),
    "parameter": (
        *("_sharded_param_data", "sharded_param", "padded_sharded_param_size", "fsdp_placement", "offload_to_cpu"),
        *("all_gather_outputs", "init_unsharded_param", "unsharded_accumulated_grad", "_sharded_local_tensor"),
    ),
}
"""Attributes of FSDP2's objects that this module reads, writes or overrides."""


def add_static_slots(
    model: nn.Module, blocks: nn.ModuleList, *, copy_engines: bool = False, exchange_gradients: bool = False
) -> int:
    """Makes blocks without an `obstacle` gather into slots; returns the number of slots.

    Args:
        model: the root of the sharded model, before its first forward pass.
        blocks: its repeated blocks.
        copy_engines: copy shards from the other ranks' memory (peer_memory.py) instead of NCCL's all-gathers.
        exchange_gradients: reduce them by gradient_exchange.py, with copy engines if weights are gathered by them.
    """
    slots = [_Slot(copy_engines) for _ in range(min(_SLOTS, len(blocks)))]
    exchange = _reduction(blocks, copy_engines, exchange_gradients)
    reducing = _Reducing(exchange)
    for number, block in enumerate(blocks):
        group = _param_group(block)
        assert group is not None
        group.__class__ = _SlottedParamGroup
        assert isinstance(group, _SlottedParamGroup)
        group.slot = slots[number % len(slots)]
        group.reducing = reducing

    def forget_events(*_: Any) -> None:
        # FSDP2 has just ordered its streams after the compute stream, so there is nothing left to wait for. And while a
        # CUDA graph is recorded, events from before must not be waited for.
        for slot in slots:
            slot.free = None

    # FSDP2 prepends its own hook, which therefore runs first.
    model.register_forward_pre_hook(forget_events)
    return len(slots)


def obstacle(blocks: nn.ModuleList) -> str | None:
    """Why sharded blocks cannot have slots; None if they can."""
    expected = None
    for block in blocks:
        group = _param_group(block)
        if group is None:
            return "there are blocks without sharded weights"
        missing = [f"FSDPParamGroup.{name}" for name in RELIED_ON["group"] if not hasattr(group, name)]
        for p in () if missing else group.fsdp_params:
            missing += [f"FSDPParam.{name}" for name in RELIED_ON["parameter"] if not hasattr(p, name)]
        if missing:
            return f"FSDP2 of torch {torch.__version__} has no {missing[0]}"
        if not isinstance(group.mesh_info, FSDPMeshInfo) or group._use_post_forward_mesh:
            return "weights are not gathered from all ranks that they are sharded over"
        for p in group.fsdp_params:
            if p.offload_to_cpu:
                return "parallelism.cpu_offload keeps the shards in host memory"
            if hasattr(p._sharded_local_tensor, "fsdp_pre_all_gather"):
                return "float8.all_gather gathers float8 values and scales"
            if p.fsdp_placement.dim != 0:
                return "weights are not sharded by rows"
        shapes = [(p.padded_sharded_param_size, p.sharded_param.dtype) for p in group.fsdp_params]
        if expected is not None and shapes != expected:
            return "blocks have weights of different shapes"
        expected = shapes
    return None


def sharding(blocks: nn.ModuleList) -> tuple[dist.ProcessGroup, torch.device]:
    """The ranks over which the weights of blocks without an `obstacle` are sharded, and this rank's device."""
    group = _param_group(blocks[0])
    assert group is not None
    return group._all_gather_process_group, group.device


def _reduction(
    blocks: nn.ModuleList, copy_engines: bool, exchange_gradients: bool
) -> GradientExchange | InPlaceSum | None:
    """The reduction of blocks' gradients; None for FSDP2's own."""
    ranks, has_replicas, most, dtypes = 1, False, 0, set()
    for block in blocks:
        group = _param_group(block)
        assert group is not None
        ranks = group._reduce_scatter_process_group.size()
        has_replicas = group.mesh_info.mesh.ndim > 1
        # Blocks may differ in what is frozen.
        trained = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
        most = max(most, sum(p.padded_sharded_param_size.numel() for p in trained))
        dtypes |= {group.mp_policy.param_dtype or p.sharded_param.dtype for p in trained}
    if ranks == 1 and not has_replicas:
        return InPlaceSum()
    if ranks == 1 or len(dtypes) != 1 or not exchange_gradients:
        return None
    return GradientExchange(ranks * most, dtypes.pop(), by_copy_engines=copy_engines)


def _param_group(block: nn.Module) -> FSDPParamGroup | None:
    assert isinstance(block, FSDPModule)
    return getattr(block._get_fsdp_state(), "_fsdp_param_group", None)


class _Slot:
    """Memory for the gathered weights of one block at a time.

    Attributes:
        buffers: of each weight, 1-D, padded to equal shards; empty until the first gather.
        owner: the group whose weights were gathered last.
        free: event after which the owner no longer reads its weights; None if that is ordered otherwise.
    """

    def __init__(self, copy_engines: bool) -> None:
        self._copy_engines = copy_engines
        self.buffers: list[Tensor] = []
        self.owner: _SlottedParamGroup | None = None
        self.free: torch.Event | None = None
        # Memory for each weight's own shard, and whether it has an all-gather of its own.
        self._own: list[Tensor] = []
        self._is_direct: list[bool] = []
        # The others' all-gather, [ranks, elements], and where it is copied to.
        self._staging: Tensor | None = None
        self._staged: list[Tensor] = []
        # What is filled in from the other ranks' memory, if that is how weights are gathered.
        self._shared: list[PeerTensor] = []

    def is_busy(self, group: "_SlottedParamGroup") -> bool:
        """Whether another group than `group` is computing with its weights."""
        if self.owner is None or self.owner is group or not self.owner.is_unsharded:
            return False
        return self.owner._training_state in (TrainingState.FORWARD, TrainingState.PRE_BACKWARD)

    def take(self, group: "_SlottedParamGroup") -> None:
        """Gives the slot to `group`; weights of the present owner are sharded again."""
        if self.owner is not None and self.owner is not group:
            # The last block stays gathered after a forward pass, for a backward pass that has not come.
            self.owner._to_sharded()
            self.owner._all_gather_result = None
        self.owner = group

    def gather(self, params: list[FSDPParam], group: dist.ProcessGroup) -> None:
        """Fills the slot on the current stream."""
        if not self.buffers:
            self._allocate(params, group)
        if self._shared:
            # The other ranks have read what they needed of the block before.
            self._shared[0].barrier()
        inputs: list[Tensor] = []
        # By dtype, because a foreach operation over mixed ones launches one kernel a tensor.
        copies: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for p, own, is_direct in zip(params, self._own, self._is_direct, strict=True):
            shard = p._sharded_param_data
            if is_direct and group.size() > 1 and shard.dtype == own.dtype and not self._shared:
                inputs.append(shard)
            else:
                copies[shard.dtype].append((own, shard))
                if is_direct:
                    inputs.append(own)
        # Backward passes check that saved weights have not been written since; regathered ones are the same.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.buffers)):
            for pairs in copies.values():
                torch._foreach_copy_([own for own, _ in pairs], [shard for _, shard in pairs])
            if self._shared:
                _copy_from_peers(self._shared)
            elif group.size() > 1:
                outputs = [buffer for buffer, is_direct in zip(self.buffers, self._is_direct, strict=True) if is_direct]
                if self._staging is not None:
                    outputs.append(self._staging.view(-1))
                    inputs.append(self._staging[group.rank()])
                _all_gather_together(outputs, inputs, group)
            if self._staging is not None:
                sizes = [out.shape[1] for out in self._staged]
                torch.split_with_sizes_copy(self._staging, sizes, dim=1, out=self._staged)

    def _allocate(self, params: list[FSDPParam], group: dist.ProcessGroup) -> None:
        ranks, rank = group.size(), group.rank()
        dtypes = [p.param_dtype or p.orig_dtype for p in params]
        sizes = [p._sharded_param_data.numel() for p in params]
        device = params[0].device

        def empty(numel: int, dtype: torch.dtype, *, is_gathered: bool) -> Tensor:
            if not (self._copy_engines and is_gathered):
                return torch.empty(numel, dtype=dtype, device=device)
            self._shared.append(allocate(numel, dtype, group, device))
            return self._shared[-1].own

        small = [i for i in range(len(params)) if ranks > 1 and ranks * sizes[i] * dtypes[i].itemsize < DIRECT_BYTES]
        # Of one dtype; the others, if there are any, are gathered directly.
        small = [i for i in small if dtypes[i] == dtypes[small[0]]]
        self._is_direct = [i not in small for i in range(len(params))]
        # Never freed, so that CUDA graphs and autograd may keep the addresses.
        self.buffers = [
            empty(ranks * size, dtype, is_gathered=is_direct)
            for size, dtype, is_direct in zip(sizes, dtypes, self._is_direct, strict=True)
        ]
        self._own = [buffer.view(ranks, -1)[rank] for buffer in self.buffers]
        if small:
            total = sum(sizes[i] for i in small)
            self._staging = empty(ranks * total, dtypes[small[0]], is_gathered=True).view(ranks, total)
            for i, own in zip(small, self._staging[rank].split([sizes[i] for i in small]), strict=True):
                self._own[i] = own
            self._staged = [self.buffers[i].view(ranks, -1) for i in small]


def _copy_from_peers(shared: list[PeerTensor]) -> None:
    """Fills in the other ranks' parts of tensors whose own part is ready on the current stream."""
    first = shared[0]
    first.barrier()
    ranks = len(first.by_rank)
    for peer in first.peers:
        for tensor in shared:
            tensor.own.view(ranks, -1)[peer].copy_(tensor.by_rank[peer].view(ranks, -1)[peer])


def _all_gather_together(outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> None:
    """All-gathers in the order of the current stream, as one group of NCCL."""
    if outputs[0].is_cuda:
        # On NCCL's own stream, which waits for the current one, as torch's coalesced collectives always run.
        group.allgather_into_tensor_coalesced(outputs, inputs).wait()
        return
    # Gloo has no groups, and fake tensors (estimate --dry-run) no such operation. torch 2.14 deprecates the older name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for output, shard in zip(outputs, inputs, strict=True):
        gather(output, shard, group=group)


@dataclass
class _Reducing:
    """The last block that was reduced, and its gradients, which the reduce-scatter's stream may still read.

    `exchange` is None to reduce by FSDP2's own reduce-scatter.
    """

    exchange: GradientExchange | InPlaceSum | None = None
    group: "_SlottedParamGroup | None" = None
    gradients: list[Tensor] = field(default_factory=list)


class _SlottedParamGroup(FSDPParamGroup):
    """A block's weights in a slot. Instances are made by changing the class of FSDP2's own.

    Attributes:
        slot: shared with every second block.
        reducing: shared by all blocks.
    """

    slot: _Slot
    reducing: _Reducing

    def unshard(self, async_op: bool = False) -> None:
        """Starts to gather the weights; without effect if they are gathered or being gathered."""
        if self._all_gather_result is not None or self.is_unsharded:
            return
        if not self.unshard_in_backward and self._training_state == TrainingState.PRE_BACKWARD:
            return
        if self.slot.is_busy(self):
            # A prefetch: with two forward passes before their backward passes, FSDP2 prefetches the last block of one
            # while the first block of the other computes. It is gathered when it is its turn.
            return
        self.slot.take(self)
        if self.reducing.exchange is not None:
            self.reducing.exchange.share(self._reduce_scatter_process_group, self.device)
        stream = self.comm_ctx.get_all_gather_streams(async_op, self._training_state)[1]
        if self.slot.free is not None:
            stream.wait_event(self.slot.free)
        with record_function(self._with_fqn("FSDP::all_gather")), self.device_handle.stream(stream):
            self.slot.gather(self.fsdp_params, self._all_gather_process_group)
            event = stream.record_event()
        self._all_gather_result = AllGatherResult(self._all_gather_output, event, None, [], [], [])

    def wait_for_unshard(self) -> None:
        """Orders the current stream after the gather, and gives the weights to the block.

        Raises:
            RuntimeError: another block computes with the weights in the slot.
        """
        if self._all_gather_result is None:
            if self.slot.is_busy(self):
                raise RuntimeError(
                    f"{self._with_fqn('FSDP2')} needs the static slot of a block whose pass has not ended; set "
                    "parallelism.fsdp_static_slots to 'off'."
                )
            return
        if self._training_state == TrainingState.FORWARD and (root := self.comm_ctx.all_gather_state) is not None:
            # The staging buffer of the root's weights, which FSDP2 frees once the next group has been gathered.
            self._wait_all_gather_streams_on_event(root.event)
            self.comm_ctx.all_gather_state = None
        if (event := self._all_gather_result.all_gather_event) is not None:
            self.device_handle.current_stream().wait_event(event)
        for p, buffer in zip(self.fsdp_params, self.slot.buffers, strict=True):
            if not hasattr(p, "_unsharded_param"):
                p.all_gather_outputs = [buffer]
                p.init_unsharded_param()
                # FSDP2 frees the storage of all outputs that it knows when it shards the weights again.
                p.all_gather_outputs = []
        self._to_unsharded()
        self._all_gather_result = None

    def _to_sharded(self) -> None:
        if self.is_unsharded:
            self.slot.free = self.device_handle.current_stream().record_event()
        super()._to_sharded()

    def post_backward(self, *unused: Any) -> None:
        """Shards the weights and reduces the gradients, all on the reduce-scatter's stream."""
        held = [p.unsharded_param.grad for p in self.fsdp_params if hasattr(p, "_unsharded_param")]
        gradients = [gradient for gradient in held if gradient is not None]
        accumulates = any(p.unsharded_accumulated_grad is not None for p in self.fsdp_params)
        if not gradients or accumulates or not self.reduce_grads:
            super().post_backward(*unused)
            return
        compute, reducing = self.device_handle.current_stream(), self.comm_ctx.reduce_scatter_stream
        self._training_state = TrainingState.POST_BACKWARD
        if self.reshard_after_backward:
            # Here, so that the slot is free after the compute and not after the reduce-scatters before this one.
            self.reshard()
        # As FSDP2 does; what the reductions read may be freed on this stream from here on.
        for state in self._pending_reductions():
            if state is not None and state.event is not None:
                compute.wait_event(state.event)
        self.reducing.group, self.reducing.gradients = self, gradients
        reducing.wait_stream(compute)
        with self.device_handle.stream(reducing):
            exchange = self.reducing.exchange
            if exchange is None or not exchange.takes(gradients):
                super().post_backward(*unused)
                return
            # For this reduction only: accumulated gradients, above, are reduced by FSDP2's own, on another stream.
            plain, self._reduce_scatter_comm = self._reduce_scatter_comm, exchange
            exchange.begin(compute)
            super().post_backward(*unused)
            self._reduce_scatter_comm = plain

    def finalize_backward(self) -> None:
        """Orders the current stream after the reductions."""
        super().finalize_backward()
        if self.reducing.group is self:
            self.reducing.group, self.reducing.gradients = None, []

    def _pending_reductions(self) -> list[Any]:
        # A list since torch 2.12.
        states = getattr(self.comm_ctx, "reduce_scatter_states", None)
        return [getattr(self.comm_ctx, "reduce_scatter_state", None)] if states is None else states
