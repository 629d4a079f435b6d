"""Times a transformer block in training: (4 layers - 1 layer) / 3 of forward and backward, bfloat16, no recomputation.

    ltx-titan bench block [--providers triton torch diffusers] [--tokens 4032 16128] [--timesteps 1 2] [--out FILE]

Reports ms, TFLOP/s and MFU a layer (formula: ltx_titan/model/flops.py), peak memory and its growth per layer
(activations and gradients; weights of all layers are there throughout), the kernels' time by kind, and the share of the
step in which the device waits for the host. `triton` and `torch` are our blocks, compiled, with fused kernels and with
plain operations; `diffusers` is LTX2VideoTransformer3DModel, compiled per block, in the same run.

Every combination is built and compiled in a process of its own, all at once; then they are timed one by one.

Medians of 16 steps after 4; the spread is (largest - smallest) / median of the four-layer step. `host_ms` is what the
host takes to enqueue a layer's forward and backward: where it exceeds the kernels' sum, the device waits.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from ltx_titan.benchmarks.block_models import AUDIO_TOKENS, TEXT_TOKENS, BlockModel, diffusers_model, our_model
from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.turns import in_turns
from ltx_titan.model.flops import layer_flops
from ltx_titan.weights.shapes import released_config

DESCRIPTION = __doc__

LAYERS = 4
_WARMUP, _STEPS = 4, 16
_GIB = 2**30

# Dense bfloat16 of an H100 or H200 SXM.
_PEAK_TFLOPS = 989.0

# Inductor's kernels are named after all the operations that they took in, also of attention.
_KINDS = {
    "elementwise": ("triton_",),
    "attention": ("fmha", "flash", "sdpa", "cudnn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "fused": ("_forward_kernel", "_backward_kernel", "_sum_partials_kernel", "_sum_weights_kernel"),
}


@dataclass(frozen=True)
class Case:
    """One combination of what is compared."""

    provider: str
    tokens: int
    timesteps: int
    transformer: dict
    peak_tflops: float
    is_profiled: bool


def measure(case: Case, device: torch.device, take_turn: Callable[[], None]) -> dict[str, object]:
    """The row of one case."""
    if case.provider == "diffusers":
        model = diffusers_model(case.transformer, LAYERS, case.tokens, device)
    else:
        model = our_model(case.provider, case.transformer, LAYERS, case.tokens, case.timesteps, device)
    if device.type == "cuda":
        # One layer compiles them all; the others wait in the host's memory, for all cases wait on one device.
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
    layer_ms = (many_ms - one_ms) / (LAYERS - 1)
    counts = {"video_tokens": case.tokens, "audio_tokens": AUDIO_TOKENS, "text_tokens": TEXT_TOKENS}
    tflop = layer_flops(case.transformer, **counts).total / 1e12
    times = steps[LAYERS][0]
    row = {
        "layer_ms": layer_ms,
        "tflops": tflop / layer_ms * 1e3,
        "mfu": tflop / layer_ms * 1e3 / case.peak_tflops,
        "step_ms": many_ms,
        "outside_ms": one_ms - layer_ms,
        "host_ms": (many_host - one_host) / (LAYERS - 1),
        "spread": (max(times) - min(times)) / many_ms,
        "peak_gib": many_gib,
        "growth_gib": (many_gib - one_gib) / (LAYERS - 1),
    }
    if device.type == "cuda":
        row["compile_s"] = compile_s
    if device.type == "cuda" and case.is_profiled:
        (many, many_launches), (one, one_launches) = _profile(model, LAYERS), _profile(model, 1)
        many.subtract(one)
        row["launches"] = (many_launches - one_launches) / (LAYERS - 1)
        per_layer = {name: ms / (LAYERS - 1) for name, ms in many.items()}
        kinds: Counter[str] = Counter()
        for name, ms in per_layer.items():
            kinds[_kind(name)] += ms
        row["kernel_ms"] = {**kinds, "sum": sum(kinds.values())}
        row["host_gap"] = 1 - sum(kinds.values()) / layer_ms
        row["largest_kernels_ms"] = dict(sorted(per_layer.items(), key=lambda item: -item[1])[:100])
    return row


def _time_steps(model: BlockModel, count: int, device: torch.device) -> tuple[list[float], float, list[float]]:
    """Milliseconds of each step, the peak memory of one in GiB, and the milliseconds until the host was done."""
    times, host = [], []
    for number in range(_WARMUP + _STEPS):
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model.step(count)
        enqueued = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= _WARMUP:
            host.append((enqueued - started) * 1e3)
            times.append((time.perf_counter() - started) * 1e3)
    peak = torch.cuda.max_memory_allocated() / _GIB if device.type == "cuda" else 0.0
    return times, peak, host


def _profile(model: BlockModel, count: int) -> tuple[Counter[str], int]:
    """Milliseconds of every kernel in one step, and the number of launches."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, help="write rows as JSON lines")
    parser.add_argument("--shape", default="ltx-2.3-22b", help="released shape, or metadata file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4_032, 16_128], help="video tokens")
    parser.add_argument("--timesteps", type=int, nargs="+", choices=[1, 2], default=[1], help="distinct ones of a clip")
    parser.add_argument(
        "--providers", nargs="+", choices=["triton", "torch", "diffusers"], default=["triton", "diffusers"]
    )
    parser.add_argument("--peak-tflops", type=float, default=_PEAK_TFLOPS, help="denominator of MFU")
    parser.add_argument("--no-profile", action="store_true", help="no split of the time into kernels, which takes long")


def run(arguments: argparse.Namespace) -> int:
    """Measures every combination; one that fails is reported and the others go on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = released_config(arguments.shape)["transformer"]
    cases = [
        Case(provider, tokens, timesteps, transformer, arguments.peak_tflops, not arguments.no_profile)
        for tokens, timesteps, provider in product(arguments.tokens, arguments.timesteps, arguments.providers)
        # diffusers computes a row for every token, however many are distinct.
        if provider != "diffusers" or timesteps == 1
    ]
    common = {**environment(device), "shape": arguments.shape, "dtype": "bfloat16"}
    rows, failures = [], 0
    print(
        f"{'provider':10} tokens steps |  ms/layer  TFLOP/s   MFU | growth  peak GiB | kernels ms "
        "| host ms | device idle | spread | compile s"
    )
    for case, result in zip(cases, in_turns([partial(measure, case, device) for case in cases], device), strict=True):
        row = {**common, "provider": case.provider, "tokens": case.tokens, "timesteps": case.timesteps}
        rows.append(row)
        if isinstance(result, Exception):
            failures += 1
            row["error"] = str(result)
            print(f"{case.provider} {case.tokens} x{case.timesteps} FAILED {row['error'][:600]}", flush=True)
        else:
            row.update(result)
            _print_row(row)
        write_rows(arguments.out, rows)
    for row in rows:
        if "largest_kernels_ms" in row:
            label = f"{row['provider']} {row['tokens']} x{row['timesteps']}"
            top = {name[:48]: round(ms, 3) for name, ms in list(row["largest_kernels_ms"].items())[:14]}
            print(f"{label} kernels a layer, ms: {json.dumps(top)}")
    return 1 if failures else 0


def _print_row(row: dict) -> None:
    kernels = row.get("kernel_ms", {})
    split = " ".join(f"{kind} {ms:.2f}" for kind, ms in kernels.items())
    cells = (
        f"{row['provider']:10} {row['tokens']:>6} {row['timesteps']:>5}",
        f"{row['layer_ms']:>9.2f} {row['tflops']:>8.0f} {row['mfu']:>6.1%}",
        f"{row['growth_gib']:>6.2f} {row['peak_gib']:>9.1f}",
        split,
        f"{row['host_ms']:.2f} | {row.get('host_gap', 0):.1%} | {row['spread']:.1%} | {row.get('compile_s', 0):.0f}",
    )
    print(" | ".join(cells), flush=True)


def main() -> int:
    """Runs as `python -m ltx_titan.benchmarks.block`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
