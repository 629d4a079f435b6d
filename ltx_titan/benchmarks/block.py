"""Times a transformer block in training: (4 layers - 1 layer) / 3 of forward and backward, bfloat16, no recomputation.

    ltx-titan bench block [--providers triton native tensorwise diffusers] [--tokens 4032 16128] [--out FILE]

Reports ms, TFLOP/s and MFU per layer (formula: ltx_titan/model/flops.py), peak memory and its growth per layer
(activations and gradients; the weights of all layers stay allocated), the time of the kernels by kind, and the fraction
of the step in which the device waits for the host. `triton` and `torch` are our blocks, compiled, with fused kernels
and with plain operations; `native` and `tensorwise` are `triton` with that recipe of float8; `diffusers` is
LTX2VideoTransformer3DModel, compiled per block, in the same run.

Every combination is built and compiled in its own process, all in parallel; then they are timed one by one.

Medians of 16 steps after 4; the spread is (max - min) / median of the four-layer step. `host_ms` is the time in which
the host enqueues the forward and backward of a layer: if it exceeds the sum of the kernels, the device waits. In
`graph ms` the same step is replayed as a CUDA graph, as training runs it, on any host; not for diffusers.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from ltx_titan.benchmarks.block_models import AUDIO_TOKENS, TEXT_TOKENS, BlockModel, diffusers_model, our_model
from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.turns import in_turns
from ltx_titan.common.options import Flag, Maybe
from ltx_titan.common.titan import peak_flops
from ltx_titan.config import Float8Recipe
from ltx_titan.model import TransformerConfig
from ltx_titan.model.flops import layer_flops
from ltx_titan.model.kernel_ops import KernelBackend
from ltx_titan.weights.shapes import released_config

DESCRIPTION = __doc__

LAYERS = 4
_WARMUP, _STEPS = 4, 16
_GIB = 2**30

Provider = Literal["triton", "torch", "native", "tensorwise", "diffusers"]

_OURS: dict[str, tuple[KernelBackend, Float8Recipe]] = {
    "triton": ("triton", "none"),
    "torch": ("torch", "none"),
    "native": ("triton", "native"),
    "tensorwise": ("triton", "tensorwise"),
}

# First match wins: Inductor names its kernels after all operations that it fused, including attention.
_KINDS = {
    "elementwise": ("triton_",),
    "attention": ("fmha", "flash", "sdpa", "cudnn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "fused": ("_forward_kernel", "_backward_kernel", "_sum_partials_kernel", "_sum_weights_kernel"),
}


@dataclass(frozen=True)
class BlockOptions:
    """Options of `ltx-titan bench block`."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    shape: str = "ltx-2.3-22b"
    """Released model, or JSON file with checkpoint metadata."""

    tokens: tuple[int, ...] = (4_032, 16_128)
    """Numbers of video tokens."""

    timesteps: tuple[Literal[1, 2], ...] = (1,)
    """Numbers of distinct timesteps in a clip."""

    providers: tuple[Provider, ...] = ("triton", "diffusers")
    """Implementations to compare."""

    peak_tflops: Maybe[float] = None
    """Denominator of MFU. Default: the peak of this GPU, if it is known."""

    no_profile: Flag = False
    """Skip the split of the time by kernel, which takes long."""


def run(options: BlockOptions) -> int:
    """Measures every combination; one that fails is reported, and the exit status is then 1."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = released_config(options.shape)["transformer"]
    peak_tflops = options.peak_tflops
    if peak_tflops is None and (peak := peak_flops(torch.cuda.get_device_name() if device.type == "cuda" else None)):
        peak_tflops = peak / 1e12
    cases = [
        Case(provider, tokens, timesteps, transformer, peak_tflops, not options.no_profile)
        for tokens, timesteps, provider in product(options.tokens, options.timesteps, options.providers)
        # diffusers computes modulation for every token, whatever the number of distinct timesteps.
        if provider != "diffusers" or timesteps == 1
    ]
    common = {**environment(device), "shape": options.shape, "dtype": "bfloat16"}
    rows: list[dict[str, Any]] = []
    failures = 0
    print(
        f"{'provider':10} tokens steps |  ms/layer  TFLOP/s   MFU | graph ms   MFU | growth  peak GiB | kernels ms "
        "| host ms | device idle | spread | compile s"
    )
    for case, result in zip(cases, in_turns([partial(measure, case, device) for case in cases], device), strict=True):
        row: dict[str, Any] = {**common, "provider": case.provider, "tokens": case.tokens, "timesteps": case.timesteps}
        rows.append(row)
        if isinstance(result, Exception):
            failures += 1
            row["error"] = str(result)
            print(f"{case.provider} {case.tokens} x{case.timesteps} FAILED {row['error'][:600]}", flush=True)
        else:
            row.update(result)
            _print_row(row)
        # After every case: a machine that is lost keeps the rows of those before.
        write_rows(options.out, rows)
    for row in rows:
        if "largest_kernels_ms" in row:
            label = f"{row['provider']} {row['tokens']} x{row['timesteps']}"
            top = {name[:48]: round(ms, 3) for name, ms in list(row["largest_kernels_ms"].items())[:14]}
            print(f"{label} kernels per layer, ms: {json.dumps(top)}")
    return 1 if failures else 0


@dataclass(frozen=True)
class Case:
    """One combination of options."""

    provider: Provider
    tokens: int
    timesteps: int
    transformer: dict
    peak_tflops: float | None
    is_profiled: bool


def measure(case: Case, device: torch.device, take_turn: Callable[[], None]) -> dict[str, Any]:
    """Measures one case; returns its row."""
    if case.provider == "diffusers":
        model = diffusers_model(case.transformer, LAYERS, case.tokens, device)
    else:
        backend, recipe = _OURS[case.provider]
        model = our_model(backend, case.transformer, LAYERS, case.tokens, case.timesteps, device, recipe)
    if device.type == "cuda":
        # Compiling one layer compiles them all; the others stay in host memory, since all cases share one device.
        model.blocks[1:].cpu()
        started = time.perf_counter()
        model.step(1)
        compile_s = time.perf_counter() - started
        for parameter in model.parameters():
            parameter.grad = None
    take_turn()
    model.blocks.to(device)
    steps = {count: _time_steps(model, count, device) for count in (LAYERS, 1)}
    (many_ms, many_gib, many_host), (one_ms, one_gib, one_host) = (
        (median(times), peak, median(host)) for times, peak, host in steps.values()
    )
    # The difference removes what is outside the layers: embeddings, AdaLN, head and loss.
    layer_ms = (many_ms - one_ms) / (LAYERS - 1)
    config = TransformerConfig.from_metadata(case.transformer)
    flops = layer_flops(config, video_tokens=case.tokens, audio_tokens=AUDIO_TOKENS, text_tokens=TEXT_TOKENS)
    tflop = flops.total / 1e12
    times = steps[LAYERS][0]
    row: dict[str, Any] = {
        "layer_ms": layer_ms,
        "tflops": tflop / layer_ms * 1e3,
        "mfu": tflop / layer_ms * 1e3 / case.peak_tflops if case.peak_tflops else None,
        "step_ms": many_ms,
        "outside_ms": one_ms - layer_ms,
        "host_ms": (many_host - one_host) / (LAYERS - 1),
        "spread": (max(times) - min(times)) / many_ms,
        "peak_gib": many_gib,
        "growth_gib": (many_gib - one_gib) / (LAYERS - 1),
    }
    if device.type == "cuda":
        row["compile_s"] = compile_s
        if case.provider != "diffusers":
            # As training runs our blocks; diffusers' forward pass copies from the host.
            many_graph, one_graph = (_time_replays(model, count) for count in (LAYERS, 1))
            graph_ms = (median(many_graph) - median(one_graph)) / (LAYERS - 1)
            row["graph_layer_ms"] = graph_ms
            row["graph_mfu"] = tflop / graph_ms * 1e3 / case.peak_tflops if case.peak_tflops else None
            row["graph_spread"] = (max(many_graph) - min(many_graph)) / median(many_graph)
    if device.type == "cuda" and case.is_profiled:
        (many, many_launches), (one, one_launches) = _profile(model, LAYERS), _profile(model, 1)
        many.subtract(one)
        row["launches"] = (many_launches - one_launches) / (LAYERS - 1)
        per_layer = {name: ms / (LAYERS - 1) for name, ms in many.items()}
        kinds: defaultdict[str, float] = defaultdict(float)
        for name, ms in per_layer.items():
            kinds[_kind(name)] += ms
        row["kernel_ms"] = {**kinds, "sum": sum(kinds.values())}
        row["host_gap"] = 1 - sum(kinds.values()) / layer_ms
        row["largest_kernels_ms"] = dict(sorted(per_layer.items(), key=lambda item: -item[1])[:100])
    return row


def _time_steps(model: BlockModel, count: int, device: torch.device) -> tuple[list[float], float, list[float]]:
    """Milliseconds of each step, peak memory of a step in GiB, and milliseconds until the host was done."""
    times, host = [], []
    for number in range(_WARMUP + _STEPS):
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model.step(count)
        # Before the synchronization: until here the host was busy, after it the device.
        enqueued = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= _WARMUP:
            host.append((enqueued - started) * 1e3)
            times.append((time.perf_counter() - started) * 1e3)
    peak = torch.cuda.max_memory_allocated() / _GIB if device.type == "cuda" else 0.0
    return times, peak, host


def _time_replays(model: BlockModel, count: int) -> list[float]:
    """Milliseconds of each replay of a step as a CUDA graph, which no host delays."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up on the stream of the capture
        model.step(count)
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        model.step(count)
    times = []
    for number in range(_WARMUP + _STEPS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= _WARMUP:
            times.append(start.elapsed_time(end))
    for parameter in model.parameters():
        parameter.grad = None
    graph.reset()
    return times


def _profile(model: BlockModel, count: int) -> tuple[Counter[str], int]:
    """Milliseconds of every kernel in one step, and the number of kernel launches."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    # Without CPU activities: recording them would slow the host, and only the kernels' times are used.
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model.step(count)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    launches = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.time_range.elapsed_us() / 1e3
            launches += 1
    return found, launches


def _kind(kernel: str) -> str:
    lowered = kernel.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in lowered for part in parts)), "elementwise")


def _print_row(row: dict) -> None:
    kernels = row.get("kernel_ms", {})
    mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
    split = " ".join(f"{kind} {ms:.2f}" for kind, ms in kernels.items())
    cells = (
        f"{row['provider']:10} {row['tokens']:>6} {row['timesteps']:>5}",
        f"{row['layer_ms']:>9.2f} {row['tflops']:>8.0f} {mfu:>6}",
        f"{row['graph_layer_ms']:>8.2f} {row['graph_mfu'] or 0:>6.1%}"
        if "graph_layer_ms" in row
        else "              -",
        f"{row['growth_gib']:>6.2f} {row['peak_gib']:>9.1f}",
        split,
        f"{row['host_ms']:.2f} | {row.get('host_gap', 0):.1%} | {row['spread']:.1%} | {row.get('compile_s', 0):.0f}",
    )
    print(" | ".join(cells), flush=True)
