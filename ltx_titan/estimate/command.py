"""`ltx-titan estimate`: predicts memory and step time of a job, searches for a mesh, or runs a step on fake tensors.

`prediction.py` computes the numbers; this file parses the options and formats an `Estimate` as text or JSON.
"""

import json
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from ltx_titan.common.files import write_text
from ltx_titan.common.hardware import GIB, GPUS, HOP_S, NETWORK_HOP_S, Gpu
from ltx_titan.common.options import Flag, Maybe, Overrides, Positional, parse_size, placeholder
from ltx_titan.config import Degrees, PreservationSection, build_job, read_tables
from ltx_titan.estimate.placeholders import Tables, add_placeholders
from ltx_titan.estimate.prediction import Estimate, estimate, search
from ltx_titan.estimate.small_gpu import describe_proposals
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.peak import RESERVE, SLACK, pinned_bytes
from ltx_titan.memory.workload import Setup, Workload, make_setup, make_workload
from ltx_titan.plan import Plan, plan_job

DESCRIPTION = """\
Predict memory, step time and MFU of a job on a number of GPUs, without a GPU. Missing checkpoints and data are replaced
by a released shape and a clip of --clip. --search compares all meshes, activation checkpointing modes and micro-batches
that fit, for the job's global batch size. --dry-run builds the real job on one fake rank of that many and runs a step
on fake tensors, so that errors of a cluster show up here.

example:
  ltx-titan estimate train_configs/ltx23_full_av_8gpu.toml --gpus 8 --gpu h100
  ltx-titan estimate job.toml --gpus 64 --gpu h200 --clip 1536x896x89 --search
  ltx-titan estimate job.toml --gpus 512 --dry-run --training.global_batch_size=512
"""

PEAK_ERROR, TIME_ERROR, TIMED_LAYERS = 0.08, 0.05, 12
"""Largest relative errors of peak memory against the runs in docs/benchmarks, and of step time against those with CUDA
graphs and at least so many layers. Without graphs the host decides; with few layers, what is outside them. Asserted by
a test."""

_SHOWN = 6


@dataclass(frozen=True)
class EstimateOptions:
    """Options of `ltx-titan estimate`."""

    job: Annotated[Positional[Path], placeholder("JOB.toml")]
    """Job file. --section.key=value overrides single values."""

    gpus: Annotated[int, placeholder("N")] = 1
    """Number of GPUs."""

    gpu: Annotated[str, placeholder(f"{{{','.join(sorted(GPUS))}}}")] = "h100"
    """Kind of GPU."""

    gpus_per_node: Annotated[Maybe[int], placeholder("N")] = None
    """GPUs connected by NVLink. Default: those of a node of this kind, 8."""

    shape: Maybe[str] = None
    """Released model, or JSON file with checkpoint metadata, in place of a missing checkpoint."""

    clip: Annotated[Maybe[str], placeholder("WxHxF")] = None
    """Width and height in pixels, and frames, of the samples. Default: those of the data, or 768x448x89."""

    search: Flag = False
    """Also list the fastest setups that fit."""

    dry_run: Flag = False
    """Also build the job on a fake rank and run a step."""

    json: Annotated[Maybe[Path], placeholder("FILE")] = None
    """File for the estimate as JSON."""

    overrides: Overrides = ()


def report(work: Workload, found: Estimate) -> list[str]:
    """Formats an estimate as lines of text."""
    memory, gpu = found.memory, found.gpu
    tokens = f"{work.video_tokens:,} video + {work.audio_tokens:,} audio tokens, {work.text_tokens:,} text tokens"
    trained = "all" if work.trained == "full" else f"{work.trained_weights / 1e6:,.1f} M in adapters"
    lines = [
        f"  gpus         {found.setup.gpus} x {_named(gpu)}: {describe(found.setup, work)}",
        f"  sample       {tokens}; {work.global_batch_size} per step",
        f"  weights      {work.weights / 1e9:.3f} B, trained: {trained}",
        "",
        "memory of the fullest GPU, GiB",
    ]
    parts = {
        "weights": memory.parameters,
        "optimizer": memory.optimizer,
        "gradients": memory.gradients,
        "connectors": memory.connectors,
        "saved activations": memory.activations,
        "block working set": memory.working_set,
        "FSDP2 buffers": memory.buffers,
    }
    lines += [f"  {name:18}{size / GIB:8.2f}" for name, size in parts.items() if size]
    moment = "start" if memory.start_of_backward >= memory.end_of_backward else "end"
    lines += [
        f"  {'peak of tensors':18}{memory.peak / GIB:8.2f}   at the {moment} of the backward pass",
        f"  {'needed':18}{memory.needed / GIB:8.2f}   of {gpu.memory / GIB:.1f}: "
        + ("fits" if found.fits else "DOES NOT FIT"),
    ]
    if found.setup.stream_blocks:
        pinned = pinned_bytes(work, found.setup) / found.setup.gpus
        lines.append(f"  {'host, pinned':18}{pinned / GIB:8.2f}   a rank; not on the GPU")
    lines.append("")
    if found.time is None:
        return [*lines, "step time: not predicted with parallelism.cpu_offload"]
    names = {
        "matmul": "matmuls",
        "attention": "attention",
        "memory_bound": "memory-bound",
        "fsdp_copies": "FSDP2 copies",
        "communication": "tp, cp collectives",
        "outside": "outside, update",
        "host": "host-bound",
        "exposed": "exposed FSDP2",
        "contention": "contention",
        "streaming": "exposed streaming",
    }
    lines.append("time of a step, s")
    # Parts below half a millisecond would be printed as 0.000.
    lines += [f"  {names[part]:18}{seconds:8.3f}" for part, seconds in asdict(found.time).items() if seconds > 5e-4]
    lines += [
        f"  {'step':18}{found.time.total:8.3f}   {found.tokens_per_s:,.0f} tokens/s/GPU, {found.tflops:.0f} "
        f"TFLOP/s/GPU, MFU {found.mfu:.1%}",
        f"  {'model FLOPs':18}{found.flops / 1e15:8.3f}   PFLOP over all GPUs",
    ]
    return lines


def _named(gpu: Gpu) -> str:
    return gpu.name if gpu.is_measured else f"{gpu.name} (not measured)"


def describe(setup: Setup, work: Workload) -> str:
    """Describes a setup in one phrase."""
    degrees = setup.degrees
    axes = " x ".join(f"{name} {size}" for name, size in vars(degrees).items() if size > 1) or "one rank"
    forwards = -(-work.global_batch_size // (setup.local_batch_size * degrees.dp))
    extra = [f"{forwards} forward(s) of {setup.local_batch_size}", f"checkpointing {setup.recompute}"]
    if setup.levels:
        extra[-1] += f" ({', '.join(f'{count} {level}' for level, count in Counter(setup.levels).items())})"
    if setup.stream_blocks:
        extra.append(f"{setup.stream_blocks} of {work.num_layers} blocks on the GPU")
    if setup.compile:
        extra.append("compiled")
    if setup.float8 != "none":
        extra.append(f"float8 {setup.float8}")
    return f"{axes}; {', '.join(extra)}"


def overrides_of(setup: Setup) -> str:
    """Job overrides that select this setup."""
    degrees = setup.degrees
    keys = {
        "parallelism.dp_replicate": degrees.dp_replicate,
        "parallelism.dp_shard": degrees.dp_shard,
        "parallelism.cp": degrees.cp,
        "parallelism.tp": degrees.tp,
        "activation_checkpoint.mode": setup.recompute,
        "training.local_batch_size": setup.local_batch_size,
    }
    return " ".join(f"--{key}={value}" for key, value in keys.items())


def assumptions(gpu: Gpu, setup: Setup) -> list[str]:
    """Assumptions of a prediction, one per line."""
    lines = [
        f"{gpu.name}: {gpu.matmul / 1e12:.0f} TFLOP/s in matmuls, {gpu.attention_forward / 1e12:.0f} / "
        f"{gpu.attention_backward / 1e12:.0f} in attention forward / backward, copy {gpu.copy / 1e12:.1f} TB/s",
        f"not measured: {gpu.assumed}",
        f"{gpu.gpus_per_node} GPUs per node, filled in rank order; tp innermost, then FSDP2, then replicas",
        "not measured: several nodes. A ring over whole nodes uses all their network cards, one a GPU, and takes "
        f"{1e6 * HOP_S:.1f} us a hop within a node and {1e6 * NETWORK_HOP_S:.0f} us between nodes (NCCL's own "
        "constants); no stragglers, no other traffic",
        f"needed = {SLACK} x peak + {RESERVE / GIB:.1f} GiB for CUDA, NCCL and cuBLAS, and with CUDA graphs or a "
        "budget the gradients, which cannot use what activations free; validation is not counted",
        "time is for a sample of mean cost, memory for the largest one; no data, checkpoint or logging stalls",
        f"against the measured runs that rates were fitted to (docs/benchmarks): peak within {PEAK_ERROR:.0%}; step "
        f"time within {TIME_ERROR:.0%} for {TIMED_LAYERS} layers or more with CUDA graphs (slower than "
        "predicted: full fine-tuning of 12 layers on two GPUs by 10% and 8%, of 18 on one by 8% at 4k tokens, LoRA at "
        "4k tokens on one H200 by 6%); without graphs the host decides, whose speed is not predicted",
    ]
    if setup.stream_blocks:
        lines.append(f"{gpu.host_link / 1e9:.0f} GB/s from pinned host memory; not measured on this kind of GPU")
    if not setup.compile:
        lines.append("blocks are not compiled: set compile.enable = true")
    return lines


def run(options: EstimateOptions) -> int:
    """Runs `ltx-titan estimate`; returns the exit status: 1 if the job, or every setup of a search, does not fit.

    Raises:
        ValueError: an option is out of range, or the job cannot be planned.
    """
    if options.gpus < 1:
        raise ValueError(f"--gpus: expected at least 1, found {options.gpus}.")
    if options.gpu not in GPUS:
        raise ValueError(f"--gpu: expected one of {', '.join(sorted(GPUS))}; found {options.gpu}.")
    gpu = GPUS[options.gpu]
    if options.gpus_per_node is not None:
        gpu = replace(gpu, gpus_per_node=options.gpus_per_node)
    with tempfile.TemporaryDirectory() as folder:
        tables, origins = read_tables(options.job, options.overrides)
        clip = parse_size(options.clip, "--clip") if options.clip else None
        # Before the placeholders, whose finished contexts no caption can be removed from.
        preservation = PreservationSection.model_validate(tables.get("preservation", {}))
        notes = add_placeholders(tables, Path(folder), shape=options.shape, clip=clip)
        return _run(options, gpu, tables, origins, notes, preservation)


def _run(
    options: EstimateOptions,
    gpu: Gpu,
    tables: Tables,
    origins: dict[str, str],
    notes: list[str],
    preservation: PreservationSection,
) -> int:
    status = 0
    try:
        plan = plan_job(build_job(tables, str(options.job), origins), options.gpus)
    except ValueError as error:
        # A search may start from a job whose mesh does not fit these GPUs; an estimate of the job itself may not.
        if not options.search:
            raise
        print(f"{options.job} without a search: {error}\n")
        plan = None
    if plan is None:
        # The search picks mesh and micro-batch; one rank with one micro-batch is valid for any job.
        training = {"global_batch_size": 1, **tables.get("training", {})}
        neutral = {
            **tables,
            "parallelism": {},
            "training": {**training, "local_batch_size": training["global_batch_size"]},
        }
        mesh = Degrees(dp_shard=options.gpus)
        neutral_plan = plan_job(build_job(neutral, str(options.job), origins), 1)
        work, setup = make_workload(neutral_plan, preservation), make_setup(neutral_plan.job, mesh, gpu.name)
    else:
        work, setup = make_workload(plan, preservation), make_setup(plan.job, plan.degrees, gpu.name)
        budget_gib = plan.job.activation_checkpoint.memory_gib
        setup = with_stream_blocks(work, setup, plan.job.parallelism.stream_blocks, budget_gib, gpu.memory)
        setup = with_levels(work, setup, budget_gib, gpu.memory)
        found = estimate(work, setup, gpu)
        print(f"{options.job}: a prediction, not a measurement\n")
        print("\n".join(report(work, found)))
        if options.json is not None:
            _write_json(options.json, work, found)
        status = 0 if found.fits else 1
        if not found.fits:
            print("\n".join(describe_proposals(plan, gpu)))
    if options.search:
        status = _print_search(work, setup, gpu)
    if options.dry_run and plan is not None:
        _print_dry_run(plan, setup)
    print("\nassumptions")
    print("\n".join(f"  - {line}" for line in [*notes, *assumptions(gpu, setup)]))
    return status


def _print_search(work: Workload, setup: Setup, gpu: Gpu) -> int:
    best = search(work, setup, gpu)
    if not best:
        print(
            f"\nno configuration of {setup.gpus} x {gpu.name} fits; use more GPUs, shorter clips or a smaller "
            "optimizer (adamw8bit)"
        )
        return 1
    print(
        f"\nfastest of {len(best)} configurations that fit {setup.gpus} x {_named(gpu)}, global batch size "
        f"{work.global_batch_size}"
    )
    print(f"  {'s/step':>8} {'MFU':>6} {'needed':>7}   setup")
    for one in best[:_SHOWN]:
        needed = one.memory.needed / GIB
        print(f"  {one.step_time_s:8.3f} {one.mfu:6.1%} {needed:7.1f}   {describe(one.setup, work)}")
    print(f"  {overrides_of(best[0].setup)}")
    return 0


def _print_dry_run(plan: Plan, setup: Setup) -> None:
    # Imported here: it loads the optimizers and FSDP2, which an estimate alone does not need.
    from ltx_titan.estimate.dry_run import dry_run

    degrees = plan.degrees
    ranks = degrees.dp * degrees.cp * degrees.tp
    print()
    # Flushed: a launcher or a pipe would otherwise show all lines at the end.
    done = dry_run(
        plan,
        setup.levels,
        setup.stream_blocks,
        on_phase=lambda phase: print(f"dry run on {ranks} fake ranks: {phase}", flush=True),
    )
    print(f"\ndry run: {ranks} ranks, built and stepped in {done.seconds:.0f} s")
    print("  GiB that tensors of rank 0 hold, not compiled")
    for name, size in (
        ("between steps", done.resident),
        ("after the forward pass", done.after_forward),
        ("in the backward pass", done.peak_backward),
        ("in the update", done.peak_update),
    ):
        print(f"  {name:24}{size / GIB:8.2f}")


def _write_json(path: Path, work: Workload, found: Estimate) -> None:
    memory = {name: value / GIB for name, value in asdict(found.memory).items()}
    row = {
        "gpu": found.gpu.name,
        "setup": asdict(found.setup),
        "peak_mem_gib": found.memory.peak / GIB,
        "needed_gib": found.memory.needed / GIB,
        "memory_gib": memory,
        "pinned_host_gib": pinned_bytes(work, found.setup) / GIB,
        "step_time_s": found.time.total if found.time else None,
        "time_s": asdict(found.time) if found.time else None,
        "tokens_per_s_per_gpu": found.tokens_per_s if found.time else None,
        "tflops_per_gpu": found.tflops if found.time else None,
        "mfu": found.mfu if found.time else None,
    }
    write_text(path, json.dumps(row, indent=1) + "\n")
