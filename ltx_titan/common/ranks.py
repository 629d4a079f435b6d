"""Agreement between ranks about success, so that one rank's full disk is an error on all of them instead of a hang.

Without a process group, or with one process, everything here is free.
"""

import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there is more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_main_rank() -> bool:
    """Whether this rank does what one rank does for all: write headers, rename, clean up."""
    return not dist.is_initialized() or dist.get_rank() == 0


def agree(error: Exception | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Waits for every rank and raises on all of them if any of them failed.

    Args:
        error: what went wrong on this rank, None if nothing.
        what: the work in progress, for the message.
        group: ranks that take part; all by default.

    Raises:
        RuntimeError: another rank failed. The failing rank re-raises its own error.
    """
    failures = [None if error is None else f"{type(error).__name__}: {error}"]
    if is_distributed():
        failures = [None] * dist.get_world_size(group)
        dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    failed = {rank: failure for rank, failure in enumerate(failures) if failure is not None}
    if failed:
        raise RuntimeError(
            f"{what} failed on rank " + "; rank ".join(f"{rank}: {text}" for rank, text in failed.items())
        )
