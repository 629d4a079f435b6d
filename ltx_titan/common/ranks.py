"""Ranks of a job: their index, their device, and agreement on errors.

Without a process group, or with one process, nothing here communicates.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")

# Ranks of a command work independently, so one may finish hours before the slowest.
_COMMAND_TIMEOUT = timedelta(days=14)


class PeerError(RuntimeError):
    """Another rank failed; its own error says why."""


class StalledError(RuntimeError):
    """A rank was waited for until the time-out; the message names it."""


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_main_rank() -> bool:
    """Whether this rank does the work that is done once for all: headers, renames, cleaning up."""
    return not dist.is_initialized() or dist.get_rank() == 0


def rank_and_size() -> tuple[int, int]:
    """Rank and world size as torchrun sets them in the environment; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_share(items: Sequence[Item]) -> list[Item]:
    """Every N-th item under torchrun, all items without it."""
    rank, size = rank_and_size()
    return list(items[rank::size])


def own_device(device: str) -> str:
    """Turns `cuda` into the GPU of this process's local rank and makes it current; other devices are returned as is."""
    if device != "cuda":
        return device
    device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
    torch.cuda.set_device(device)
    return device


def agree(error: Exception | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Waits for every rank and raises on all of them if any of them failed.

    Args:
        error: exception raised on this rank, None without one.
        what: the work in progress, for the message.
        group: participating ranks; all by default.

    Raises:
        PeerError: another rank failed. The failing rank re-raises its own error.
    """
    own = None if error is None else f"{type(error).__name__}: {error}"
    failures: list[str | None] = [own]
    if is_distributed():
        failures = [None] * dist.get_world_size(group)
        # Also if this rank succeeded: a failed one waits here for all ranks.
        dist.all_gather_object(failures, own, group=group)
    # This rank's own error first: it has the traceback.
    if error is not None:
        raise error
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if failed:
        raise PeerError(f"{what} failed on rank " + "; rank ".join(f"{rank}: {text}" for rank, text in failed.items()))


@dataclass(frozen=True)
class Ranks:
    """The processes that run one command together.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process does the work that is done once: printing, cleaning up."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all processes have called it."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every one of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Joins the processes that torchrun started, over gloo; a process started alone is rank 0 of 1."""
    # A group that a caller made stays; it is the caller's to destroy.
    is_ours = rank_and_size()[1] > 1 and not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo", timeout=_COMMAND_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
    finally:
        if is_ours:
            dist.destroy_process_group()
