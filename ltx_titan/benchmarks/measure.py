"""Timing that the benchmarks share: replayed CUDA graphs, measured copy bandwidth, and what identifies a row.

A graph of many calls is replayed, so that the host's launch time stays out; calls rotate over input sets that together
are several times the cache. On a CPU the same functions time by the clock, to try a benchmark out.
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

# A graph replay should be long against the event resolution and the launch of the graph itself.
_TARGET_MS = 6.0
_REPLAYS = 5


def time_ms(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median milliseconds of one call; `calls` do the same on different inputs and take turns."""
    for call in calls:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1e3 / len(calls)
    stream = torch.cuda.Stream(device)
    torch.cuda.synchronize(device)
    with torch.cuda.stream(stream):  # warm up where the capture will run
        for call in calls:
            call()
    torch.cuda.synchronize(device)
    rounds = max(1, round(_TARGET_MS / max(_once_ms(calls), 1e-3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = [_once_ms([graph.replay]) for _ in range(_REPLAYS)]
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
    """How many input sets to rotate over, so that none is still in the cache when its turn comes again."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(8, -(-4 * cache // bytes_each))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read plus bytes written a second, of 1 GiB: the better of the driver's copy and of an elementwise kernel.

    In a CUDA graph the driver copies an H100's memory at four fifths of what a kernel reaches.
    """
    size = 2**30 if device.type == "cuda" else 2**20
    source = torch.randint(0, 255, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.bitwise_not(source, out=target))
    return 2 * size / (min(time_ms([way], device) for way in ways) * 1e-3)


def environment(device: torch.device) -> dict[str, str]:
    """What a row's numbers depend on besides its own fields.

    The commit is that of the checkout, or LTX_TITAN_COMMIT where a copy without history runs.
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
    """One JSON object a line, replacing what is there."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(path)
