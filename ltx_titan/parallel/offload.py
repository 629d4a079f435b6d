"""Keeps activations in host memory between the forward and the backward pass.

Copies run on a stream of their own, beside the computation: a block's inputs leave while the block runs, and come back
while the block behind it is in its backward pass. With whole blocks recomputed that is one tensor per stream and block
(132 MB for 16k video tokens in bfloat16), a few milliseconds of PCIe time next to a hundred of computing.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Smaller tensors cost more in launches than they free.
_MIN_BYTES = 1 << 20


@dataclass
class _Parked:
    """A tensor in host memory, or on its way there; `returned` is its copy on the device once that is asked for."""

    host: Tensor
    device: torch.device
    group: "_Group"
    returned: Tensor | None = None


@dataclass
class _Group:
    """What one block left, and the group of the block before it, which the backward pass needs next."""

    before: "_Group | None"
    waiting: list[_Parked] = field(default_factory=list)


class ActivationOffload:
    """Where the recomputed blocks of one model leave their inputs."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._current: _Group | None = None
        self._last: _Group | None = None

    def saved_tensors(self) -> AbstractContextManager:
        """A context for one block: what autograd saves inside is kept in host memory.

        Tensors on the CPU and small ones stay where they are.
        """
        self._current = None
        return torch.autograd.graph.saved_tensors_hooks(self._park, self._fetch)

    def _park(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_cuda or tensor.nbytes < _MIN_BYTES:
            return tensor
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        if self._current is None:
            self._current = self._last = _Group(before=self._last)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        # The allocator must not hand this memory out again before the copy has read it.
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
        current.wait_stream(self._stream)
        tensor, saved.returned = saved.returned, None
        tensor.record_stream(current)
        if group.before is not None:
            # Only now, so that this block does not wait for the next one's copies.
            self._start_return(group.before)
        if self._last is group:
            # The backward pass has begun: what comes later belongs to another forward pass.
            self._last = None
        return tensor

    def _start_return(self, group: _Group) -> None:
        with torch.cuda.stream(self._stream):
            while group.waiting:
                parked = group.waiting.pop()
                parked.returned = parked.host.to(parked.device, non_blocking=True)
