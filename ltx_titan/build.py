"""Builds the models of a planned job in memory, and exports the trained model to a file.

Models are built on the meta device, changed there (adapters, then the parallel plan), and only then allocated: this
rank's shards and nothing more. Weights are streamed into them from the official file.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from ltx_titan.common.hardware import GIB
from ltx_titan.common.tensors import COMPUTE_DTYPES
from ltx_titan.conditioning.sources import prepared_triggers
from ltx_titan.config import ExportLayout, JobConfig, plain_job
from ltx_titan.lora import adapter_weights, apply_lora, init_base_, init_lora_, load_base
from ltx_titan.memory.budget import with_levels, with_stream_blocks
from ltx_titan.memory.workload import make_setup, make_workload
from ltx_titan.model import LTXTransformer, TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.model.kernel_ops import select_operators
from ltx_titan.optim import freeze_groups
from ltx_titan.parallel import peer_memory
from ltx_titan.parallel.activation_checkpoint import Level
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.parallelize import parallelize
from ltx_titan.parallel.stream import weight_stream
from ltx_titan.plan import Plan, build_transformer
from ltx_titan.weights import (
    CONNECTORS,
    LoRAWeights,
    ModelSource,
    QuantizedLinear,
    build_connectors,
    complete_export,
    export_lora,
    export_merged,
    export_safetensors,
    load_lora,
    load_parameters,
    lora_header,
    reference_metadata,
    transformer_tensors,
    unused_by,
    use_float8_matmuls,
)

logger = logging.getLogger(__name__)


def load_transformer(plan: Plan, mesh: Mesh, device: torch.device) -> nn.Module:
    """Builds the job's transformer, sharded over `mesh`, and loads its weights.

    Args:
        plan: the job.
        mesh: of all ranks.
        device: of this rank.

    Returns:
        The model in training mode; in a LoRA job with its adapters.
    """
    job, path = plan.job, plan.source.path
    seed, unused = job.training.seed, unused_by(plan.modalities)
    started = time.perf_counter()
    model = shape_transformer(plan, mesh, device)
    give_storage(model, device, offloaded=job.parallelism.cpu_offload)
    if job.model.mode == "lora":
        if path is not None:
            load_base(model, path, allow_unused=unused, device=device)
        else:
            init_base_(model, seed, device=device)
        # After the base: DoRA magnitudes are initialized from it, and init_base_ overwrites adapters.
        init_lora_(model, seed)
        if job.model.adapter_path is not None:
            load_lora(adapter_weights(model), job.model.adapter_path)
    elif path is not None:
        load_parameters(model, path, allow_unused=unused)
    else:
        init_random_(model, seed)
    weights = count_weights(model) / 1e9
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e9
    origin = path or f"random weights ({job.model.shape})"
    if (stream := weight_stream(model)) is not None:
        stream.start(device)
        logger.info("weight streaming: %.1f GiB in host memory", stream.host_bytes / GIB)
    elapsed_s = time.perf_counter() - started
    logger.info("transformer: %.3f B weights, %.3f B trained, from %s in %.1f s", weights, trained, origin, elapsed_s)
    return model.train()


def count_weights(model: nn.Module) -> int:
    """Number of weights, adapters included; a quantized layer counts as the matrix that it represents."""
    total = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.in_features * module.out_features
            total += 0 if module.bias is None else module.bias.numel()
        else:
            total += sum(p.numel() for p in module.parameters(recurse=False))
    return total


def shape_transformer(
    plan: Plan,
    mesh: Mesh,
    device: torch.device,
    levels: tuple[Level, ...] | None = None,
    stream_blocks: int | None = None,
) -> nn.Module:
    """Builds the job's transformer, adapted and sharded over `mesh`, on the meta device; call `give_storage` next.

    Args:
        plan: of the job.
        mesh: of all ranks.
        device: of this rank.
        levels: of each block with `activation_checkpoint.mode = "budget"`; None chooses them for the device's memory.
        stream_blocks: blocks whose frozen weights are on the device at a time, 0 for all; None chooses as well.
    """
    job = plan.job
    if levels is None or stream_blocks is None:
        fitted_blocks, fitted_levels = _fit_to_device(plan, mesh, device)
        levels = fitted_levels if levels is None else levels
        stream_blocks = fitted_blocks if stream_blocks is None else stream_blocks
    # Adapters before the parallel plan, which shards, converts and wraps their layers, too.
    model = build_transformer(plan.source, plan.modalities, select_operators(job.kernels.backend, device))
    if job.model.mode == "lora":
        adapted = apply_lora(model, job.lora)
        ranks = " and ".join(map(str, sorted({layer.lora_a.shape[0] for layer in adapter_weights(model).values()})))
        logger.info("LoRA: rank %s on %d layers, base in %s", ranks, len(adapted), job.lora.base_dtype)
        if job.lora.base_dtype == "float8":
            obstacle = use_float8_matmuls(model, device, COMPUTE_DTYPES[job.training.dtype], job.lora.float8_matmuls)
            logger.info("matmuls of the base: %s", "float8" if obstacle is None else f"dequantized, because {obstacle}")
    for parameter in model.parameters() if job.training.weight_dtype == "bfloat16" else ():
        # Not `model.to`, which would also convert buffers.
        parameter.data = parameter.data.bfloat16()
    freeze_groups(model, job.optimizer.groups)
    parallelize(
        model,
        mesh,
        dtype=COMPUTE_DTYPES[job.training.dtype],
        float8=job.float8,
        checkpointing=job.activation_checkpoint,
        compiled_shapes=_compiled_shapes(plan, model) if job.compile.enable else None,
        parallelism=job.parallelism,
        levels=levels,
        stream_blocks=stream_blocks,
    )
    return model


def _compiled_shapes(plan: Plan, model: LTXTransformer) -> int:
    """Graphs of a block that training compiles: one for each shape, kind of block, and state of the adapters."""
    kinds = {
        # Ranks and freezing may differ from block to block.
        tuple((name, weight.shape, weight.requires_grad) for name, weight in block.named_parameters())
        for block in model.transformer_blocks
    }
    return plan.num_shapes * len(kinds) * (2 if plan.job.preservation.parts else 1)


def _fit_to_device(plan: Plan, mesh: Mesh, device: torch.device) -> tuple[int, tuple[Level, ...]]:
    """Blocks on the device at a time (0 for all), and their levels with `activation_checkpoint.mode = "budget"`."""
    checkpointing, stream_blocks = plan.job.activation_checkpoint, plan.job.parallelism.stream_blocks
    if checkpointing.mode != "budget" and stream_blocks != "auto":
        return stream_blocks, ()
    # A CPU has no limit of its own, so "auto" recomputes nothing there.
    memory = torch.tensor(float("inf"), dtype=torch.float64, device=device)
    if device.type == "cuda":
        # A process may be limited to a share of its device, as when a smaller one is tried out.
        share = torch.cuda.get_per_process_memory_fraction(device)
        memory.fill_(torch.cuda.get_device_properties(device).total_memory * share)
        # One decision for all ranks: recomputation repeats collectives of tensor and context parallelism.
        dist.all_reduce(memory, op=dist.ReduceOp.MIN)
    work, setup = make_workload(plan), make_setup(plan.job, plan.degrees)
    if setup.copy_engines and peer_memory.obstacle(mesh.fsdp.get_group(mesh.fsdp.ndim - 1), device) is not None:
        is_wanted = plan.job.parallelism.fsdp_exchange_gradients == "on"
        setup = replace(setup, copy_engines=False, exchanges_gradients=is_wanted)
    setup = with_stream_blocks(work, setup, stream_blocks, checkpointing.memory_gib, memory.item())
    setup = with_levels(work, setup, checkpointing.memory_gib, memory.item())
    return setup.stream_blocks, setup.levels


def give_storage(model: nn.Module, device: torch.device, *, offloaded: bool) -> None:
    """Allocates uninitialized memory for all shards.

    Args:
        model: on the meta device.
        device: of this rank.
        offloaded: allocate parameters in host memory, from where FSDP2 copies them to the device.
    """
    stream, streamed = weight_stream(model), set()
    if stream is not None:
        if not stream.is_allocated:
            stream.allocate(device)
        streamed = stream.parameters()
    target = torch.device("cpu") if offloaded else device
    # As `to_empty`, but for the streamed weights, which have their memory.
    model._apply(lambda tensor: tensor if tensor in streamed else torch.empty_like(tensor, device=target))
    if offloaded:
        # FSDP2 manages parameters only; buffers are read on the device.
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))


def load_connectors(plan: Plan, mesh: Mesh, device: torch.device) -> TextConnectors | None:
    """Builds and loads the frozen text connectors, sharded like the model; None if the data has finished contexts."""
    path = plan.connectors_path
    if path is None:
        return None
    dtype = COMPUTE_DTYPES[plan.job.training.dtype]
    # Frozen, so they need no float32 master weights.
    connectors = build_connectors(plan.source, path).to(dtype).requires_grad_(False)
    # Each connector by itself, so that its blocks are gathered one at a time.
    for connector in (connectors.video_embeddings_connector, connectors.audio_embeddings_connector):
        apply_fsdp(connector, connector.transformer_1d_blocks, mesh.fsdp, dtype)
    connectors.to_empty(device=device)
    load_parameters(connectors, path, component=CONNECTORS)
    logger.info("text connectors from %s", path)
    return connectors.eval()


def export_model(plan: Plan, model: nn.Module, step: int) -> Path:
    """Exports the trained model for inference: the adapters, or the whole transformer. Every rank calls it.

    Args:
        plan: the job.
        model: the trained model.
        step: number in the file name.

    Returns:
        Path of the file.
    """
    path, source, layout = plan.export_path(step), plan.source, plan.job.checkpoint.export_layout
    dtype = COMPUTE_DTYPES[plan.job.checkpoint.export_dtype]
    if plan.job.model.mode == "lora":
        export_adapters(adapter_weights(model), path, plan.job, source, plan.reference_scale, dtype, layout)
    else:
        trained = transformer_tensors(model, dtype)
        export_safetensors(path, *complete_export(trained, source, plan.job.model.connectors_path, layout))
    return path


def export_bytes(plan: Plan, model: nn.Module) -> int:
    """Size of the file that `export_model` writes."""
    job = plan.job
    dtype = COMPUTE_DTYPES[job.checkpoint.export_dtype]
    if job.model.mode == "lora" and not job.lora.dora:
        layers = adapter_weights(model).values()
        return sum(layer.lora_a.numel() + layer.lora_b.numel() for layer in layers) * dtype.itemsize
    # Merged adapters are as large as the base, whose transformer is added where no trained tensor replaces it.
    trained = transformer_tensors(model, dtype) if job.model.mode == "full" else []
    layout = job.checkpoint.export_layout if trained else "with_connectors"
    tensors, _ = complete_export(trained, plan.source, job.model.connectors_path, layout)
    return sum(tensor.num_bytes for tensor in tensors)


def export_adapters(
    adapters: Mapping[str, LoRAWeights],
    path: Path,
    job: JobConfig,
    source: ModelSource,
    reference_scale: tuple[int, int] | None,
    dtype: torch.dtype,
    layout: ExportLayout,
) -> None:
    """Writes a LoRA file, or with DoRA, whose magnitudes LoRA files cannot store, the base with the adapters merged.

    Args:
        adapters: by official layer name, sharded or not.
        path: target file.
        job: the job that trained them.
        source: of the base.
        reference_scale: as `Plan.reference_scale`, for the header of an in-context LoRA.
        dtype: of a LoRA file; a merged file keeps the dtypes of the base.
        layout: of a merged file.
    """
    if job.lora.dora:
        if source.path is None:
            raise ValueError('lora.dora = true with model.init = "random": there is no base file to merge into.')
        export_merged(adapters, source.path, path, job.model.connectors_path, layout)
    else:
        metadata = {} if reference_scale is None else reference_metadata(*reference_scale)
        ranks = {layer.lora_a.shape[0] for layer in adapters.values()}
        metadata |= lora_header(
            source,
            title=path.stem,
            rank=ranks.pop() if len(ranks) == 1 else None,
            alpha=job.lora.alpha,
            job=plain_job(job),
            trigger=_trigger(job),
            license_=job.job.license,
        )
        export_lora(adapters, path, metadata, dtype=dtype)


def _trigger(job: JobConfig) -> str | None:
    """Trigger word of a job: its own, or the one that its data was prepared with; of several sources all of them."""
    if job.job.trigger or job.data.source == "media":
        return job.job.trigger or job.data.media.lora_trigger
    if job.data.source != "precomputed":
        return None
    return ", ".join(prepared_triggers(job.data)) or None
