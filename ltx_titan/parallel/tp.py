"""Tensor parallelism with sequence parallelism: heads and hidden units are sharded within layers, tokens in between.

    norm, modulate                                own tokens
      -> all-gather of tokens
    to_q to_k to_v to_gate_logits, net.0.proj     own heads or hidden units of all tokens (column-wise)
    to_out.0, net.2                               partial sums for all tokens (row-wise)
      -> reduce-scatter to own tokens
    gate, add                                     own tokens

q_norm and k_norm span all heads: their sum of squares is all-reduced, in float32. Every head has its own RoPE
frequencies, so an attention needs the index of its first head (`Attention.share`).

Parameters become DTensors on the tp axis under their own names, while the model's code computes with local tensors:
reading a parameter as an attribute returns its local shard. Replicated parameters serve own tokens, own heads or a
partial sum, so their gradients are partial; their placement says so, and FSDP2 sums them before its own reduction.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from ltx_titan.model import LTXTransformer
from ltx_titan.model.attention import Attention, FeedForward
from ltx_titan.model.ops import HeadShare
from ltx_titan.parallel.collectives import Axis, gather, scatter_sum, sum_over
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.tokens import TokenLayout

# Names below an attention or feed-forward. An adapter replaces the layer and has children base, lora_A and lora_B.
_LAYER = re.compile(
    r"\.(?:(?P<column>to_q|to_k|to_v|to_gate_logits|net\.0\.proj)|(?P<row>to_out\.0|net\.2)|(?P<norm>q_norm|k_norm))"
    r"(?:\.(?P<child>base|lora_A|lora_B))?(?:\.(?P<kind>weight|bias|qdata|scale))?$"
)

# Attentions whose keys are tokens of the other stream, which are sharded as well; text is not.
_CROSS_MODAL = ("audio_to_video_attn", "video_to_audio_attn")


def apply_tensor_parallel(model: LTXTransformer, mesh: Mesh, layout: TokenLayout) -> None:
    """Shards the layers of `model` over the tp axis, in place.

    Args:
        model: a transformer prepared by `shard_tokens`; parameters may be on the meta device.
        mesh: the job's mesh; its tp degree divides heads and hidden units.
        layout: as returned by `shard_tokens`.
    """
    tp = layout.tp
    _register_collectives(model, tp)
    tp_mesh = mesh.parameters["tp"]
    for path, module in model.named_modules():
        views = []
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{path}.{name}" if path else name
            placement = placement_of(full_name, parameter.shape)
            # Without a source rank nothing is broadcast: each rank cuts its own shard, here of a meta tensor.
            sharded = distribute_tensor(parameter.data, tp_mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
            # The outputs of a row-wise layer are summed over ranks, so each adds its share of the bias.
            divisor = tp.size if _is_row_bias(full_name) else 1
            views.append(_LocalView(name, placement.is_replicate(), divisor))
        if views:
            _read_as_local(module, tuple(views))


def placement_of(name: str, shape: Sequence[int]) -> Placement:
    """Placement of a parameter on the tp axis: Shard(dim), or Replicate() outside the sharded layers.

    Args:
        name: official name, including an adapter's levels.
        shape: global shape of the parameter.
    """
    layer = _LAYER.search(name)
    if layer is None or _is_row_bias(name):
        return Replicate()
    if layer["norm"]:
        return Shard(0)
    if layer["column"]:
        # LoRA, y = B (A x): all ranks compute the same rank-sized A x, and B maps it to own heads.
        return Replicate() if layer["child"] == "lora_A" else Shard(0)
    if layer["kind"] == "scale" and shape[1] == 1:
        # A quantized weight with one scale per row, of which each rank has some columns.
        return Replicate()
    # LoRA: A sums over own inputs only, and B maps that partial sum.
    return Replicate() if layer["child"] == "lora_B" else Shard(1)


def shard_shape(name: str, shape: Sequence[int], tp: int) -> list[int] | None:
    """Shape of a parameter on one rank of the tp axis; None if its sharded dim does not divide.

    Args:
        name: official name, including an adapter's levels.
        shape: global shape of the parameter.
        tp: degree of tensor parallelism.
    """
    local, placement = list(shape), placement_of(name, shape)
    if isinstance(placement, Shard):
        if local[placement.dim] % tp:
            return None
        local[placement.dim] //= tp
    return local


def _is_row_bias(name: str) -> bool:
    layer = _LAYER.search(name)
    return layer is not None and layer["row"] is not None and layer["kind"] == "bias"


def _register_collectives(model: LTXTransformer, tp: Axis) -> None:
    """Registers the collectives around each attention and feed-forward, and in the norms of queries and keys."""

    def enter_attention(_: Attention, args: tuple) -> tuple:
        # [B, S / tp, D] -> [B, S, D]; text contexts are whole on every rank.
        x, *context = args
        return gather(x, 1, tp), *context

    def enter_cross_modal_attention(_: Attention, args: tuple) -> tuple:
        return tuple(gather(x, 1, tp) for x in args)

    def enter_feed_forward(_: FeedForward, args: tuple) -> tuple:
        return tuple(gather(x, 1, tp) for x in args)

    def leave(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        # Partial sums [B, S, D] -> own tokens [B, S / tp, D], half of the traffic of an all-reduce.
        return scatter_sum(out, 1, tp)

    def sum_statistic(statistic: Tensor) -> Tensor:
        return sum_over(statistic, tp)

    # The same function objects on every block: compiled code is guarded by them, and shared only if they are equal.
    for block in model.transformer_blocks:
        for name, child in block.named_children():
            if isinstance(child, Attention):
                width = child.q_norm.weight.shape[0]
                child.share = HeadShare(tp.rank * width // child.head_dim // tp.size, width, sum_statistic)
                enter = enter_cross_modal_attention if name in _CROSS_MODAL else enter_attention
                child.register_forward_pre_hook(enter)
            else:
                assert isinstance(child, FeedForward), f"no tensor-parallel plan for {name}"
                child.register_forward_pre_hook(enter_feed_forward)
            child.register_forward_hook(leave)


class _LocalView(NamedTuple):
    """Rule for reading one parameter as a local tensor.

    Attributes:
        name: of the parameter within its module.
        is_replicated: every rank holds all of it and computes a part of its gradient.
        divisor: the value read is the parameter divided by this.
    """

    name: str
    is_replicated: bool
    divisor: int


def _read_as_local(module: nn.Module, views: tuple[_LocalView, ...]) -> None:
    """Gives `module` a subclass whose properties return parameters as local tensors.

    This is how `fully_shard` and `torch.nn.utils.parametrize` extend a module, too. Hooks would not do: attention reads
    weights of its norms and layers without calling them. `named_parameters` and `state_dict` still give the DTensors.
    """
    module.__class__ = _local_class(type(module), views)  # type: ignore[arg-type]  # mypy: a class is hashable


@cache
def _local_class(base: type[nn.Module], views: tuple[_LocalView, ...]) -> type[nn.Module]:
    """A subclass of `base` with one property per view. Cached: blocks of one class share their compiled code."""
    return type(base.__name__, (base,), {view.name: _local_property(view) for view in views})


def _local_property(view: _LocalView) -> property:
    name, divisor = view.name, view.divisor
    # Declares the gradient of a replicated parameter partial, so that FSDP2 sums it over tp.
    grad_placements = (Partial(),) if view.is_replicated else None

    def read(module: nn.Module) -> Tensor:
        parameter = module._parameters[name]
        assert isinstance(parameter, DTensor)
        if len(parameter.placements) > 1:
            # Still sharded by FSDP2: FSDP2 or torchao is reading, not the model's forward.
            return parameter
        shard = parameter.to_local(grad_placements=grad_placements)
        return shard if divisor == 1 else shard / divisor

    return property(read)
