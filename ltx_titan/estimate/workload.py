"""What an estimate is about: the weights, the tokens and the way a job is run, as numbers without a model or a mesh."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from torch import nn

from ltx_titan.config import Degrees
from ltx_titan.model.flops import Trained
from ltx_titan.parallel.tp import placement_of

Recompute = Literal["none", "full", "selective", "every_k"]


@dataclass(frozen=True)
class Weight:
    """A parameter: its whole shape, bytes per element as stored, the dim that tensor parallelism cuts (None: none)."""

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
        """From a model's parameters, by their official names; the meta device will do."""
        items = []
        for name, parameter in named:
            placement = placement_of(name, parameter.shape)
            tp_dim = None if placement.is_replicate() else placement.dim
            items.append(Weight(tuple(parameter.shape), parameter.element_size(), parameter.requires_grad, tp_dim))
        return cls(tuple(items))

    @property
    def count(self) -> int:
        """All weights."""
        return sum(prod(weight.shape) for weight in self.items)

    @property
    def trained(self) -> int:
        """Weights that are trained."""
        return sum(prod(weight.shape) for weight in self.items if weight.is_trained)

    def gathered(self, tp: int, *, trained_only: bool = False) -> int:
        """Elements that a rank has while the unit is gathered."""
        return sum(prod(w.after_tp(tp)) for w in self.items if w.is_trained or not trained_only)

    def sharded(self, degrees: Degrees, *, trained_only: bool = False) -> tuple[int, int]:
        """Elements and stored bytes of the fullest rank's shards: FSDP2 cuts dim 0 and gives the first ranks more."""
        ranks = degrees.dp_shard * degrees.cp
        elements = size = 0
        for weight in self.items:
            if weight.is_trained or not trained_only:
                first, *rest = weight.after_tp(degrees.tp) or (1,)
                part = -(-first // ranks) * prod(rest)
                elements += part
                size += part * weight.itemsize
        return elements, size


@dataclass(frozen=True)
class Workload:
    """What is trained on what; the same for every mesh.

    Attributes:
        transformer: the `transformer` section of the checkpoint's config.
        trained: "full" or "lora".
        block: weights of one block.
        outside: weights of the transformer outside its blocks.
        connectors: weights of resident, frozen text connectors; 0 where the data holds finished contexts.
        num_layers: blocks.
        video_tokens, audio_tokens: tokens of a sample, references included; 0 where the stream is absent.
        text_tokens: of the prompt.
        video_timesteps, audio_timesteps: distinct ones in a sample: 2 where a condition can give clean tokens.
        largest: (video, audio) tokens of the largest sample, which decides memory.
        global_batch_size: samples in an optimizer step.
        itemsize: bytes of the compute dtype.
        quantised: weights of a block that are kept in 8 or 4 bits.
        optimizer: name of the update rule.
        offload_state, in_backward, ema: as in `[optimizer]`.
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
    quantised: int = 0
    optimizer: str = "adamw"
    offload_state: bool = False
    in_backward: bool = False
    ema: bool = False

    @property
    def video_width(self) -> int:
        """Width of the video stream."""
        heads = self.transformer.get("num_attention_heads", 32)
        return heads * self.transformer.get("attention_head_dim", 128)

    @property
    def audio_width(self) -> int:
        """Width of the audio stream."""
        heads = self.transformer.get("audio_num_attention_heads", 32)
        return heads * self.transformer.get("audio_attention_head_dim", 64)

    @property
    def heads(self) -> int:
        """Heads of an attention, the same in both streams."""
        return self.transformer.get("num_attention_heads", 32)

    @property
    def weights(self) -> int:
        """Weights of the transformer."""
        return self.num_layers * self.block.count + self.outside.count

    @property
    def trained_weights(self) -> int:
        """Weights that are trained."""
        return self.num_layers * self.block.trained + self.outside.trained


@dataclass(frozen=True)
class Setup:
    """How it is run: what a search varies.

    Attributes:
        degrees: the mesh.
        recompute: activation checkpointing.
        k: one block in `k` is recomputed (`every_k`).
        local_batch_size: samples in a forward.
        compile: blocks are compiled.
        kernels: norms and modulation are fused kernels, which pick a token's timestep without writing it out.
        float8: recipe, or "none".
        float8_all_gather: weights travel as float8.
        offload_activations: inputs of recomputed blocks wait in host memory.
        cpu_offload: weights, gradients and optimizer state are in host memory.
    """

    degrees: Degrees
    recompute: Recompute = "none"
    k: int = 1
    local_batch_size: int = 1
    compile: bool = False
    kernels: bool = False
    float8: str = "none"
    float8_all_gather: bool = False
    offload_activations: bool = False
    cpu_offload: bool = False

    @property
    def gpus(self) -> int:
        """World size."""
        return self.degrees.dp * self.degrees.cp * self.degrees.tp

    @property
    def fsdp(self) -> int:
        """Ranks that share the shards."""
        return self.degrees.dp_shard * self.degrees.cp

    def recomputed_share(self) -> float:
        """Share of the blocks that run their forward twice."""
        return {"none": 0.0, "every_k": 1 / self.k}.get(self.recompute, 1.0)
