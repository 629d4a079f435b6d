"""Runs a function on several gloo ranks of this machine."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One server imports what the ranks of any test need and forks them: milliseconds instead of seconds for each.
multiprocessing.set_forkserver_preload(
    ["ltx_titan.train", "tests.jobs", "tests.checkpoint.toy", "tests.parallel.harness", "torch._inductor.compile_fx"]
)


def run_ranks(work: Callable[..., object], world_size: int, *args: object) -> list:
    """Runs `work(*args)` on `world_size` ranks and returns what each returned; fails if it fails on any of them."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world_size, Path(folder), work, args), nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: Path, work: Callable[..., object], args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        torch.save(work(*args), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
