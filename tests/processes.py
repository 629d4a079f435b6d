"""Runs a function on several gloo ranks of this machine."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server imports torch once and forks the ranks: a second instead of several for every test.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "ltx_titan.train", "tests.checkpoint.toy"])


def run_ranks(work: Callable[..., None], world_size: int, *args: object) -> None:
    """Runs `work(*args)` on `world_size` ranks; fails if it fails on any of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (world_size, Path(folder) / "store", work, args), nprocs=world_size, start_method="forkserver"
        )


def _rank(rank: int, world_size: int, store: Path, work: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        work(*args)
    finally:
        dist.destroy_process_group()
