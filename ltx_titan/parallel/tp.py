"""Tensor parallelism with sequence parallelism: heads and hidden units over ranks, tokens over the same ranks between.

    norm, modulate      own tokens
      -> gather tokens
    to_q to_k to_v to_gate_logits, net.0.proj     own heads or hidden units of all tokens (column-wise)
    to_out.0, net.2                               their share of the result for all tokens (row-wise)
      -> sum, own tokens only
    gate, add           own tokens

q_norm and k_norm span all heads: their sum of squares is summed over ranks, in float32. Every head is rotated by angles
of its own, so a rank is told which heads it has (`Attention.share`).

Parameters become DTensors on the tp axis under their own names. The model's code meets local tensors: reading a
parameter's attribute gives its local part. Parameters that are not split serve own tokens, own heads or an own share of
a sum, so their gradients are partial; DTensor carries that, and FSDP2 sums them before it reduces.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

from ltx_titan.model import LTXTransformer
from ltx_titan.model.attention import Attention, FeedForward
from ltx_titan.model.ops import HeadShare
from ltx_titan.parallel.collectives import Axis, gather, scatter_sum, sum_over
from ltx_titan.parallel.mesh import Mesh
from ltx_titan.parallel.tokens import TokenLayout

# Below an attention or feed-forward. An adapter stands in the layer's place, with children base, lora_A and lora_B.
_LAYER = re.compile(
    r"\.(?:(?P<column>to_q|to_k|to_v|to_gate_logits|net\.0\.proj)|(?P<row>to_out\.0|net\.2)|(?P<norm>q_norm|k_norm))"
    r"(?:\.(?P<child>base|lora_A|lora_B))?(?:\.(?P<kind>weight|bias|qdata|scale))?$"
)

# Attention whose keys come from the other stream's tokens, which are split as well; text is not.
_BETWEEN_STREAMS = ("audio_to_video_attn", "video_to_audio_attn")


def apply_tensor_parallel(model: LTXTransformer, mesh: Mesh, layout: TokenLayout) -> None:
    """Splits the layers of `model` over the tp axis, in place.

    Args:
        model: its tokens are split by `shard_tokens`; parameters may be on the meta device.
        mesh: the job's mesh; heads and hidden units divide by its tp degree.
        layout: what `shard_tokens` returned.
    """
    tp = layout.tp
    _exchange_tokens(model, tp)
    tp_mesh = mesh.parameters["tp"]
    for path, module in model.named_modules():
        readings = []
        for name, parameter in list(module.named_parameters(recurse=False)):
            full_name = f"{path}.{name}" if path else name
            placement = placement_of(full_name, parameter.shape)
            split = distribute_tensor(parameter.data, tp_mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
            divisor = tp.size if _is_row_bias(full_name) else 1
            readings.append(_Reading(name, placement.is_replicate(), divisor))
        if readings:
            module.__class__ = _reading_local_parameters(type(module), tuple(readings))


def placement_of(name: str, shape: Sequence[int]) -> Placement:
    """Where the tp axis cuts a parameter of the transformer: Shard(dim), or Replicate() outside the split layers.

    Args:
        name: official name, with an adapter's levels where there is one.
        shape: of the whole parameter.
    """
    layer = _LAYER.search(name)
    if layer is None or _is_row_bias(name):
        return Replicate()
    if layer["norm"]:
        return Shard(0)
    if layer["column"]:
        # An adapter's A makes the same few numbers on all ranks, its B own heads' part from them.
        return Replicate() if layer["child"] == "lora_A" else Shard(0)
    if layer["kind"] == "scale" and shape[1] == 1:
        # A quantised weight with one scale for a whole row, of which each rank has a piece.
        return Replicate()
    # An adapter's A sums over own inputs only, its B carries that share of the sum on.
    return Replicate() if layer["child"] == "lora_B" else Shard(1)


def _is_row_bias(name: str) -> bool:
    layer = _LAYER.search(name)
    return layer is not None and layer["row"] is not None and layer["kind"] == "bias"


def _exchange_tokens(model: LTXTransformer, tp: Axis) -> None:
    """Puts the collectives around each attention and feed-forward, and into the norms of queries and keys."""

    def enter_attention(_: Attention, args: tuple) -> tuple:
        x, *context = args
        return gather(x, 1, tp), *context

    def enter_attention_between_streams(_: Attention, args: tuple) -> tuple:
        return tuple(gather(x, 1, tp) for x in args)

    def enter_feed_forward(_: FeedForward, args: tuple) -> tuple:
        return tuple(gather(x, 1, tp) for x in args)

    def leave(_: nn.Module, args: tuple, out: Tensor) -> Tensor:
        return scatter_sum(out, 1, tp)

    def sum_statistic(statistic: Tensor) -> Tensor:
        return sum_over(statistic, tp)

    # The same function objects on every block: they are part of what a compiled block is checked against.
    for block in model.transformer_blocks:
        for name, child in block.named_children():
            if isinstance(child, Attention):
                width = child.q_norm.weight.shape[0]
                child.share = HeadShare(tp.rank * width // child.head_dim // tp.size, width, sum_statistic)
                enter = enter_attention_between_streams if name in _BETWEEN_STREAMS else enter_attention
                child.register_forward_pre_hook(enter)
            else:
                assert isinstance(child, FeedForward), f"no tensor-parallel plan for {name}"
                child.register_forward_pre_hook(enter_feed_forward)
            child.register_forward_hook(leave)


class _Reading(NamedTuple):
    """How a module's code reads one of its parameters.

    Attributes:
        name: the parameter.
        is_whole: each rank has all of it, and makes a part of its gradient.
        divisor: what is read is the parameter over this: a bias that ranks add to a sum must enter it once.
    """

    name: str
    is_whole: bool
    divisor: int


@cache
def _reading_local_parameters(base: type[nn.Module], readings: tuple[_Reading, ...]) -> type[nn.Module]:
    """`base` whose attributes give parameters as local tensors; `named_parameters` and `state_dict` give DTensors.

    One class per kind of module, not per module: compiled blocks share their code by class.
    """

    def reader(reading: _Reading) -> property:
        name, divisor = reading.name, reading.divisor
        placements = (Partial(),) if reading.is_whole else None

        def read(module: nn.Module) -> Tensor:
            parameter = module._parameters[name]
            if len(parameter.placements) > 1:
                # Not gathered by FSDP2 yet, so it is not the model's code that reads, but FSDP2 or torchao.
                return parameter
            local = parameter.to_local(grad_placements=placements)
            return local if divisor == 1 else local / divisor

        return property(read)

    return type(base.__name__, (base,), {reading.name: reader(reading) for reading in readings})
