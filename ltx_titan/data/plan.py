"""Which samples each optimizer step trains on: a pure function of (data fingerprint, seed, global batch size, step).

Nothing of the order is state. Any rank on any mesh computes the same plan and takes its part; resuming needs a number
only.

An epoch is a shuffle of all samples, cut into global batches. Where it can be, a global batch has samples of one
shape, since these share a forward; what is left of every shape forms mixed batches at shuffled places. An epoch ends
on a batch boundary: its last batch is filled from a further shuffle.

Within a step every data-parallel rank has the same number of samples and of micro-batches, for FSDP's collectives
come with every forward. Ranks of a mixed batch get equal shares of its cost, and large micro-batches meet large ones.
"""

import hashlib
from collections.abc import Hashable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush

import numpy as np

PlannedForward = list[tuple[int, int]]
"""(position in the global batch, sample index) of each sample in one forward."""


class BatchPlan:
    """The order of samples of one job."""

    def __init__(
        self,
        shape_keys: Sequence[Hashable],
        costs: Sequence[float],
        seed: int,
        global_batch_size: int,
        fingerprint: str,
    ) -> None:
        """Prepares the plan.

        Args:
            shape_keys: one per sample; samples of equal keys can share a forward.
            costs: one per sample, relative (FLOPs); balanced over ranks.
            seed: the job's.
            global_batch_size: samples per optimizer step.
            fingerprint: of the data set.

        Raises:
            ValueError: if there are no samples.
        """
        assert len(shape_keys) == len(costs)
        if not shape_keys:
            raise ValueError("expected a data set with samples, found none.")
        self.global_batch_size = global_batch_size
        self.fingerprint = fingerprint
        self._seed = seed
        self._costs = [float(cost) for cost in costs]
        numbers: dict[Hashable, int] = {}
        self._buckets = np.array([numbers.setdefault(key, len(numbers)) for key in shape_keys])
        # Two epochs at once: threads that read ahead cross from one to the next.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    @property
    def num_samples(self) -> int:
        """Samples in the data set."""
        return len(self._buckets)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in which every sample comes at least once."""
        return -(-self.num_samples // self.global_batch_size)

    def global_batch(self, n: int) -> tuple[int, ...]:
        """Sample indices of global batch `n` (from 0), in its order."""
        epoch, index = divmod(n, self.batches_per_epoch)
        return tuple(self._epoch(epoch)[index].tolist())

    def micro_batches(self, n: int, dp_rank: int, dp_size: int, local_batch_size: int) -> list[PlannedForward]:
        """The forwards of one data-parallel rank in global batch `n`, as many for every rank.

        Args:
            n: global batch, from 0.
            dp_rank: rank among the data-parallel ranks.
            dp_size: number of these; divides the global batch size.
            local_batch_size: most samples in a forward.
        """
        assert self.global_batch_size % dp_size == 0
        assert 0 <= dp_rank < dp_size
        batch = self.global_batch(n)
        parts = [self._forwards(batch, part, local_batch_size) for part in self._deal(batch, dp_size)]
        count = max(len(part) for part in parts)
        forwards = _split_to(parts[dp_rank], count)
        # A step waits for the slowest rank in every forward, so large ones should run at the same time.
        forwards.sort(key=lambda forward: (-sum(self._costs[batch[position]] for position in forward), forward))
        return [[(position, batch[position]) for position in forward] for forward in forwards]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        """Sample indices [batches, global batch size] of an epoch."""
        key = hashlib.sha256(f"{self.fingerprint}\0{self._seed}\0{epoch}".encode()).digest()
        generator = np.random.Generator(np.random.PCG64(int.from_bytes(key[:16])))
        size, total = self.global_batch_size, self.batches_per_epoch * self.global_batch_size
        order = generator.permutation(self.num_samples)
        while len(order) < total:
            order = np.concatenate([order, generator.permutation(self.num_samples)[: total - len(order)]])
        # Stable, so that each shape keeps its samples in shuffled order.
        order = order[np.argsort(self._buckets[order], kind="stable")]
        whole, rest = [], []
        for bucket in np.split(order, np.flatnonzero(np.diff(self._buckets[order])) + 1):
            cut = len(bucket) - len(bucket) % size
            whole.append(bucket[:cut])
            rest.append(bucket[cut:])
        batches = np.concatenate(whole + rest).reshape(-1, size)
        return batches[generator.permutation(len(batches))]

    def _deal(self, batch: Sequence[int], dp_size: int) -> list[list[int]]:
        """Positions for each rank: the dearest sample first, each to the rank with least cost that has room."""
        room = len(batch) // dp_size
        parts: list[list[int]] = [[] for _ in range(dp_size)]
        waiting = [(0.0, 0, rank) for rank in range(dp_size)]
        heapify(waiting)
        order = sorted(range(len(batch)), key=lambda i: (-self._costs[batch[i]], self._buckets[batch[i]], i))
        for position in order:
            load, count, rank = heappop(waiting)
            parts[rank].append(position)
            if count + 1 < room:
                heappush(waiting, (load + self._costs[batch[position]], count + 1, rank))
        return parts

    def _forwards(self, batch: Sequence[int], positions: Sequence[int], local_batch_size: int) -> list[list[int]]:
        """Positions of one rank, grouped by shape, at most `local_batch_size` together."""
        shapes: dict[int, list[int]] = {}
        for position in sorted(positions):
            shapes.setdefault(int(self._buckets[batch[position]]), []).append(position)
        return [
            group[start : start + local_batch_size]
            for group in shapes.values()
            for start in range(0, len(group), local_batch_size)
        ]


def _split_to(forwards: list[list[int]], count: int) -> list[list[int]]:
    """`forwards` with the largest ones halved until there are `count`."""
    forwards = list(forwards)
    while len(forwards) < count:
        largest = max(range(len(forwards)), key=lambda i: (len(forwards[i]), -i))
        group = forwards.pop(largest)
        middle = (len(group) + 1) // 2
        forwards += [group[:middle], group[middle:]]
    return forwards
