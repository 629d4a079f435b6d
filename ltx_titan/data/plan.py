"""The order of samples: a pure function of (data fingerprint, seed, global batch size, step).

The order has no state. Any rank on any mesh computes the same plan and takes its part; resuming needs one number, the
count of samples, which stays meaningful when the mesh or the batch size changes.

An epoch is a shuffle of all samples, cut into global batches. As many global batches as possible have samples of one
shape, which can share a forward; the remainders of all shapes form mixed batches at shuffled positions. An epoch ends
on a batch boundary: its last batch is filled from a further shuffle.

With several sources (`Mixture`) each one is a sequence of shuffles of its own, of which an epoch takes the next
samples; together they are shuffled and cut as above. So the samples of a source are used equally often, whatever its
share.

Within a step every data-parallel rank has the same number of samples and of micro-batches, because FSDP runs
collectives in every forward. The ranks of a mixed batch get about equal costs, and large micro-batches run at the same
time on all ranks.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import ceil
from typing import Any, Self

import numpy as np

PlannedForward = list[tuple[int, int]]
"""(position in the global batch, sample index) of each sample in one forward."""


@dataclass(frozen=True)
class Mixture:
    """Shares of several sources, whose samples have consecutive indices.

    Attributes:
        sizes: samples of each source.
        draws: mean number of samples of each source in an epoch, at least 1.
    """

    sizes: tuple[int, ...]
    draws: tuple[Fraction, ...]

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch."""
        return ceil(sum(self.draws))

    def drawn(self, total: int) -> list[int]:
        """Samples of each source among the first `total`: its share to less than one."""
        # Differences of rounded sums rather than rounded shares: they add up to `total`. Fractions are exact, so that
        # a share does not depend on the machine.
        ends = [0, *(int(total * share) for share in self._cumulative)]
        return [end - start for start, end in pairwise(ends)]

    def source_of(self, index: int) -> int:
        """Number of the source that a sample belongs to."""
        return bisect_right(self.ends, index)

    @cached_property
    def ends(self) -> list[int]:
        """Index after the last sample of each source."""
        return np.cumsum(self.sizes).tolist()

    @cached_property
    def _cumulative(self) -> list[Fraction]:
        return [sum(self.draws[: number + 1], Fraction()) / sum(self.draws) for number in range(len(self.draws))]


class BatchPlan:
    """The order of samples of one job."""

    def __init__(
        self,
        shape_keys: Sequence[Hashable],
        costs: Sequence[float],
        seed: int,
        global_batch_size: int,
        fingerprint: str,
        mixture: Mixture | None = None,
    ) -> None:
        """Prepares the plan.

        Args:
            shape_keys: one per sample; samples of equal keys can share a forward.
            costs: one per sample, relative (FLOPs); balanced over ranks.
            seed: the job's.
            global_batch_size: samples per optimizer step.
            fingerprint: of the dataset.
            mixture: shares of its sources; None draws every sample once in an epoch.

        Raises:
            ValueError: the dataset is empty.
        """
        assert len(shape_keys) == len(costs)
        if not shape_keys:
            raise ValueError("expected a dataset with samples, found none.")
        self.global_batch_size = global_batch_size
        self.fingerprint = fingerprint
        self._seed = seed
        self._mixture = mixture
        self._costs = [float(cost) for cost in costs]
        numbers: dict[Hashable, int] = {}
        self._buckets = np.array([numbers.setdefault(key, len(numbers)) for key in shape_keys])
        # Two epochs, because reading ahead crosses from one to the next.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def num_samples(self) -> int:
        """Samples in the dataset."""
        return len(self._buckets)

    @property
    def epoch_samples(self) -> int:
        """Samples of an epoch, before its last batch is filled up."""
        return self.num_samples if self._mixture is None else self._mixture.epoch_samples

    @property
    def num_shapes(self) -> int:
        """Distinct shapes of samples."""
        return int(self._buckets.max()) + 1

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of an epoch: until every sample was used at least once, or as many as the mixture asks for."""
        return -(-self.epoch_samples // self.global_batch_size)

    def global_batch(self, n: int) -> tuple[int, ...]:
        """Sample indices of global batch `n` (from 0), in order of their position."""
        epoch, index = divmod(n, self.batches_per_epoch)
        return tuple(self._epoch(epoch)[index].tolist())

    def drawn(self, n: int) -> list[int]:
        """Samples of each source in the first `n` global batches."""
        if self._mixture is None:
            return [n * self.global_batch_size]
        epoch, index = divmod(n, self.batches_per_epoch)
        counts = np.array(self._mixture.drawn(epoch * self.batches_per_epoch * self.global_batch_size))
        if index:
            sources = np.searchsorted(self._mixture.ends, self._epoch(epoch)[:index].ravel(), side="right")
            counts += np.bincount(sources, minlength=len(counts))
        return counts.tolist()

    def micro_batches(self, n: int, dp_rank: int, dp_size: int, local_batch_size: int) -> list[PlannedForward]:
        """The forwards of one data-parallel rank in global batch `n`; their number is the same on every rank.

        Args:
            n: global batch, from 0.
            dp_rank: rank among the data-parallel ranks.
            dp_size: number of data-parallel ranks; divides the global batch size.
            local_batch_size: maximal number of samples in a forward.
        """
        assert self.global_batch_size % dp_size == 0
        assert 0 <= dp_rank < dp_size
        batch = self.global_batch(n)
        parts = [self._forwards(batch, part, local_batch_size) for part in self._deal(batch, dp_size)]
        count = max(len(part) for part in parts)
        # Every forward runs FSDP2's collectives, so ranks with fewer split some instead of running empty ones.
        forwards = _split_to(parts[dp_rank], count)
        # Collectives make every forward as slow as that of the slowest rank: large ones run at the same time.
        forwards.sort(key=lambda forward: (-sum(self._costs[batch[position]] for position in forward), forward))
        return [[(position, batch[position]) for position in forward] for forward in forwards]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """Sample indices [batches, global batch size] of an epoch."""
        generator = self._generator(epoch)
        size, total = self.global_batch_size, self.batches_per_epoch * self.global_batch_size
        if self._mixture is None:
            order = generator.permutation(self.num_samples)
            while len(order) < total:
                order = np.concatenate([order, generator.permutation(self.num_samples)[: total - len(order)]])
        else:
            order = generator.permutation(self._draw_sources(self._mixture, epoch * total, (epoch + 1) * total))
        # A stable sort keeps the samples of each shape in shuffled order.
        order = order[np.argsort(self._buckets[order], kind="stable")]
        # Full batches of one shape first; the remainders of all shapes together fill the mixed batches.
        whole, rest = [], []
        for bucket in np.split(order, np.flatnonzero(np.diff(self._buckets[order])) + 1):
            cut = len(bucket) - len(bucket) % size
            whole.append(bucket[:cut])
            rest.append(bucket[cut:])
        batches = np.concatenate(whole + rest).reshape(-1, size)
        # Otherwise all batches of one shape would follow each other.
        return batches[generator.permutation(len(batches))]

    def _generator(self, *purpose: int) -> np.random.Generator:
        # Not Python's hash(), which is salted per process: all ranks must shuffle alike. Hashing also makes the streams
        # of neighboring seeds and epochs unrelated.
        name = "\0".join(map(str, (self.fingerprint, self._seed, *purpose)))
        return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])))

    def _draw_sources(self, mixture: Mixture, start: int, stop: int) -> np.ndarray:
        """Sample indices of the draws from `start` to `stop` of a run, source by source."""
        parts, offset = [], 0
        bounds = zip(mixture.sizes, mixture.drawn(start), mixture.drawn(stop), strict=True)
        for number, (size, first, last) in enumerate(bounds):
            # The source's own sequence: one shuffle of all its samples after the other.
            rounds = range(first // size, -(-last // size))
            if first < last:
                sequence = np.concatenate([self._generator(number, i).permutation(size) for i in rounds])
                parts.append(offset + sequence[first - rounds.start * size : last - rounds.start * size])
            offset += size
        return np.concatenate(parts)

    def _deal(self, batch: Sequence[int], dp_size: int) -> list[list[int]]:
        """Positions for each rank: the most expensive samples first, each to the least loaded rank with room."""
        room = len(batch) // dp_size
        parts: list[list[int]] = [[] for _ in range(dp_size)]
        waiting = [(0.0, 0, rank) for rank in range(dp_size)]
        heapify(waiting)
        # Graham's greedy rule, longest first. Ties are broken by shape and position: every rank computes the same.
        order = sorted(range(len(batch)), key=lambda i: (-self._costs[batch[i]], self._buckets[batch[i]], i))
        for position in order:
            load, count, rank = heappop(waiting)
            parts[rank].append(position)
            # A full rank gets no more, whatever its load: all ranks need equally many samples.
            if count + 1 < room:
                heappush(waiting, (load + self._costs[batch[position]], count + 1, rank))
        return parts

    def _forwards(self, batch: Sequence[int], positions: Sequence[int], local_batch_size: int) -> list[list[int]]:
        """Positions of one rank in groups of one shape, each of at most `local_batch_size`."""
        shapes: dict[int, list[int]] = {}
        for position in sorted(positions):
            shapes.setdefault(int(self._buckets[batch[position]]), []).append(position)
        return [
            group[start : start + local_batch_size]
            for group in shapes.values()
            for start in range(0, len(group), local_batch_size)
        ]


@dataclass(frozen=True)
class DataPosition:
    """Position of a run in its data after a step, as stored in a checkpoint.

    Attributes:
        samples_seen: samples of all global batches so far.
        global_batch_size: of the run that wrote it.
        fingerprint: of its dataset.
    """

    samples_seen: int
    global_batch_size: int
    fingerprint: str

    def to_dict(self) -> dict[str, int | str]:
        """Converts the position to plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restores a position from the values of `to_dict`."""
        return cls(int(values["samples_seen"]), int(values["global_batch_size"]), str(values["fingerprint"]))


def resume_step(position: DataPosition, *, global_batch_size: int, fingerprint: str) -> tuple[int, list[str]]:
    """Finds the global batch to resume with, and describes what changed since the checkpoint.

    With an unchanged batch size it is exactly the next one. With another it is rounded down: up to a batch of samples
    is used again rather than skipped.

    Args:
        position: from the checkpoint.
        global_batch_size: of the job now.
        fingerprint: of the dataset now.

    Returns:
        number of the next global batch in the plan (not the optimizer step, which the checkpoint stores), and one
        line per change; no lines if the order is that of an uninterrupted run.
    """
    batch, rest = divmod(position.samples_seen, global_batch_size)
    notes = []
    if global_batch_size != position.global_batch_size:
        again = f"; {rest} of them are used again" if rest else ""
        notes.append(
            f"training.global_batch_size changed from {position.global_batch_size} to {global_batch_size}: after "
            f"{position.samples_seen} samples the data resumes at global batch {batch} of a new order{again}"
        )
    if fingerprint != position.fingerprint:
        notes.append(
            f"the dataset changed (fingerprint {position.fingerprint[:8]} -> {fingerprint[:8]}): its samples are in a "
            "new order, and some may be used twice before others are used once"
        )
    return batch, notes


def _split_to(forwards: list[list[int]], count: int) -> list[list[int]]:
    """Halves the largest forwards until there are `count`."""
    forwards = list(forwards)
    while len(forwards) < count:
        largest = max(range(len(forwards)), key=lambda i: (len(forwards[i]), -i))
        group = forwards.pop(largest)
        middle = (len(group) + 1) // 2
        forwards += [group[:middle], group[middle:]]
    return forwards
