"""Ranks of a job: their index, their device, and agreement on errors.

Without a process group, or with one process, nothing here communicates.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ltx_titan.common.gloo import use_one_gloo_thread

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


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world size as torchrun sets them in the environment; (0, 1) without it.

    Raises:
        ValueError: a variable is missing, or is not a number that fits the other.
    """
    size = number_of(environment, "WORLD_SIZE", 1, at_least=1)
    if size > 1 and "RANK" not in environment:
        raise ValueError(
            f"WORLD_SIZE is {size}, and RANK is not set: expected both, as torchrun sets them; start with "
            f"`ltx-titan train`, or unset WORLD_SIZE."
        )
    rank = number_of(environment, "RANK", 0, at_least=0)
    if rank >= size:
        raise ValueError(f"RANK is {rank}: expected less than WORLD_SIZE, which is {size}; correct one of them.")
    return rank, size


def number_of(
    environment: Mapping[str, str], name: str, default: int, *, at_least: int, at_most: int | None = None
) -> int:
    """Reads a whole number from an environment variable.

    Raises:
        ValueError: it is set to something else, or out of range; the message names the variable.
    """
    text = environment.get(name)
    if not text:
        return default
    # isdecimal: int() also accepts spaces, underscores and signs.
    number = int(text) if text.isdecimal() and len(text) < 10 else None
    if number is None or number < at_least or (at_most is not None and number > at_most):
        limits = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
        raise ValueError(
            f"{name} is {text!r} in the environment: expected a whole number {limits}; correct or unset it."
        )
    return number


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


def check_device(device: str) -> None:
    """Checks the name of a device, and that this machine has it.

    Raises:
        ValueError: it is no device, or there is none of it.
    """
    try:
        found = torch.device(device)
        is_there = found.type == "cpu" or (found.type == "cuda" and (found.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        is_there = False
    if not is_there:
        raise ValueError(
            f"--device {device}: expected cpu, or cuda with one of the {torch.cuda.device_count()} GPUs of this machine"
        )


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
        use_one_gloo_thread()
        dist.init_process_group("gloo", timeout=_COMMAND_TIMEOUT)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()
    finally:
        if is_ours:
            dist.destroy_process_group()
