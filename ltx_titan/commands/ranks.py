"""Several processes that prepare one data set: each has its share of the samples, and they meet at start and end.

Under torchrun the processes find each other over gloo; nothing of the work itself is sent. One process alone needs no
group.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# They wait for the slowest of them, which may be hours behind at the end.
_PATIENCE = timedelta(days=14)


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: its number.
        world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process does what is done once: printing, clearing up."""
        return self.rank == 0

    def wait(self) -> None:
        """Goes on when all have come here."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank; on every one of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Meets the other processes that torchrun has started, if it has."""
    is_ours = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
    finally:
        if is_ours:
            dist.destroy_process_group()


def own_device(device: str) -> str:
    """`cuda` made this process' own GPU; any other device as it is."""
    if device != "cuda":
        return device
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    torch.cuda.set_device(device)
    return device
