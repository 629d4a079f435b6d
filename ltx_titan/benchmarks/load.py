"""Times the streamed, sharded load of a checkpoint, next to one sequential read of its file.

    torchrun --nproc-per-node 4 -m ltx_titan.benchmarks.load FILE [--out rows.jsonl] [--tp 1] [--dp-replicate 1]

Two rounds: with the file evicted from the page cache, then with as much of it cached as fits in memory. In each, rank 0
first reads the file sequentially; then, from the same state of the cache, all ranks build the model, shard it and
stream their slices into it, as a job does. `ltx-titan make-checkpoint` writes a file of the real size. Host memory is
anonymous memory (RssAnon), sampled while loading; mapped pages of the checkpoint are not included, since the kernel can
reclaim them at any time.
"""

import ctypes
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.build import load_transformer
from ltx_titan.common.logs import quiet_libraries
from ltx_titan.common.options import Maybe, Positional, parse_options
from ltx_titan.common.tensors import free_device_memory, local
from ltx_titan.config import JobConfig, build_job
from ltx_titan.parallel.mesh import build_mesh, init_distributed
from ltx_titan.plan import Plan, plan_job

_GIB = 2**30
_CHUNK = 16 * 2**20
_SAMPLE_S = 0.02


@dataclass(frozen=True)
class LoadOptions:
    """Options of the load benchmark."""

    file: Positional[Path]
    """Official checkpoint, or one written by `ltx-titan make-checkpoint`."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    tp: int = 1
    """Tensor-parallel ranks."""

    dp_replicate: int = 1
    """Replicas of the sharded model."""


def anonymous_bytes() -> int:
    """Resident memory of this process that no file backs, in bytes.

    Raises:
        ValueError: the kernel does not report it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/self/status has no RssAnon; this benchmark needs Linux 4.5 or newer.")


@contextmanager
def peak_anonymous_bytes() -> Iterator[list[int]]:
    """Yields a list whose one element is the peak of `anonymous_bytes` within the context."""
    peak, done = [anonymous_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLE_S):
            peak[0] = max(peak[0], anonymous_bytes())

    # A daemon: an error in the load must not leave the process waiting for it.
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes())


def drop_from_cache(path: Path) -> None:
    """Asks the kernel to evict a file from the page cache; mapped and dirty pages stay."""
    with path.open("rb") as file:
        # Dirty pages cannot be evicted, and the file may just have been written.
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(path: Path) -> float:
    """Fraction of the pages of a file that are in the page cache.

    Raises:
        OSError: `mincore` failed.
    """
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * pages)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    # A private mapping, since ctypes needs a writable buffer to take its address; it is never written to.
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        status = libc.mincore(ctypes.addressof(start), size, resident)
        # Before the mapping is closed, which fails while a pointer into it exists.
        del start
    if status:
        raise OSError(ctypes.get_errno(), f"mincore of {path} failed")
    # Only the lowest bit of each byte is defined.
    return sum(page & 1 for page in resident) / pages


def read_once(path: Path) -> float:
    """Seconds of a sequential read of a file."""
    buffer = memoryview(bytearray(_CHUNK))
    started = time.perf_counter()
    # Unbuffered, into one buffer: no second copy in Python.
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - started


def load_job_for(path: Path, options: LoadOptions, folder: str) -> JobConfig:
    """A full fine-tuning job for the checkpoint on synthetic data."""
    axes = {"dp_replicate": options.dp_replicate, "tp": options.tp}
    world = dist.get_world_size()
    tables = {
        "job": {"dump_folder": folder},
        "model": {"checkpoint_path": str(path)},
        "data": {"source": "synthetic"},
        "video": {"is_generated": True, "latents_dir": "latents"},
        "audio": {"is_generated": True, "latents_dir": "audio_latents"},
        "training": {"global_batch_size": max(world // options.tp, 1)},
        "parallelism": axes,
    }
    return build_job(tables, "load benchmark")


def measure(plan: Plan, path: Path, cold: bool) -> dict[str, Any]:
    """Runs one round; called on every rank, the row of rank 0 counts."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    mesh = build_mesh(device.type, plan.degrees)
    is_main = dist.get_rank() == 0
    row: dict[str, Any] = {"page_cache": "cold" if cold else "warm"}
    if is_main:
        if cold:
            drop_from_cache(path)
        row["cached_before_read"] = cached_share(path)
        row["read_once_s"] = read_once(path)
        if cold:
            drop_from_cache(path)
        # Recorded, because eviction is only a request: a row shows how cold the file was.
        row["cached_before_load"] = cached_share(path)
    # All ranks start together, after rank 0 has prepared the cache.
    dist.barrier()
    before = anonymous_bytes()
    started = time.perf_counter()
    with peak_anonymous_bytes() as peak:
        model = load_transformer(plan, mesh, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        own_s = time.perf_counter() - started
        dist.barrier()
        load_s = time.perf_counter() - started
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {"load_s": own_s, "host_gib": peak[0] / _GIB, "host_before_gib": before / _GIB})
    row |= {
        "load_s": load_s,
        "peak_host_gib": max(rank["host_gib"] for rank in ranks),
        "weights_per_rank_gib": sum(local(p).nbytes for p in model.parameters()) / _GIB,
        "ranks": ranks,
    }
    if is_main:
        row["load_over_read"] = load_s / row["read_once_s"]
    del model
    free_device_memory()
    return row


def main(argv: list[str] | None = None) -> int:
    """Runs both rounds; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    options = parse_options(LoadOptions, arguments, prog="ltx_titan.benchmarks.load", description=__doc__)
    quiet_libraries()
    path = options.file.resolve()
    device = init_distributed()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_job(load_job_for(path, options, folder), dist.get_world_size())
        common = {
            **environment(device),
            "file_gb": path.stat().st_size / 1e9,
            "mesh": vars(plan.degrees),
            "host_memory_gb": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9,
        }
        for cold in (True, False):
            rows.append({**common, **measure(plan, path, cold)})
            if dist.get_rank() == 0:
                print(_line(rows[-1]), flush=True)
                write_rows(options.out, rows)
    dist.destroy_process_group()
    return 0


def _line(row: dict) -> str:
    return (
        f"{row['page_cache']}: read once {row['read_once_s']:.1f} s ({row['cached_before_read']:.0%} cached), "
        f"load {row['load_s']:.1f} s ({row['cached_before_load']:.0%} cached), {row['load_over_read']:.2f} x; "
        f"host memory {row['peak_host_gib']:.2f} GiB a rank at most, {row['weights_per_rank_gib']:.2f} GiB of weights"
    )


if __name__ == "__main__":
    sys.exit(main())
