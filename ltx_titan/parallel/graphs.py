"""Whole-micro-step CUDA graphs: forward, loss, backward and their collectives, replayed with one launch.

A layer is 370 launches forward and backward, and FSDP2 adds its own Python; at 4,032 tokens the host needs longer to
enqueue them than the device to run them. A graph records all of it once for each signature of a micro-batch (its shapes
and which of its parts are present) and replays it afterwards. FSDP2's gathered weights may move between steps: their
addresses inside the graph are those of the recording, in a memory pool that belongs to the graphs.

    inputs -> copied into static tensors -> replay -> losses and gradients in static tensors

The first micro-steps of a signature run eagerly, on the stream that is recorded later: they compile, tune, and set up
libraries, streams and communicators, none of which may happen while recording.

**Gradients.** Every signature writes one set of gradient tensors, whichever wrote it first, so that micro-batches of
different shapes accumulate. A recording depends on which parameters have a gradient when it begins: those are added to,
all others are overwritten, and nothing has to be zeroed.

**Memory.** All graphs share one pool, as large as the largest signature needs. It is not available to anything else:
`drop` the graphs before work that needs memory, such as sampling; they are recorded again afterwards.
"""

import gc
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ltx_titan.common.hardware import GIB
from ltx_titan.common.tensors import local
from ltx_titan.config import Degrees, JobConfig

logger = logging.getLogger(__name__)

# Eager runs of a signature before it is recorded: the first compiles, the second finds everything in place.
_WARMUP = 2
# Signatures with graphs; each holds static inputs and a few MB of launch parameters on the device.
_LIMIT = 16


class Recorder(Protocol):
    """Runs and records functions; `CudaRecorder`, or a simulation of it in tests."""

    def run(self, function: Callable[[], Any]) -> Any:
        """Runs `function` eagerly where recordings are made."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Records `function`; returns its result, whose tensors hold values only after the returned replay."""

    def drop(self) -> None:
        """Frees all recordings and their memory."""


class CudaRecorder:
    """CUDA graphs on a stream of their own, all in one memory pool."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def run(self, function: Callable[[], Any]) -> Any:
        """Runs on the recording stream, ordered after and before the current stream's work."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Records a graph. Other threads may use the device meanwhile: NCCL's watchdog and the loader do."""
        # Reference cycles from earlier steps may own CUDA objects, which must not be destroyed while recording.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        pool = self._graphs[0].pool() if self._graphs else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            result = function()
        self._graphs.append(graph)
        return result, graph.replay

    def drop(self) -> None:
        """Destroys the graphs once the device has finished with them, and returns their pool."""
        torch.cuda.synchronize(self._device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class _Recording:
    """A graph: its replay, its outputs, and the gradients that parameters have after it."""

    replay: Callable[[], None]
    outputs: Any
    gradients: list[tuple[nn.Parameter, Tensor]]


@dataclass
class _Signature:
    """Static inputs of one signature, and its recordings by the parameters that have a gradient beforehand."""

    inputs: Any
    tensors: list[Tensor]
    runs: int = 0
    recordings: dict[bytes, _Recording] = field(default_factory=dict)


class GraphedMicroStep:
    """Runs a micro-step, and replays it as a graph once its signature has been seen often enough.

    Args:
        body: forward, loss and backward of one micro-batch. Takes nested dataclasses and tuples of tensors, returns the
            same without autograd history, and adds to the gradients of `parameters`. It must not read from the device,
            copy from the host, or depend on Python values that change without a change in its argument.
        parameters: whose gradients `body` produces.
        recorder: records graphs; None runs everything eagerly.
    """

    def __init__(
        self, body: Callable[[Any], Any], parameters: Iterable[nn.Parameter], recorder: Recorder | None
    ) -> None:
        self._body = body
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._recorder = recorder
        self._signatures: dict[Hashable, _Signature] = {}
        # The one set of gradient tensors that all recordings write.
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._is_over_limit = False
        self.peak_bytes = 0
        """Most device memory while recording, 0 without graphs. Replays use as much, unseen by the allocator."""

    def __call__(self, inputs: Any) -> Any:
        """The result of `body(inputs)`; that of a replay is overwritten by the next one."""
        if self._recorder is None:
            return self._body(inputs)
        tensors, key = flatten(inputs)
        signature = self._signatures.get(key)
        if signature is None:
            if len(self._signatures) == _LIMIT:
                return self._run_beyond_limit(inputs)
            # Contiguous from the start: compiled code is specialized on strides, and must not compile while recording.
            static = [tensor.clone(memory_format=torch.contiguous_format) for tensor in tensors]
            signature = self._signatures[key] = _Signature(unflatten(inputs, iter(static)), static)
        else:
            torch._foreach_copy_(signature.tensors, tensors)
        if signature.runs < _WARMUP:
            signature.runs += 1
            return self._recorder.run(partial(self._body, signature.inputs))
        recording = self._recording_of(signature)
        recording.replay()
        for parameter, gradient in recording.gradients:
            parameter.grad = gradient
        return recording.outputs

    def drop(self) -> None:
        """Frees all graphs and their memory; call it between steps. Signatures are warmed up and recorded again."""
        if self._recorder is None:
            return
        self._signatures.clear()
        self._gradients.clear()
        self.peak_bytes = 0
        self._recorder.drop()

    def _recording_of(self, signature: _Signature) -> _Recording:
        """The recording that fits the gradients there are, which are moved to where it adds to them."""
        accumulated = [parameter for parameter in self._parameters if parameter.grad is not None]
        for parameter in accumulated:
            assert parameter.grad is not None
            target = self._gradients.setdefault(parameter, parameter.grad)
            if parameter.grad is not target:
                # From an eager micro-step.
                local(target).copy_(local(parameter.grad))
                parameter.grad = target
        key = bytes(parameter.grad is not None for parameter in self._parameters)
        if key not in signature.recordings:
            signature.recordings[key] = self._record(signature, frozenset(accumulated))
        return signature.recordings[key]

    def _record(self, signature: _Signature, accumulated: frozenset[nn.Parameter]) -> _Recording:
        def body() -> Any:
            outputs = self._body(signature.inputs)
            for parameter in self._parameters:
                if parameter.grad is None or parameter in accumulated:
                    continue
                target = self._gradients.setdefault(parameter, parameter.grad)
                if parameter.grad is not target:
                    local(target).copy_(local(parameter.grad))
                    parameter.grad = target
            return outputs

        assert self._recorder is not None
        started = time.perf_counter()
        try:
            outputs, replay = self._recorder.record(body)
        except RuntimeError as error:
            error.add_note(
                "While recording a training step as a CUDA graph. Set compile.graphs to 'off' to run it eagerly."
            )
            raise
        peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        gradients = [(parameter, parameter.grad) for parameter in self._parameters if parameter.grad is not None]
        how = "added to" if accumulated else "written"
        logger.info(
            "CUDA graphs: recorded a training step, %d gradients %s, in %.1f s, with up to %.1f GiB of tensors",
            len(gradients),
            how,
            time.perf_counter() - started,
            peak_bytes / GIB,
        )
        return _Recording(replay, outputs, gradients)

    def _run_beyond_limit(self, inputs: Any) -> Any:
        if not self._is_over_limit:
            self._is_over_limit = True
            logger.warning(
                "CUDA graphs: batches have more than %d different shapes; further ones run eagerly. Use fewer buckets.",
                _LIMIT,
            )
        assert self._recorder is not None
        return self._recorder.run(partial(self._body, inputs))


def flatten(value: Any) -> tuple[list[Tensor], Hashable]:
    """Tensors in nested dataclasses and tuples, and everything else about them: structure, shapes, dtypes, values."""
    tensors: list[Tensor] = []

    def describe(item: Any) -> Hashable:
        if isinstance(item, Tensor):
            tensors.append(item)
            return tuple(item.shape), item.dtype, item.requires_grad
        if isinstance(item, tuple):
            return type(item), *map(describe, item)
        if is_dataclass(item):
            return type(item), *(describe(getattr(item, part.name)) for part in fields(item))
        return item

    return tensors, describe(value)


def unflatten(like: Any, tensors: Iterator[Tensor]) -> Any:
    """A copy of `like` whose tensors are the given ones, in the order of `flatten`."""
    if isinstance(like, Tensor):
        return next(tensors)
    if isinstance(like, tuple):
        parts = [unflatten(item, tensors) for item in like]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if is_dataclass(like) and not isinstance(like, type):
        return type(like)(**{part.name: unflatten(getattr(like, part.name), tensors) for part in fields(like)})
    return like


def make_recorder(job: JobConfig, degrees: Degrees, device: torch.device) -> CudaRecorder | None:
    """The recorder that `compile.graphs` asks for; None to run eagerly, with the reason in the log.

    Raises:
        ValueError: `compile.graphs = "on"` and the job cannot be recorded.
    """
    wanted = job.compile.graphs
    if wanted == "off":
        return None
    reason = obstacle(job, degrees, device)
    if reason is None:
        return CudaRecorder(device)
    if wanted == "on":
        raise ValueError(f"compile.graphs = 'on': {reason}; set compile.graphs to 'auto' or 'off'.")
    if device.type == "cuda":
        logger.info("CUDA graphs: not used, because %s", reason)
    return None


def obstacle(job: JobConfig, degrees: Degrees, device: torch.device) -> str | None:
    """Why a job's steps cannot be recorded; None if they can."""
    if device.type != "cuda":
        return f"graphs need a CUDA device, found {device.type}"
    if job.parallelism.cpu_offload:
        return "parallelism.cpu_offload makes the host wait for gradients"
    if job.activation_checkpoint.offload:
        return "activation_checkpoint.offload copies to host memory that changes from step to step"
    if job.optimizer.in_backward and job.optimizer.name != "adafactor":
        return (
            f'optimizer.in_backward with optimizer.name = "{job.optimizer.name}" reads the learning rate on the host; '
            '"adafactor" reads it on the device'
        )
    return None
