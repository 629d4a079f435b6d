"""Streams the frozen weights of the blocks from host memory, for GPUs that cannot hold them all.

Every block has its weights in pinned host memory. The device has a ring of slots, and block i always uses slot
i mod n: its parameters are views of that slot, so that their addresses never change, compiled code is not specialized
again, and what autograd saved of a weight in the forward pass is right in the backward pass once the slot holds the
block again.

    forward     block i ends    -> copy block i + n into its slot
    backward    block i ends    -> copy block i - n into its slot

Copies run on a stream of their own. A copy waits for everything that was enqueued before it, hence for the last reader
of the slot; a block waits for the copy of its own weights. The order of blocks is only a prediction: a block whose
weights are not in its slot has them copied before it runs. After a training step, and after a forward pass without
gradients, the slots hold the first n blocks, from which the next pass starts. A step copies 2 (blocks - n) blocks.

Adapters, and all weights outside the blocks, stay on the device.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper

from ltx_titan.common.tensors import without_wrappers

# Of a weight within a slot: what the allocator gives tensors of their own. Inductor copies inputs below 16 bytes.
_ALIGNMENT = 256


class Copies(Protocol):
    """Copies blocks into slots; the ring decides which and when."""

    def start(self, slot: Tensor, host: Tensor) -> Callable[[], None]:
        """Starts a copy after all work enqueued so far; the returned function makes later work wait for it."""


class DirectCopies:
    """Copies of a device without streams: done at once."""

    def start(self, slot: Tensor, host: Tensor) -> Callable[[], None]:
        """Copies."""
        slot.copy_(host)
        return lambda: None


class CudaCopies:
    """Copies on a stream of their own, from pinned memory. They may be recorded in a CUDA graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, slot: Tensor, host: Tensor) -> Callable[[], None]:
        """Enqueues the copy behind the current stream's work, which includes the last kernel that reads the slot."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            slot.copy_(host, non_blocking=True)
            done = self._stream.record_event()
        return lambda: torch.cuda.current_stream(self._device).wait_event(done)


@dataclass(frozen=True)
class _Part:
    """A frozen parameter of a block: its owner, its name there and in the block, and its bytes in a slot."""

    module: nn.Module
    attribute: str
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def view(self, buffer: Tensor) -> Tensor:
        """The parameter's tensor in a buffer of bytes."""
        size = prod(self.shape) * self.dtype.itemsize
        return buffer[self.start : self.start + size].view(self.dtype).view(self.shape)


class StreamedBlock(ActivationWrapper):
    """A block whose frozen weights are in its slot while it runs. Names in the state dict stay, values are the host's.

    Outside of compilation, checkpointing and FSDP2's unit: recomputation does not pass through it.
    """

    def __init__(self, block: nn.Module, number: int, stream: "WeightStream") -> None:
        super().__init__(block)
        self.number, self.stream = number, stream
        self.register_state_dict_post_hook(_put_host_weights)

    def forward(self, *args: Any) -> Any:
        """The block's outputs."""
        if not self.stream.is_started:
            return self._checkpoint_wrapped_module(*args)
        self.stream.before_forward(self.number)
        outputs = self._checkpoint_wrapped_module(*args)
        for output in outputs:
            # A stream that is not updated passes through; its gradient is complete long after this block's.
            if isinstance(output, Tensor) and output.requires_grad and all(output is not given for given in args):
                output.register_hook(partial(self._before_backward))
        self.stream.after_forward(self.number, is_training=torch.is_grad_enabled())
        return outputs

    def _before_backward(self, _: Tensor) -> None:
        # Autograd runs later operations first, so by now the following blocks have read their weights for the last
        # time.
        self.stream.before_backward(self.number)


def _put_host_weights(block: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Replaces the contents of a slot, which may be another block's, by the block's own weights."""
    assert isinstance(block, StreamedBlock)
    for name, tensor in block.stream.host_weights(block.number).items():
        # With keep_vars=True the caller asks for the parameters, not for their values.
        if not isinstance(state[prefix + name], nn.Parameter):
            state[prefix + name] = tensor


class WeightStream:
    """Frozen weights of a model's blocks in host memory, and the ring of slots on the device.

    Wraps the blocks when it is created, on the meta device. Then `allocate`, load the weights, and `start`.

    Args:
        blocks: the model's repeated blocks, compiled and checkpointed already; replaced in place.
        slots: number of blocks on the device, below the number of blocks; with one, copies and compute do not overlap.
    """

    def __init__(self, blocks: nn.ModuleList, slots: int) -> None:
        assert 0 < slots < len(blocks), (slots, len(blocks))
        self.num_slots = slots
        self._blocks = [StreamedBlock(block, number, self) for number, block in enumerate(blocks)]
        for number, block in enumerate(self._blocks):
            blocks[number] = block
        self._layouts: list[list[_Part]] = []
        self._hosts: list[Tensor] = []
        self._slots: list[Tensor] = []
        self._copies: Copies | None = None
        # Block in each slot, and what waits for its copy.
        self._held: list[int | None] = [None] * slots
        self._waits: dict[int, Callable[[], None]] = {}

    @property
    def is_started(self) -> bool:
        """Whether blocks read their weights from slots."""
        return self._copies is not None

    @property
    def is_allocated(self) -> bool:
        """Whether the frozen weights have host memory."""
        return bool(self._hosts)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def parameters(self) -> set[nn.Parameter]:
        """The frozen parameters of all blocks: FSDP2 must not manage them."""
        return {parameter for block in self._blocks for parameter in block.parameters() if not parameter.requires_grad}

    def allocate(self, device: torch.device) -> None:
        """Gives the frozen weights uninitialized host memory, pinned for copies to a CUDA device.

        Args:
            device: of the slots; with "meta" the host's weights stay on the meta device.

        Raises:
            RuntimeError: the memory cannot be pinned.
        """
        self._layouts = [_layout(block) for block in self._blocks]
        memory = "meta" if device.type == "meta" else "cpu"
        self._hosts = [torch.empty(_size(layout), dtype=torch.uint8, device=memory) for layout in self._layouts]
        if device.type == "cuda":
            # Registered, not allocated as pinned: torch's allocator would round each size up to a power of two.
            # Not at exit, when the driver may be gone.
            weakref.finalize(self, _unpin, _pin(self._hosts)).atexit = False
        for layout, host in zip(self._layouts, self._hosts, strict=True):
            for part in layout:
                setattr(part.module, part.attribute, nn.Parameter(part.view(host), requires_grad=False))

    def start(self, device: torch.device, copies: Copies | None = None) -> None:
        """Allocates the slots, from which the blocks read their weights from now on.

        Args:
            device: of the slots.
            copies: how blocks are copied; None for the way of the device.
        """
        assert self._layouts, "call allocate first"
        size = max(host.nbytes for host in self._hosts)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self.num_slots)]
        for number, layout in enumerate(self._layouts):
            for part in layout:
                # `.data`, a version counter of its own: autograd may not take copies into the slot for a change of a
                # saved weight.
                weight = part.view(self._slots[number % self.num_slots]).data
                setattr(part.module, part.attribute, nn.Parameter(weight, requires_grad=False))
        if copies is None:
            copies = CudaCopies(device) if device.type == "cuda" else DirectCopies()
        self._copies = copies

    @property
    def host_bytes(self) -> int:
        """Size of the host memory."""
        return sum(host.nbytes for host in self._hosts)

    def host_weights(self, number: int) -> dict[str, Tensor]:
        """The true frozen weights of a block by their names in it; empty before `start`, when parameters hold them."""
        if not self.is_started:
            return {}
        return {part.name: part.view(self._hosts[number]) for part in self._layouts[number]}

    def before_forward(self, number: int) -> None:
        """Makes the current stream wait until a block's weights are in its slot."""
        self._fetch(number)
        self._wait(number)

    def after_forward(self, number: int, *, is_training: bool) -> None:
        """Copies the next block that uses this slot: after the last ones it is used by the backward pass or wraps."""
        following = number + self.num_slots
        if following < self.num_blocks:
            self._fetch(following)
        elif not is_training:
            self._fetch(number % self.num_slots)

    def before_backward(self, number: int) -> None:
        """As `before_forward`; the following block is done, so the next one in its slot is copied."""
        self._fetch(number)
        self._wait(number)
        preceding = number + 1 - self.num_slots
        if preceding >= 0 and number + 1 < self.num_blocks:
            self._fetch(preceding)

    def settle(self) -> None:
        """Brings the first blocks into the slots and waits for all copies.

        A CUDA graph of a training step starts and ends in this state: it may not wait for a copy outside of it.
        """
        for number in range(self.num_slots):
            self._fetch(number)
        for slot in list(self._waits):
            self._waits.pop(slot)()

    def _fetch(self, number: int) -> None:
        slot = number % self.num_slots
        if self._held[slot] == number:
            return
        assert self._copies is not None, "call start first"
        self._held[slot] = number
        host = self._hosts[number]
        # Copies of one stream are in order: an earlier one into this slot that nobody waited for is overwritten.
        self._waits[slot] = self._copies.start(self._slots[slot][: host.nbytes], host)

    def _wait(self, number: int) -> None:
        wait = self._waits.pop(number % self.num_slots, None)
        if wait is not None:
            wait()


def weight_stream(model: nn.Module) -> WeightStream | None:
    """The stream of a model's weights; None if they are resident."""
    return next((module.stream for module in model.modules() if isinstance(module, StreamedBlock)), None)


def streamed_bytes(block: nn.Module) -> int:
    """Bytes of a block in a slot, and in host memory."""
    return _size(_layout(block))


def _layout(block: nn.Module) -> list[_Part]:
    parts, start = [], 0
    for path, module in block.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                continue
            name = without_wrappers(f"{path}.{attribute}" if path else attribute)
            parts.append(_Part(module, attribute, name, parameter.dtype, parameter.shape, start))
            start += -(-parameter.nbytes // _ALIGNMENT) * _ALIGNMENT
    return parts


def _size(layout: list[_Part]) -> int:
    if not layout:
        return 0
    last = layout[-1]
    return last.start + -(-prod(last.shape) * last.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def _pin(buffers: list[Tensor]) -> list[Tensor]:
    pinned: list[Tensor] = []
    for buffer in buffers:
        status = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)
        if int(status) != 0:
            _unpin(pinned)
            size = sum(each.nbytes for each in buffers) / 2**30
            raise RuntimeError(
                f"parallelism.stream_blocks: expected {size:.1f} GiB of host memory that can be pinned for each rank, "
                f"found {sum(each.nbytes for each in pinned) / 2**30:.1f} GiB (CUDA error {int(status)}); free memory, "
                "raise the limit of locked memory (ulimit -l), or choose a smaller lora.base_dtype."
            )
        pinned.append(buffer)
    return pinned


def _unpin(buffers: list[Tensor]) -> None:
    for buffer in buffers:
        torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())
