"""Offloads saved activations to host memory between the forward and the backward pass.

Copies run on a separate CUDA stream: a block's inputs are copied to the host while the block runs, and back while the
next block is in its backward pass. With whole blocks recomputed that is one tensor per stream and block (132 MB for 16k
video tokens in bfloat16), a few milliseconds of PCIe time next to a hundred of computation.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Copying smaller tensors costs more in launches than the memory is worth.
_MIN_BYTES = 1 << 20


@dataclass
class _Parked:
    """A tensor in (or being copied to) host memory; `returned` is its copy on the device once requested."""

    host: Tensor
    device: torch.device
    group: "_Group"
    returned: Tensor | None = None


@dataclass
class _Group:
    """Tensors that one block saved, and the group of the block before it, which the backward pass needs next."""

    before: "_Group | None"
    waiting: list[_Parked] = field(default_factory=list)


class ActivationOffload:
    """Host memory for the inputs of the recomputed blocks of one model."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._current: _Group | None = None
        self._last: _Group | None = None

    def saved_tensors(self) -> AbstractContextManager:
        """Context for one block in which tensors saved by autograd are offloaded.

        Tensors on the CPU and small ones stay where they are.
        """
        # The group is created by the block's first large tensor, so a block without one leaves no gap in the chain.
        self._current = None
        return torch.autograd.graph.saved_tensors_hooks(self._park, self._fetch)

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_cuda or tensor.nbytes < _MIN_BYTES:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._current is None:
            self._current = self._last = _Group(before=self._last)
        # The kernels that write the tensor may still be in the queue.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        # The caching allocator must not reuse this memory before the copy has read it.
        tensor.record_stream(self._stream)
        parked = _Parked(host, tensor.device, self._current)
        self._current.waiting.append(parked)
        return parked

    def _fetch(self, saved: Tensor | _Parked) -> Tensor:
        if not isinstance(saved, _Parked):
            return saved
        group = saved.group
        self._start_return(group)
        current = torch.cuda.current_stream()
        assert self._stream is not None, "a parked tensor was copied on the stream"
        current.wait_stream(self._stream)
        tensor, saved.returned = saved.returned, None
        assert tensor is not None, "started by _start_return"
        # Allocated on the copy stream: once freed, its memory must not return there while this stream reads it.
        tensor.record_stream(current)
        if group.before is not None:
            # Prefetch, enqueued after this block's own copies so that it does not wait for them.
            self._start_return(group.before)
        if self._last is group:
            # The backward pass has begun, so later groups belong to another forward pass.
            self._last = None
        return tensor

    def _start_return(self, group: _Group) -> None:
        with torch.cuda.stream(self._stream):
            while group.waiting:
                parked = group.waiting.pop()
                parked.returned = parked.host.to(parked.device, non_blocking=True)
