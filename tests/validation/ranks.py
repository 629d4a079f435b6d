"""Runs a function on several gloo ranks of this machine and returns what each of them returned."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server imports torch once and forks the ranks.
multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "ltx_titan.validation", "ltx_titan.parallel"])


def run_ranks(work: Callable[..., object], world_size: int, *args: object) -> list:
    """Runs `work(*args)` on `world_size` ranks; fails if it fails on any of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world_size, folder, work, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, work: Callable[..., object], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(work(*args), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
