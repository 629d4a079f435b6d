"""The estimate for a job, which stands beside its measurement in the same row."""

from collections import Counter
from dataclasses import replace

import torch

from ltx_titan.common.hardware import GIB, GPUS, Gpu
from ltx_titan.estimate.prediction import Estimate, estimate
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.workload import make_setup, make_workload
from ltx_titan.plan import Plan


def find_gpu(name: str | None, device: str) -> Gpu:
    """A kind of GPU by its name, or by that of a device.

    Raises:
        ValueError: it is not in the table of GPUs.
    """
    if name is not None and name not in GPUS:
        raise ValueError(f"--gpu: expected one of {', '.join(sorted(GPUS))}; found {name}.")
    # The longest name, since an H200's contains "h20".
    known = sorted((kind for kind in GPUS if kind.partition("-")[0] in device.lower()), key=len)
    if name is None and not known:
        raise ValueError(f"--gpu: {device} is not in the table of GPUs; pass one of {', '.join(sorted(GPUS))}.")
    return GPUS[name or known[-1]]


def gpu_of(device: torch.device) -> Gpu | None:
    """The kind of a device, with its own memory; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    try:
        kind = find_gpu(None, torch.cuda.get_device_name(device))
    except ValueError:
        return None
    # A budget is filled by it.
    return replace(kind, memory=float(torch.cuda.get_device_properties(device).total_memory))


def predict_plan(plan: Plan, gpu: Gpu) -> Estimate:
    """Estimates a planned job as the trainer sets it up: by the memory of the GPU."""
    work, setup = make_workload(plan), make_setup(plan.job, plan.degrees, gpu.name)
    budget_gib = plan.job.activation_checkpoint.memory_gib
    setup = with_stream_blocks(work, setup, plan.job.parallelism.stream_blocks, budget_gib, gpu.memory)
    return estimate(work, with_levels(work, setup, budget_gib, gpu.memory), gpu)


def describe(found: Estimate) -> dict[str, float | None]:
    """What the estimate predicts, with the names of measured fields; no times if they are not predicted."""
    is_timed = found.time is not None
    return {
        "step_time_s": found.step_time_s if is_timed else None,
        "tokens_per_s_per_gpu": found.tokens_per_s if is_timed else None,
        "mfu": found.mfu if is_timed else None,
        "peak_mem_gib": found.memory.peak / GIB,
        "needed_gib": found.memory.needed / GIB,
    }


def in_words(found: Estimate) -> str:
    """The estimate in a line; says if the GPU has less memory than that."""
    time = "no time" if found.time is None else f"{found.step_time_s:.3f} s, MFU {found.mfu:.1%}"
    memory = f"{found.memory.peak / GIB:.1f} GiB, needs {found.memory.needed / GIB:.1f} of {found.gpu.memory / GIB:.1f}"
    levels = "".join(f", {count} blocks {level}" for level, count in Counter(found.setup.levels).items())
    return f"{time}, {memory}{levels}{'' if found.fits else ': DOES NOT FIT'}"
