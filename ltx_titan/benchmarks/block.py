"""Times a transformer block in training: (4 layers - 1 layer) / 3 of forward and backward, bfloat16, no recomputation.

    ltx-titan bench block [--providers triton torch diffusers] [--tokens 4032 16128] [--timesteps 1 2] [--out FILE]

Reports ms, TFLOP/s and MFU a layer (formula: ltx_titan/metrics/flops.py), peak memory and its growth per layer
(activations and gradients; weights of all layers are there throughout), the kernels' time by kind, and the share of the
step in which the device waits for the host. `triton` and `torch` are our blocks, compiled, with fused kernels and with
plain operations; `diffusers` is LTX2VideoTransformer3DModel, compiled per block, in the same run.

Medians of 6 steps after 2; the spread is (largest - smallest) / median of the four-layer step.
"""

import argparse
import gc
import json
import sys
import time
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from ltx_titan.benchmarks.block_models import AUDIO_TOKENS, TEXT_TOKENS, BlockModel, diffusers_model, our_model
from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.checkpoint.shapes import released_config
from ltx_titan.metrics.flops import layer_flops

DESCRIPTION = __doc__

LAYERS = 4
_WARMUP, _STEPS = 2, 6
_GIB = 2**30

# Dense bfloat16 of an H100 or H200 SXM.
_PEAK_TFLOPS = 989.0

_KINDS = {
    "attention": ("fmha", "flash", "sdpa", "attention"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk"),
    "fused": ("_forward_kernel", "_backward_kernel", "_sum_partials_kernel"),
}


def measure(
    model: BlockModel, transformer: dict, tokens: int, peak_tflops: float, device: torch.device
) -> dict[str, object]:
    """The row of one model."""
    steps = {count: _time_steps(model, count, device) for count in (LAYERS, 1)}
    (many_ms, many_gib), (one_ms, one_gib) = ((median(times), peak) for times, peak in steps.values())
    layer_ms = (many_ms - one_ms) / (LAYERS - 1)
    counts = {"video_tokens": tokens, "audio_tokens": AUDIO_TOKENS, "text_tokens": TEXT_TOKENS}
    tflop = layer_flops(transformer, **counts).total / 1e12
    times = steps[LAYERS][0]
    row = {
        "layer_ms": layer_ms,
        "tflops": tflop / layer_ms * 1e3,
        "mfu": tflop / layer_ms * 1e3 / peak_tflops,
        "step_ms": many_ms,
        "outside_ms": one_ms - layer_ms,
        "spread": (max(times) - min(times)) / many_ms,
        "peak_gib": many_gib,
        "growth_gib": (many_gib - one_gib) / (LAYERS - 1),
    }
    if device.type == "cuda":
        many, one = _profile(model, LAYERS), _profile(model, 1)
        many.subtract(one)
        per_layer = {name: ms / (LAYERS - 1) for name, ms in many.items()}
        kinds: Counter[str] = Counter()
        for name, ms in per_layer.items():
            kinds[_kind(name)] += ms
        row["kernel_ms"] = {**kinds, "sum": sum(kinds.values())}
        row["host_gap"] = 1 - sum(kinds.values()) / layer_ms
        row["largest_kernels_ms"] = dict(sorted(per_layer.items(), key=lambda item: -item[1])[:40])
    return row


def _time_steps(model: BlockModel, count: int, device: torch.device) -> tuple[list[float], float]:
    """Milliseconds of each step, and the peak memory of one in GiB."""
    times = []
    for number in range(_WARMUP + _STEPS):
        for parameter in model.parameters():
            parameter.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        model.step(count)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= _WARMUP:
            times.append((time.perf_counter() - started) * 1e3)
    peak = torch.cuda.max_memory_allocated() / _GIB if device.type == "cuda" else 0.0
    return times, peak


def _profile(model: BlockModel, count: int) -> Counter[str]:
    """Milliseconds of every kernel in one step."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        model.step(count)
        torch.cuda.synchronize()
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name] += event.time_range.elapsed_us() / 1e3
    return found


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
    parser.add_argument("--budget", type=float, default=500, help="seconds after which the rest is skipped")


def run(arguments: argparse.Namespace) -> int:
    """Measures every combination; one that fails is reported and the next goes on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = released_config(arguments.shape)["transformer"]
    common = {**environment(device), "shape": arguments.shape, "dtype": "bfloat16"}
    started = time.monotonic()
    rows, failures = [], 0
    print(f"{'provider':10} tokens steps |  ms/layer  TFLOP/s   MFU | growth  peak GiB | kernels ms | host gap spread")
    for tokens, timesteps, provider in product(arguments.tokens, arguments.timesteps, arguments.providers):
        if provider == "diffusers" and timesteps > 1:
            continue  # it computes a row for every token, however many are distinct
        row = {**common, "provider": provider, "tokens": tokens, "timesteps": timesteps}
        rows.append(row)
        if time.monotonic() - started > arguments.budget:
            row["skipped"] = "budget used up"
            continue
        try:
            if provider == "diffusers":
                model = diffusers_model(transformer, LAYERS, tokens, device)
            else:
                model = our_model(provider, transformer, LAYERS, tokens, timesteps, device)
            row.update(measure(model, transformer, tokens, arguments.peak_tflops, device))
            _print_row(row)
        # A missing library or a compiler error in one must not cost the others' measurements.
        except Exception as error:
            failures += 1
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{provider} {tokens} FAILED {row['error'][:300]}", flush=True)
        model = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        row["seconds"] = time.monotonic() - started
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
        f"{row.get('host_gap', 0):.1%} {row['spread']:.1%}",
    )
    print(" | ".join(cells), flush=True)


def main() -> int:
    """Runs as `python -m ltx_titan.benchmarks.block`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
