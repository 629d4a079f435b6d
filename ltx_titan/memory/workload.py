"""Descriptions of a job for estimates: a mesh-independent `Workload` and a `Setup` that a search varies.

Both are numbers: no model, mesh or dataset is needed to estimate them. `make_workload` and `make_setup` derive them
from a planned job.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard

from ltx_titan.common.hardware import GPUS, Gpu
from ltx_titan.common.tensors import COMPUTE_DTYPES, on_meta
from ltx_titan.config import (
    ActivationCheckpointMode,
    Degrees,
    JobConfig,
    LoRASection,
    ParameterGroup,
    PreservationSection,
)
from ltx_titan.data import stream_tokens
from ltx_titan.lora import apply_lora
from ltx_titan.model import LTXTransformer, TextConnectors, TransformerConfig
from ltx_titan.model.flops import Trained
from ltx_titan.model.transformer import Modalities
from ltx_titan.optim import freeze_groups
from ltx_titan.parallel.activation_checkpoint import Level
from ltx_titan.parallel.graphs import obstacle
from ltx_titan.parallel.tp import placement_of
from ltx_titan.plan import Plan
from ltx_titan.weights.quantized import QuantizedLinear


@dataclass(frozen=True)
class Weight:
    """A parameter: global shape, bytes per element as stored, and the dim that tensor parallelism shards (or None)."""

    shape: tuple[int, ...]
    itemsize: int
    is_trained: bool
    tp_dim: int | None

    def after_tp(self, tp: int) -> tuple[int, ...]:
        """Shape on one rank of `tp`."""
        return tuple(-(-n // tp) if dim == self.tp_dim else n for dim, n in enumerate(self.shape))


@dataclass(frozen=True)
class Weights:
    """Parameters that FSDP2 gathers together: one block, or everything outside the blocks."""

    items: tuple[Weight, ...]

    @classmethod
    def of(cls, named: Iterable[tuple[str, nn.Parameter]]) -> "Weights":
        """Describes a model's parameters, which may be on the meta device, by their official names."""
        items = []
        for name, parameter in named:
            placement = placement_of(name, parameter.shape)
            tp_dim = placement.dim if isinstance(placement, Shard) else None
            items.append(Weight(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad, tp_dim))
        return cls(tuple(items))

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum(prod(weight.shape) for weight in self.items)

    @property
    def trained(self) -> int:
        """Number of trained weights."""
        return sum(prod(weight.shape) for weight in self.items if weight.is_trained)

    @property
    def frozen_bytes(self) -> int:
        """Stored bytes of the frozen weights, without any sharding."""
        return sum(prod(weight.shape) * weight.itemsize for weight in self.items if not weight.is_trained)

    def gathered(self, tp: int, *, trained_only: bool = False) -> int:
        """Elements on a rank while FSDP2 has the unit gathered."""
        return sum(prod(w.after_tp(tp)) for w in self.items if w.is_trained or not trained_only)

    def sharded(self, degrees: Degrees, *, trained_only: bool = False) -> tuple[int, int]:
        """Elements and stored bytes of the largest shards: FSDP2 chunks dim 0, the first chunks are the larger ones."""
        ranks = degrees.dp_shard * degrees.cp
        elements = size = 0
        for weight in self.items:
            if weight.is_trained or not trained_only:
                # A scalar, whose shape is empty, counts as one row.
                first, *rest = weight.after_tp(degrees.tp) or (1,)
                # Memory is that of the fullest rank.
                part = -(-first // ranks) * prod(rest)
                elements += part
                size += part * weight.itemsize
        return elements, size


@dataclass(frozen=True)
class Workload:
    """Mesh-independent description of the training workload.

    Attributes:
        transformer: the `transformer` section of the checkpoint's config.
        trained: "full" or "lora".
        block: weights of one block.
        outside: weights of the transformer outside its blocks.
        connectors: weights of resident, frozen text connectors; 0 if the data holds finished contexts.
        num_layers: number of blocks.
        video_tokens, audio_tokens: tokens of a sample, references included; 0 for an absent stream.
        text_tokens: of the prompt.
        video_timesteps, audio_timesteps: distinct timesteps in a sample: 2 if a condition can make tokens clean.
        largest: (video, audio) tokens of the largest sample, which determines memory.
        global_batch_size: samples in an optimizer step.
        itemsize: bytes of the compute dtype.
        quantized: weights of a block that are stored in 8 or 4 bits.
        optimizer: name of the update rule.
        offload_state, in_backward, ema: as in `[optimizer]`.
        passes: forward and backward passes over a batch.
        base_passes: forward passes of the base, for `[preservation]`.
    """

    transformer: Mapping[str, Any]
    trained: Trained
    block: Weights
    outside: Weights
    connectors: int
    num_layers: int
    video_tokens: int
    audio_tokens: int
    text_tokens: int
    video_timesteps: int
    audio_timesteps: int
    largest: tuple[int, int]
    global_batch_size: int
    itemsize: int = 2
    quantized: int = 0
    optimizer: str = "adamw"
    offload_state: bool = False
    in_backward: bool = False
    ema: bool = False
    passes: int = 1
    base_passes: int = 0

    # Cached because every prediction reads widths; it writes to `__dict__`, which a frozen dataclass permits.
    @cached_property
    def architecture(self) -> TransformerConfig:
        """Sizes and options of the transformer."""
        return TransformerConfig.from_metadata(dict(self.transformer))

    @property
    def video_width(self) -> int:
        """Width of the video stream."""
        return self.architecture.video.width

    @property
    def audio_width(self) -> int:
        """Width of the audio stream."""
        return self.architecture.audio.width

    @property
    def heads(self) -> int:
        """Attention heads, the same in both streams."""
        return self.architecture.video.heads

    @property
    def weights(self) -> int:
        """Number of weights of the transformer."""
        return self.num_layers * self.block.count + self.outside.count

    @property
    def trained_weights(self) -> int:
        """Number of trained weights."""
        return self.num_layers * self.block.trained + self.outside.trained


@dataclass(frozen=True)
class Setup:
    """Configuration of a run; a search varies it.

    Attributes:
        degrees: sizes of the mesh axes.
        recompute: mode of activation checkpointing.
        k: one block in `k` is recomputed (`every_k`).
        levels: of each block (`budget`), see budget.py.
        local_batch_size: samples of a micro-batch.
        compile: blocks are compiled.
        graphs: micro-steps are replayed as CUDA graphs, so that the speed of the host does not matter.
        kernels: norms and modulation are fused kernels, which index a token's modulation instead of expanding it.
        float8: recipe, or "none".
        float8_all_gather: FSDP2 gathers weights in float8.
        base_in_float8: a frozen float8 base is multiplied in float8.
        offload_activations: inputs of recomputed blocks are kept in host memory.
        cpu_offload: weights, gradients and optimizer state are in host memory.
        stream_blocks: blocks whose frozen weights are on the device at a time; 0 for all of them.
        static_slots: blocks are gathered into two fixed buffers (parallel/static_slots.py).
        copy_engines: from the memory of the other GPUs of a host, without NCCL (parallel/peer_memory.py).
        exchanges_gradients: they are sent in the compute dtype (parallel/gradient_exchange.py).
    """

    degrees: Degrees
    recompute: ActivationCheckpointMode = "none"
    k: int = 1
    levels: tuple[Level, ...] = ()
    local_batch_size: int = 1
    compile: bool = False
    graphs: bool = False
    kernels: bool = False
    float8: str = "none"
    float8_all_gather: bool = False
    base_in_float8: bool = False
    offload_activations: bool = False
    cpu_offload: bool = False
    stream_blocks: int = 0
    static_slots: bool = False
    copy_engines: bool = False
    exchanges_gradients: bool = False

    @property
    def gpus(self) -> int:
        """World size."""
        return self.degrees.dp * self.degrees.cp * self.degrees.tp

    @property
    def fsdp(self) -> int:
        """Ranks that FSDP2 shards over."""
        return self.degrees.dp_shard * self.degrees.cp

    @property
    def gathers_frozen(self) -> bool:
        """Whether FSDP2 gathers frozen weights; it does not manage those of a whole replica (parallel/fsdp.py)."""
        return self.fsdp > 1 or self.cpu_offload

    def level_shares(self) -> dict[Level, float]:
        """Fraction of the blocks at each level of activation checkpointing."""
        match self.recompute:
            case "every_k":
                return {"full": 1 / self.k, "none": 1 - 1 / self.k}
            case "budget":
                return {level: count / len(self.levels) for level, count in Counter(self.levels).items()}
            case level:
                return {level: 1.0}


@dataclass(frozen=True)
class ModelWeights:
    """Weights of a transformer: of one block, of everything outside the blocks, and quantized ones of a block."""

    block: Weights
    outside: Weights
    quantized: int


def model_weights(
    transformer: Mapping[str, Any],
    modalities: Modalities,
    lora: LoRASection | None,
    groups: Sequence[ParameterGroup] = (),
    dtype: torch.dtype = torch.float32,
) -> ModelWeights:
    """Describes a transformer by building one of its blocks on the meta device.

    Args:
        transformer: the `transformer` section of a checkpoint's config.
        modalities: streams that the transformer has.
        lora: adapters to add; None for full fine-tuning.
        groups: of the optimizer, which may freeze weights.
        dtype: of the weights in full fine-tuning.
    """
    # One block: all of them have the same weights, and the real number of layers multiplies its counts.
    with on_meta():
        model = LTXTransformer.from_config({**transformer, "num_layers": 1}, modalities)
    # The one block stands for all: a larger rank of some blocks counts in all of them, and weights that are frozen in
    # some count as trained. Too much rather than too little.
    if lora is not None:
        entries = []
        for entry in lora.ranks:
            rank = entry.rank if entry.blocks is None else max(entry.rank, lora.rank)
            entries.append(entry.model_copy(update={"blocks": None, "rank": rank}))
        apply_lora(model, lora.model_copy(update={"ranks": tuple(entries)}))
    else:
        model.to(dtype)
    freeze_groups(model, [group for group in groups if group.blocks is None])
    inside: list[tuple[str, nn.Parameter]] = []
    outside: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        (inside if name.startswith("transformer_blocks.") else outside).append((name, parameter))
    quantized = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))
    return ModelWeights(Weights.of(inside), Weights.of(outside), quantized)


def make_workload(plan: Plan, preservation: PreservationSection | None = None) -> Workload:
    """Describes what a planned job trains.

    Args:
        plan: the job.
        preservation: in place of the job's.
    """
    preservation = preservation or plan.job.preservation
    job, transformer = plan.job, plan.source.config["transformer"]
    lora = job.lora if job.model.mode == "lora" else None
    dtype = COMPUTE_DTYPES[job.training.weight_dtype]
    weights = model_weights(transformer, plan.modalities, lora, job.optimizer.groups, dtype)
    connectors = 0
    if plan.connectors_path is not None:
        with on_meta():
            connectors = sum(p.numel() for p in TextConnectors.from_config(plan.source.config).parameters())
    keys = {index: plan.dataset.shape_key(index) for index in range(len(plan.dataset))}
    costs = {index: plan.sample_flops(index) for index in keys}
    mean = sum(costs.values()) / len(costs)
    # Time follows the mean cost, since batches are balanced by FLOPs; memory follows the largest sample.
    # The sample nearest to the mean cost rather than mean token counts, because attention is quadratic in them.
    typical = stream_tokens(keys[min(costs, key=lambda index: abs(costs[index] - mean))], plan.modalities)
    largest = stream_tokens(keys[max(costs, key=lambda index: costs[index])], plan.modalities)
    return Workload(
        transformer=transformer,
        trained=job.model.mode,
        block=weights.block,
        outside=weights.outside,
        connectors=connectors,
        num_layers=TransformerConfig.from_metadata(transformer).num_layers,
        video_tokens=typical.video_tokens,
        audio_tokens=typical.audio_tokens,
        text_tokens=typical.text_tokens,
        # A condition can make tokens clean: their timestep is 0, that of the others is the sample's sigma.
        video_timesteps=2 if any(part.strategy.video and part.strategy.video.conditions for part in plan.parts) else 1,
        audio_timesteps=2 if any(part.strategy.audio and part.strategy.audio.conditions for part in plan.parts) else 1,
        largest=(largest.video_tokens, largest.audio_tokens),
        global_batch_size=job.training.global_batch_size,
        itemsize=COMPUTE_DTYPES[job.training.dtype].itemsize,
        quantized=weights.quantized,
        optimizer=job.optimizer.name,
        offload_state=job.optimizer.offload_state,
        in_backward=job.optimizer.in_backward,
        ema=job.optimizer.ema_decay is not None,
        passes=preservation.passes,
        base_passes=len(preservation.parts),
    )


# GPUs whose link is slower are taken to be on PCIe, where drivers seldom let them read each other's memory.
_NVLINK = 100e9


def make_setup(job: JobConfig, degrees: Degrees, gpu: str = "h100") -> Setup:
    """Describes how a job runs on a mesh of a kind of GPU."""
    backend, parallelism = job.kernels.backend, job.parallelism
    # As parallel/static_slots.py decides for weights that are the same in every block.
    static_slots = parallelism.fsdp_static_slots != "off" and not (parallelism.cpu_offload or job.float8.all_gather)
    copy_engines = static_slots and parallelism.fsdp_copy_engines != "off" and has_peer_memory(GPUS[gpu], degrees)
    wanted = parallelism.fsdp_exchange_gradients
    return Setup(
        degrees=degrees,
        recompute=job.activation_checkpoint.mode,
        k=job.activation_checkpoint.k or 1,
        local_batch_size=job.training.local_batch_size,
        compile=job.compile.enable,
        graphs=job.compile.graphs != "off" and obstacle(job, degrees, torch.device("cuda")) is None,
        kernels=backend == "triton" or (backend == "auto" and has_measured_kernels(gpu)),
        float8=job.float8.recipe,
        float8_all_gather=job.float8.all_gather,
        base_in_float8=multiplies_base_in_float8(job, gpu),
        offload_activations=job.activation_checkpoint.offload,
        cpu_offload=job.parallelism.cpu_offload,
        # "auto" depends on a GPU's memory: see budget.py.
        stream_blocks=0 if job.parallelism.stream_blocks == "auto" else job.parallelism.stream_blocks,
        static_slots=static_slots,
        copy_engines=copy_engines,
        exchanges_gradients=static_slots and (wanted == "on" or (wanted == "auto" and copy_engines)),
    )


def has_peer_memory(gpu: Gpu, degrees: Degrees) -> bool:
    """Whether the ranks that shard the weights can read each other's memory, for a GPU that this machine may not have.

    On the machine itself `parallel.peer_memory.obstacle` tells.
    """
    ranks = degrees.dp_shard * degrees.cp
    return ranks > 1 and ranks * degrees.tp <= gpu.gpus_per_node and gpu.nvlink >= _NVLINK


def multiplies_base_in_float8(job: JobConfig, gpu: str) -> bool:
    """Whether `lora.float8_matmuls` lets a job multiply its frozen base in float8."""
    # As weights/quantized.py decides, but for a GPU that this machine may not have.
    is_float8 = job.model.mode == "lora" and job.lora.base_dtype == "float8" and job.training.dtype == "bfloat16"
    return is_float8 and job.lora.float8_matmuls != "off" and GPUS[gpu].matmul_float8 > GPUS[gpu].matmul


def has_measured_kernels(gpu: str) -> bool:
    """Whether `kernels.backend = "auto"` chooses the Triton kernels: only where they were measured to be faster."""
    # `auto` as in model/kernel_ops.py, but for a GPU that this machine may not have.
    return gpu in ("h100", "h200")
