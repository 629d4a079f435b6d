"""Shared by the benchmarks: timing by CUDA graph replay, measured copy bandwidth, and the environment of a row.

A graph of many calls is replayed, which excludes launch overhead; calls rotate over input sets that together are
several times the size of the L2 cache. On a CPU the same functions use the clock, to test a benchmark.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from ltx_titan.common.files import write_text

# A replay should take much longer than the resolution of events and the launch of the graph.
_TARGET_MS = 6.0
_REPLAYS = 5


def time_ms(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median milliseconds of one call; `calls` are the same operation on different inputs, called in rotation."""
    for call in calls:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1e3 / len(calls)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):  # warm up on the stream of the capture
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    rounds = max(1, round(_TARGET_MS / max(_once_ms(calls), 1e-3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    # Once untimed: the first replay uploads the graph.
    graph.replay()
    times = [_once_ms([graph.replay]) for _ in range(_REPLAYS)]
    # Frees the graph's memory pool, which the next case needs.
    graph.reset()
    return median(times) / (rounds * len(calls))


def _once_ms(calls: Sequence[Callable[[], object]]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def input_sets(bytes_each: int, device: torch.device) -> int:
    """Number of input sets to rotate over, so that none is still cached when it is used again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    # Four times the cache; at most 8 sets, which limits memory.
    return min(8, -(-4 * cache // bytes_each))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus written per second for 1 GiB: the faster of the driver's copy and an elementwise kernel.

    In a CUDA graph the copy of the driver reaches four fifths of the bandwidth of a kernel on an H100.
    """
    size = 2**30 if device.type == "cuda" else 2**20
    source = torch.randint(0, 255, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * size / (min(time_ms([way], device) for way in ways) * 1e-3)


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions, commit, command and date, for every row.

    The commit is that of the checkout, or LTX_TITAN_COMMIT for a copy without history.
    """
    commit = os.environ.get("LTX_TITAN_COMMIT")
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "triton": version("triton") if find_spec("triton") else "none",
        "commit": commit,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_rows(path: Path | None, rows: Sequence[dict]) -> None:
    """Writes rows as JSON lines and replaces an existing file; does nothing without a path."""
    if path is not None:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
