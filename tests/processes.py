"""Runs a function on several gloo ranks of this machine."""

import faulthandler
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ltx_titan.common.gloo import use_one_gloo_thread

# Far longer than any test needs on a busy machine, and far shorter than gloo's own limit of half an hour.
_LIMIT_S = 600

# One server imports the modules that ranks need and forks them: milliseconds instead of seconds per rank.
multiprocessing.set_forkserver_preload(
    [
        "ltx_titan.train",
        "tests.jobs",
        "tests.fault_injection",
        "tests.checkpoint.toy",
        "tests.parallel.harness",
        "matplotlib.figure",
        "tests.frozen",
    ]
)


def run_ranks(work: Callable[..., object], world_size: int, *args: object) -> list:
    """Runs `work(*args)` on `world_size` ranks and returns what each returned; fails if it fails on any of them.

    Ranks that do not end in ten minutes print their stacks and fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _process, (world_size, Path(folder), work, args), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_here(work: Callable[..., object], *args: object) -> None:
    """Runs `work(*args)` as the only rank, in this process: a second job takes half the time of a new process."""
    with tempfile.TemporaryDirectory() as folder:
        _rank(0, 1, Path(folder), work, args)


def wait_while_running(process: BaseProcess, condition: Callable[[], bool]) -> None:
    """Waits until `condition` holds, however busy the machine is; fails if the process ends before."""
    while not condition():
        assert process.is_alive(), f"exited with {process.exitcode} too early"
        time.sleep(0.01)


def _empty_plot(metrics_jsonl: Path, png: Path, *, title: str) -> None:
    png.touch()


def _process(*args: Any) -> None:
    # A rank that native code aborts says where.
    faulthandler.enable()
    faulthandler.dump_traceback_later(_LIMIT_S, exit=True)
    _rank(*args)


def _rank(rank: int, world_size: int, folder: Path, work: Callable[..., object], args: tuple) -> None:
    torch.set_num_threads(1)
    use_one_gloo_thread()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        # Drawing the loss curve takes as long as a step. It has tests of its own, and jobs of the launcher draw it.
        with patch("ltx_titan.metrics.summary.plot_loss", _empty_plot):
            torch.save(work(*args), folder / f"{rank}.pt")
    finally:
        if dist.is_initialized():  # a command ends its group itself
            dist.destroy_process_group()
