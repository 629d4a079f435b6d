"""Reduce-scatter of gradients that travel in the dtype in which they were computed and are added in float32.

FSDP2 casts gradients to float32 and reduces them with NCCL: four bytes a gradient over the links, and float32 kernels
beside the backward pass. Here every rank receives the others' bfloat16 gradients of its own shard, half the bytes, and
adds them in float32. Nothing is rounded that a float32 reduction would not round: only the order of the sum can differ,
and of two ranks not even that.

Ranks exchange gradients with an all-to-all, or copy them from each other's memory (peer_memory.py). Each gradient
crosses once to the rank that adds it, so between hosts a ring would send less.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from ltx_titan.common.tensors import runs_triton
from ltx_titan.parallel.peer_memory import PeerTensor, allocate


class GradientExchange(ReduceScatter):
    """FSDP2's interface of a reduce-scatter, for one block at a time.

    Args:
        numel: most gradients of a block, padded to equal shards.
        dtype: of the gradients.
        by_copy_engines: copy from the peers' memory instead of an all-to-all.
    """

    def __init__(self, numel: int, dtype: torch.dtype, *, by_copy_engines: bool) -> None:
        self.dtype = dtype
        self._numel = numel
        self._by_copy_engines = by_copy_engines
        self._memory: PeerTensor | None = None
        self._has_input = False
        self._compute: torch.Stream | None = None

    def share(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """Allocates the memory that peers read; called before the first pass, whose activations may fill the rest."""
        if self._by_copy_engines and self._memory is None:
            self._memory = allocate(self._numel, self.dtype, group, device)

    def takes(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients are of the dtype that is exchanged; accumulated ones are float32, and would be rounded."""
        return all(gradient.dtype == self.dtype for gradient in gradients)

    def begin(self, compute: torch.Stream) -> None:
        """Prepares the reduction of a block on the current stream, which waits for `compute` already.

        Sums are allocated on `compute`: the allocator keeps the memory of streams apart, and there the backward pass
        frees its activations. They are used on it after FSDP2 has ordered it after the reductions.
        """
        self._has_input = False
        self._compute = compute
        if self._memory is not None:
            # The peers have read the block before.
            self._memory.barrier()

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for the input first, then for the output; both as `dtype`, in which it would reduce."""
        if self._has_input:
            with torch.get_device_module(device).stream(self._compute):
                return torch.empty(*size, dtype=dtype, device=device)
        self._has_input = True
        if self._memory is None:
            return torch.empty(*size, dtype=self.dtype, device=device)
        (numel,) = size
        return self._memory.own[: int(numel)]

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Adds all ranks' parts for this rank.

        Args:
            output_tensor: the sum of this rank's shards [elements], float32.
            input_tensor: this rank's gradients for each rank, [ranks x elements].
            group: the ranks.
            op: a sum.
            async_op: not supported.
        """
        assert self._memory is not None or not self._by_copy_engines, "`share` comes first"
        assert op == dist.ReduceOp.SUM and not async_op, (op, async_op)
        ranks, rank = group.size(), group.rank()
        gradients = input_tensor.view(ranks, -1)
        # A kernel adds this rank's part where it is; torch.sum needs it beside the others.
        adds_in_place = self._memory is not None and runs_triton(input_tensor.device)
        count = ranks - 1 if adds_in_place else ranks
        parts = torch.empty(count, output_tensor.numel(), dtype=input_tensor.dtype, device=input_tensor.device)
        if self._memory is None:
            dist.all_to_all_single(parts, gradients, group=group)
        else:
            self._memory.barrier()
            for peer in self._memory.peers:
                theirs = self._memory.by_rank[peer][: input_tensor.numel()]
                parts[peer - (adds_in_place and peer > rank)].copy_(theirs.view(ranks, -1)[rank])
        if adds_in_place:
            # Imported here: Triton is not everywhere.
            from ltx_titan_kernels.sum_parts import sum_parts

            sum_parts(gradients[rank], parts, rank, output_tensor)
            return
        if self._memory is not None:
            parts[rank].copy_(gradients[rank])
        torch.sum(parts, 0, dtype=output_tensor.dtype, out=output_tensor)


class InPlaceSum(ReduceScatter):
    """FSDP2's interface of a reduce-scatter over one rank, where the input is the sum.

    FSDP2 would copy the gradients from the input's memory to the output's: 8 bytes a float32 gradient. For slots only
    (static_slots.py), which allocate the input on the stream that reduces: FSDP2 frees it while that stream may still
    read the output.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def share(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """One rank shares nothing."""

    def takes(self, gradients: Sequence[Tensor]) -> bool:
        """Gradients of any dtype."""
        return True

    def begin(self, compute: torch.Stream) -> None:
        """Prepares the reduction of a block."""
        self._input = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for the input first, then for the output."""
        if self._input is None:
            self._input = torch.empty(*size, dtype=dtype, device=device)
            return self._input
        output, self._input = self._input, None
        return output

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        """Not called: FSDP2 reduces nothing over one rank."""
        raise AssertionError("one rank has nothing to reduce")
