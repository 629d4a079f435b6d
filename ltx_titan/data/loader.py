"""Prefetching of micro-batches by threads.

A worker reads the samples of one micro-batch, stacks them, makes its random draws and pins it, so the step only copies
it to the device. Threads suffice: file reads and random numbers release the GIL, and tensors need not be sent between
processes. At most `prefetch` micro-batches wait at any time, independent of the number in an optimizer step.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ltx_titan.data.dataset import Sample
from ltx_titan.data.plan import BatchPlan, PlannedForward

Batch = dict[str, dict[str, Tensor]]
"""Source -> field -> tensor with a leading batch dim."""
Draw = Callable[[Batch, int, tuple[int, ...], tuple[int, ...]], Any]
"""(batch, optimizer step, positions in the global batch, indices in the dataset) -> the draws of these samples."""


class Dataset(Protocol):
    """Interface of a dataset to the loader."""

    def load(self, index: int) -> Sample:
        """Returns one sample."""

    def name(self, index: int) -> str:
        """Name of a sample in messages."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward of one rank.

    Attributes:
        batch: source -> field -> tensor [B, ...].
        positions: index of each sample in the global batch.
        samples: index of each sample in the dataset.
        draws: result of the draw callback; None without one.
    """

    batch: Batch
    positions: tuple[int, ...]
    samples: tuple[int, ...]
    draws: Any


@dataclass(frozen=True)
class StepBatches:
    """The forwards of one optimizer step on one rank.

    Attributes:
        step: optimizer step, counted from the loader's `start_step`.
        batch_number: number of its global batch in the plan.
        num_micro_batches: length of `micro_batches`; the same on every rank.
        micro_batches: yields each as soon as it is read; must be consumed before the next step is requested.
    """

    step: int
    batch_number: int
    num_micro_batches: int
    micro_batches: Iterator[MicroBatch]


class StepLoader:
    """Iterates over optimizer steps. Use it in a `with` block, or call `close`."""

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        local_batch_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        first_batch: int | None = None,
        draw: Draw | None = None,
        num_workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool | None = None,
    ) -> None:
        """Prepares the threads; reading starts with iteration.

        Args:
            dataset: reads samples.
            plan: their order.
            dp_rank: rank among the data-parallel ranks; ranks that share a sample (TP, CP) pass the same.
            dp_size: number of data-parallel ranks.
            local_batch_size: maximal number of samples in a forward.
            start_step: first optimizer step; the draw callback receives the step.
            stop_step: step to end before; None never ends.
            first_batch: global batch of the first step; None means `start_step`. Differs after the batch size changed.
            draw: makes the random draws of a micro-batch, in a worker; must depend on its arguments alone.
            num_workers: threads; 0 reads in the calling thread.
            prefetch: micro-batches that are read ahead.
            pin_memory: whether tensors get page-locked memory, whose copies to a GPU are asynchronous; None: if a GPU
                is available.
        """
        self._dataset = dataset
        self._plan = plan
        self._draw = draw
        self._share = (dp_rank, dp_size, local_batch_size)
        self._start = start_step
        self._stop = stop_step
        # Batches and steps are counted separately: after a change of the batch size their numbers differ.
        self._offset = (start_step if first_batch is None else first_batch) - start_step
        self._prefetch = max(prefetch, 1)
        self._pin = torch.cuda.is_available() if pin_memory is None else pin_memory
        self._waiting: deque[Future[MicroBatch]] = deque()
        self._pool: ThreadPoolExecutor | None = None
        if num_workers > 0:
            self._pool = ThreadPoolExecutor(num_workers, "ltx-titan-data", self._device_setter())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and discards what they have read; may be called repeatedly."""
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[StepBatches]:
        """Yields each step in order, from the first.

        Raises:
            ValueError: a file of a sample is broken; with its name. Raised when its micro-batch is requested.
        """
        # A new iteration starts over, so nothing that was read ahead for an earlier one may be used.
        for future in self._waiting:
            future.cancel()
        self._waiting.clear()
        # One iterator runs ahead to feed the workers, the other follows the consumer.
        ahead, steps = itertools.tee(self._steps())
        jobs = ((step, forward) for step, forwards in ahead for forward in forwards)
        for step, forwards in steps:
            micro_batches = self._take(jobs, len(forwards))
            yield StepBatches(step, step + self._offset, len(forwards), micro_batches)
            # `jobs` is shared by all steps: the next step would take what is left of this one.
            assert next(micro_batches, None) is None, f"step {step}: its micro-batches were not all consumed"

    def _steps(self) -> Iterator[tuple[int, list[PlannedForward]]]:
        steps = itertools.count(self._start) if self._stop is None else range(self._start, self._stop)
        for step in steps:
            yield step, self._plan.micro_batches(step + self._offset, *self._share)

    def _take(self, jobs: Iterator[tuple[int, PlannedForward]], count: int) -> Iterator[MicroBatch]:
        for _ in range(count):
            if self._pool is None:
                yield self._read(*next(jobs))
                continue
            # Before waiting, so that the first request submits its own read.
            self._refill(jobs)
            micro_batch = self._waiting.popleft().result()
            # After it, so that workers read the next ones while the step computes.
            self._refill(jobs)
            yield micro_batch

    def _refill(self, jobs: Iterator[tuple[int, PlannedForward]]) -> None:
        assert self._pool is not None
        for job in itertools.islice(jobs, self._prefetch - len(self._waiting)):
            self._waiting.append(self._pool.submit(self._read, *job))

    def _read(self, step: int, forward: PlannedForward) -> MicroBatch:
        positions, samples = (tuple(column) for column in zip(*forward, strict=True))
        try:
            batch = collate([self._dataset.load(index) for index in samples])
            # Keyed by step and position, so it does not matter which thread draws, or when.
            draws = None if self._draw is None else self._draw(batch, step, positions, samples)
        except Exception as error:
            # A note keeps the type: a ValueError is the user's, and is printed without a traceback.
            names = ", ".join(self._dataset.name(index) for index in samples)
            error.add_note(f"while preparing step {step} from {names}")
            raise
        micro_batch = MicroBatch(batch, positions, samples, draws)
        # Pinning is a copy, so it is made here and not in the step.
        return map_tensors(micro_batch, Tensor.pin_memory) if self._pin else micro_batch

    def _device_setter(self) -> Callable[[], None] | None:
        """Initializer that selects this rank's GPU in each thread: pinning would otherwise open a context on GPU 0."""
        if not (self._pin and torch.cuda.is_available()):
            return None
        device = torch.cuda.current_device()
        return lambda: torch.cuda.set_device(device)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stacks samples of one shape key; integers become int64, other numbers float64, flags bool."""
    return {
        source: {
            field: torch.stack([_as_tensor(sample[source][field]) for sample in samples])
            for field in samples[0][source]
        }
        for source in samples[0]
    }


def _as_tensor(value: Tensor | float | bool) -> Tensor:
    if isinstance(value, float):
        # torch's default, float32, would round frame rates such as 23.976.
        return torch.tensor(value, dtype=torch.float64)
    return torch.as_tensor(value)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies `function` to every tensor in the dicts, lists, tuples and dataclasses of `value`."""
    match value:
        case Tensor():
            return function(value)
        case dict():
            return {key: map_tensors(item, function) for key, item in value.items()}
        case list():
            return [map_tensors(item, function) for item in value]
        case tuple():
            # A named tuple takes its items one by one, a tuple as one iterable.
            items = [map_tensors(item, function) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value) if field.init]
            return dataclasses.replace(value, **{name: map_tensors(getattr(value, name), function) for name in names})
    return value
