"""Splits a profiled training step by what the device did: kernels by class, collectives, copies, idle time.

Reads a trace of torch's profiler. Two times are given for each class: the sum of its kernels, and what of it is
*exposed*: at every moment the step is attributed to one running class, the first of `CLASSES`, so that a collective
during a matmul is hidden and exposed times add up to the time in which the device was busy.

Classes follow from kernel names, except the optimizer's and clipping's, which follow from where they were launched:
`record_function` ranges on the host. Kernels of a replayed CUDA graph have names but no ranges, and need none: forward
and backward are all that is replayed.

Recomputation is what runs again in the backward pass: kernels of matmuls, attention, fused operations and
Inductor whose names have run in the forward pass. It misses what Inductor has fused into other kernels of the backward
graph (`selective`), which is elementwise work.
"""

import gzip
import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CLIP_RANGE = "ltx_titan::clip"
_OPTIMIZER_RANGE = "Optimizer.step"

# In the order in which a moment is attributed: what computes before what only moves.
CLASSES = (
    "matmul",
    "attention",
    "fused kernels",
    "elementwise",
    "optimizer",
    "clipping",
    "copies",
    "NCCL",
    "peer copies",
    "host copies",
)
# Inductor names a kernel after all operations fused into it, hence its prefix comes first.
_NAMES = (
    ("elementwise", ("triton_",)),
    ("NCCL", ("nccl",)),
    # By copy engines, and the barriers of one block around them: parallel/peer_memory.py.
    ("peer copies", ("memcpy ptop", "barrier_kernel")),
    ("attention", ("fmha", "flash", "sdpa", "cudnn_generated", "attention")),
    ("fused kernels", ("_forward_kernel", "_backward_kernel", "_sum_partials_kernel", "_sum_weights_kernel")),
    ("matmul", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk")),
    # A copy within a device is a kernel `memcpy...` inside a graph.
    (
        "copies",
        ("chunk_cat", "split_with_sizes_copy", "memcpy dtod", "memcpy128", "memcpy32", "copy_kernel", "copyfunctor"),
    ),
    ("host copies", ("memcpy htod", "memcpy dtoh")),
)
_RECOMPUTED = ("matmul", "attention", "fused kernels", "elementwise")
# nvjet's layouts (NTT, NTN: gradients of weights; NNN, NNT: of inputs), cuDNN's and our own names.
_BACKWARD = ("bprop", "_backward_kernel", "_ntt", "_ntn", "_nnn", "_nnt", "backward")


@dataclass
class Share:
    """One class: sum of its kernels, the exposed part of it, and their number."""

    kernel_ms: float = 0.0
    exposed_ms: float = 0.0
    launches: int = 0


@dataclass
class StepTrace:
    """Parts of a step.

    Attributes:
        shares: by class.
        recomputed_ms: kernels that ran again in the backward pass; part of the classes.
        busy_ms: time in which any kernel ran.
        host_launches: kernels, copies and graphs that the host enqueued.
        largest: kernel names with their milliseconds, longest first.
    """

    shares: dict[str, Share]
    recomputed_ms: float
    busy_ms: float
    host_launches: int
    largest: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Kernel:
    name: str
    kind: str
    start: float
    end: float


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Events of a trace file of `metrics.profiling`."""
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def split_step(events: Iterable[dict[str, Any]]) -> StepTrace:
    """Splits the events of one step (one micro-batch); times in a trace are microseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    kernels = sorted(_kernels(events), key=lambda kernel: kernel.start)
    shares = {kind: Share() for kind in CLASSES}
    largest: dict[str, float] = {}
    for kernel in kernels:
        share, ms = shares[kernel.kind], (kernel.end - kernel.start) / 1e3
        share.kernel_ms += ms
        share.launches += 1
        largest[kernel.name] = largest.get(kernel.name, 0.0) + ms
    busy_ms = 0.0
    for kind, ms in _exposed(kernels):
        shares[kind].exposed_ms += ms
        busy_ms += ms
    launches = sum(_is_launch(event) for event in events)
    largest = dict(sorted(largest.items(), key=lambda item: -item[1])[:100])
    return StepTrace(shares, _recomputed_ms(kernels), busy_ms, launches, largest)


def _kernels(events: list[dict[str, Any]]) -> Iterable[_Kernel]:
    ranges = {
        kind: _merged((e["ts"], e["ts"] + e["dur"]) for e in events if _is_range(e, prefix))
        for kind, prefix in (("optimizer", _OPTIMIZER_RANGE), ("clipping", CLIP_RANGE))
    }
    # Where a kernel was launched: its correlation is that of the host's call.
    launched = {e["args"]["correlation"]: e["ts"] for e in events if _is_launch(e) and "correlation" in e["args"]}
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        kind = _kind(event["name"])
        time = launched.get(event["args"].get("correlation"))
        if time is not None and kind in ("elementwise", "copies"):
            kind = next((owner for owner, spans in ranges.items() if _contains(spans, time)), kind)
        yield _Kernel(event["name"], kind, event["ts"], event["ts"] + event["dur"])


def _kind(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in _NAMES if any(part in lowered for part in parts)), "elementwise")


def _is_range(event: dict[str, Any], prefix: str) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(prefix)


def _is_launch(event: dict[str, Any]) -> bool:
    if event.get("cat") not in ("cuda_runtime", "cuda_driver"):
        return False
    return any(part in event["name"] for part in ("Launch", "Memcpy", "Memset"))


def _merged(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _contains(spans: list[tuple[float, float]], time: float) -> bool:
    place = bisect_right(spans, (time, float("inf"))) - 1
    return place >= 0 and spans[place][1] >= time


def _exposed(kernels: list[_Kernel]) -> Iterable[tuple[str, float]]:
    """Pieces of the time in which anything ran, each with the class that it is attributed to, in milliseconds."""
    edges = [(kernel.start, 1, kernel.kind) for kernel in kernels] + [
        (kernel.end, -1, kernel.kind) for kernel in kernels
    ]
    edges.sort(key=lambda edge: edge[0])
    running = dict.fromkeys(CLASSES, 0)
    last = 0.0
    for time, change, kind in edges:
        first = next((owner for owner in CLASSES if running[owner]), None)
        if first is not None and time > last:
            yield first, (time - last) / 1e3
        running[kind] += change
        last = time


def _recomputed_ms(kernels: list[_Kernel]) -> float:
    """Time of the forward pass's kernels after the first kernel of the backward pass."""
    forward: set[str] = set()
    in_backward, total = False, 0.0
    for kernel in kernels:
        if kernel.kind not in _RECOMPUTED:
            continue
        is_backward = any(part in kernel.name.lower() for part in _BACKWARD)
        in_backward = in_backward or is_backward
        if not in_backward:
            forward.add(kernel.name)
        elif kernel.name in forward and not is_backward:
            total += (kernel.end - kernel.start) / 1e3
    return total
