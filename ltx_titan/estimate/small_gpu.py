"""Proposes settings for a LoRA job that does not fit one GPU: format of the base, streamed weights, budget."""

from dataclasses import dataclass, replace

from ltx_titan.common.hardware import GIB, Gpu
from ltx_titan.config import BaseDtype
from ltx_titan.estimate.prediction import Estimate, estimate
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.peak import pinned_bytes
from ltx_titan.memory.workload import make_setup, make_workload
from ltx_titan.plan import Plan

# From the most accurate one.
_BASES: tuple[BaseDtype, ...] = ("bfloat16", "int8", "nvfp4")
# Smallest memory in GiB of the GPUs that a job of train_configs/ is for; cards have less than they are sold with.
_RECIPES = ((22, "ltx23_lora_24gb"), (14, "ltx23_lora_16gb"), (10, "ltx23_lora_12gb"))


@dataclass(frozen=True)
class Proposal:
    """A format of the base, and its estimate with streamed weights.

    Attributes:
        base: `lora.base_dtype`.
        found: the estimate.
        pinned: bytes of pinned host memory.
    """

    base: BaseDtype
    found: Estimate
    pinned: float


def propose(plan: Plan, gpu: Gpu) -> list[Proposal]:
    """The formats with which a job fits one GPU, the most accurate first; empty if it is not a LoRA job on one GPU."""
    job, degrees = plan.job, plan.degrees
    if not _can_stream(plan):
        return []
    proposals = []
    for base in _BASES:
        lora = job.lora.model_copy(update={"base_dtype": base})
        work = make_workload(replace(plan, job=job.model_copy(update={"lora": lora})))
        setup = replace(make_setup(job, degrees, gpu.name), recompute="budget", k=1, cpu_offload=False)
        setup = with_stream_blocks(work, setup, "auto", "auto", gpu.memory)
        setup = with_levels(work, setup, "auto", gpu.memory)
        found = estimate(work, setup, gpu)
        if found.fits:
            proposals.append(Proposal(base, found, pinned_bytes(work, setup)))
    return proposals


def recipe_for(gpu: Gpu) -> str | None:
    """Name of the job in train_configs/ for LoRA on one GPU with streamed weights; None if it has too little memory."""
    return next((name for memory, name in _RECIPES if gpu.memory >= memory * GIB), None)


def describe_proposals(plan: Plan, gpu: Gpu) -> list[str]:
    """Formats what `propose` finds, and the recipe, as lines of text; for other jobs what else to try."""
    if not _can_stream(plan):
        return [
            f"\nwhat takes less memory, in the order of what it costs: docs/parallelism.md, When it does not fit; "
            f"--search compares the meshes of more {gpu.name}s"
        ]
    proposals, recipe = propose(plan, gpu), recipe_for(gpu)
    text = [] if recipe is None else [f"\nrecipe for LoRA on {gpu.name}: train_configs/{recipe}.toml"]
    if not proposals:
        return [*text, f"with clips of this size no format of the frozen weights fits {gpu.name}; use smaller ones"]
    text += [
        f"\nwith frozen weights in host memory it fits {gpu.name}; the first format that this machine's memory holds "
        "is the most accurate",
        f"  {'s/step':>8} {'GPU GiB':>8} {'host GiB':>8}   --parallelism.stream_blocks=auto "
        "--activation_checkpoint.mode=budget and",
    ]
    for one in proposals:
        text.append(
            f"  {one.found.step_time_s:8.3f} {one.found.memory.needed / GIB:8.1f} {one.pinned / GIB:8.1f}   "
            f"--lora.base_dtype={one.base}"
        )
    return text


def _can_stream(plan: Plan) -> bool:
    job, degrees = plan.job, plan.degrees
    is_alone = degrees.dp * degrees.cp * degrees.tp == 1
    return job.model.mode == "lora" and is_alone and job.training.dtype == "bfloat16"
