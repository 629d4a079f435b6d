"""Times LoRA steps of diffusers' transformer with PEFT's adapters, the peer of a job that `benchmarks.train` times.

    python -m ltx_titan.benchmarks.peer_lora docs/benchmarks/ltx23_lora_step.toml --out peer.jsonl

The job gives shape, layers, rank, targets, tokens and learning rate; one clip a step on one GPU, random weights. The
peer is what its users would write: blocks compiled one by one, all of them recomputed in the backward pass (their
activations do not fit 80 GB), float32 adapters under bfloat16 autocast, torch's fused AdamW, clipped gradients. Times
are those of the host, which waits for the device after every step. FLOPs are those of the job, so that MFU compares.
The row is written after every step.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ltx_titan.benchmarks.block_models import build_diffusers, compile_blocks, dense_loss, diffusers_inputs
from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.benchmarks.train import STARTED
from ltx_titan.common.hardware import GIB
from ltx_titan.common.logs import quiet_libraries
from ltx_titan.common.options import Maybe, Overrides, Positional, parse_options
from ltx_titan.common.titan import peak_flops
from ltx_titan.config import load_job
from ltx_titan.data.dataset import stream_tokens
from ltx_titan.lora.targets import PRESETS
from ltx_titan.plan import Plan, plan_job

# Compilation, and the allocator's first rounds.
_WARMUP = 3
_MAX_NORM = 1.0


@dataclass(frozen=True)
class PeerOptions:
    """Options of the peer's benchmark."""

    job: Positional[Path]
    """Job file of LoRA training on synthetic clips."""

    out: Maybe[Path] = None
    """File for the row, as JSON lines."""

    steps: int = 12
    """Steps, of which the first three are not timed."""

    overrides: Overrides = ()
    """Overrides of the job."""


def peer_model(plan: Plan, device: torch.device) -> Any:
    """Diffusers' transformer of a job, frozen, with adapters in float32.

    Raises:
        ImportError: diffusers or peft is not installed.
    """
    from peft import LoraConfig

    lora = plan.job.lora
    model = build_diffusers(plan.source.config["transformer"], plan.architecture.num_layers, device)
    model.requires_grad_(False)
    endings = [ending for target in lora.targets for ending in PRESETS.get(target, (target,))]
    model.add_adapter(LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules=endings))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.enable_gradient_checkpointing()
    model.train()
    if device.type == "cuda":
        compile_blocks(model.transformer_blocks)
    return model


def time_steps(plan: Plan, steps: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Trains the peer; yields the fields of a row after every step, of which the last ones are the result."""
    tokens = stream_tokens(plan.dataset.shape_key(0), plan.modalities)
    # Before the minutes of compilation, so that nothing can fail after them.
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    flops = plan.sample_flops(0)
    began = time.perf_counter()
    model = peer_model(plan, device)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=plan.job.optimizer.lr, fused=True)
    inputs = diffusers_inputs(plan.source.config["transformer"], tokens.video_tokens, tokens.audio_tokens, device)
    built_s = time.perf_counter() - began
    times: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = dense_loss(model(**inputs))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, _MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        timed = times[_WARMUP:] or times[-1:]
        tflops = flops / median(timed) / 1e12
        yield {
            "step_time_s": median(timed),
            "spread": (max(timed) - min(timed)) / median(timed),
            "steps_timed": len(times[_WARMUP:]),
            "first_step_s": times[0],
            "build_s": built_s,
            "step_times_s": list(times),
            "tflops_per_gpu": tflops,
            "mfu": None if peak is None else tflops * 1e12 / peak,
            "peak_mem_gib": torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None,
            "tokens_per_sample": plan.sample_tokens(0),
            "trained": sum(parameter.numel() for parameter in adapters),
            "clock": "host, synchronized",
        }


def main() -> int:
    """Measures the peer and writes its row."""
    options = parse_options(PeerOptions, sys.argv[1:], prog="ltx_titan.benchmarks.peer_lora", description=__doc__)
    quiet_libraries()
    plan = plan_job(load_job(options.job, options.overrides), 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = {**environment(device), "case": "diffusers with PEFT adapters, compiled, every block recomputed"}
    row: dict[str, Any] = {**case, "error": STARTED}
    write_rows(options.out, [row])
    # After every step: blocks compile twice, since the first one's input has no gradient, and time may end before.
    for number, found in enumerate(time_steps(plan, options.steps, device), 1):
        row = {**case, **found}
        write_rows(options.out, [row])
        print(f"step {number} of {options.steps}: {found['step_times_s'][-1]:.3f} s", flush=True)
    mfu = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}, {row['peak_mem_gib']:.1f} GiB"
    print(f"CASE {row['case']}: {row['step_time_s']:.3f} s +-{row['spread'] / 2:.0%}{mfu}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
