"""Frozen linear layers of one input and their low-rank adapters as one operation.

    z = x [A_1; A_2; ...; N]^T        y_i = (b_i + s_i z_i B_i^T) + x W_i^T        n = x N^T
    x [tokens, in], A_i [rank, in], B_i [out, rank], N [rows, in]: a narrow frozen layer, such as the gate of attention

Adapters are narrow: their matmuls read the input or the gradient of the output and compute little. Those of queries,
keys and values, and the gate's, are therefore one matmul forward, one for the gradients of all A_i and one for the
gradient of `x`, which is a sum over the layers that would take passes of its own.

The adapter's second matmul adds the bias, and the base's matmul adds to its output in place: three passes over the
output instead of five. Activation checkpointing sees one matmul as expensive as the base's, and saves the sum rather
than the base's output, from which the adapter would have to be recomputed. The backward pass of `x` is the same with
the roles of inputs and outputs exchanged.

In place is why this is an operation and no formula: `addmm` with a matrix to add copies it first.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ltx_titan.model.float8_adapted import float8_adapted_linears
from ltx_titan.model.float8_linear import FEWEST_TOKENS, fused_quantize
from ltx_titan.model.float8_trained import Float8TrainedLinear, apply_trained
from ltx_titan.model.low_rank import gradients_of_adapters, scaled


class AdaptedWeights(NamedTuple):
    """Weights of a layer, in the dtype of its input.

    Attributes:
        weight, bias: of the frozen layer, [out, in] and [out]. A float8 weight is stored as bfloat16 numbers
            [out, in / 2].
        lora_a, lora_b: of the adapter, [rank, in] and [out, rank].
        scaling: factor on the adapter.
        scale: of the rows of a float8 weight [out, 1]; None for a plain one.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    scale: Tensor | None = None


def project(
    x: Tensor, layers: Sequence[nn.Module], narrow: nn.Module | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Applies layers that share an input; trained float8 ones, or those with adapters on one kind of base, together.

    Args:
        x: [..., in].
        layers: linear, adapted (`LoRALinear`) or replaced by tensor parallelism, float8 or quantization.
        narrow: another layer, with few outputs.

    Returns:
        The outputs of `layers` [..., out], and of `narrow`.
    """
    trained = [layer for layer in layers if isinstance(layer, Float8TrainedLinear)]
    if len(trained) == len(layers) > 1 and len({len(layer.weight) for layer in trained}) == 1:
        return apply_trained(x, trained), None if narrow is None else narrow(x)
    chosen = [_adapted_weights(layer, x.dtype) for layer in layers]
    # float8 and plain bases are different operations: those like the first run together.
    first = next((weights for weights in chosen if weights is not None), None)
    if first is not None:
        chosen = [w if w is not None and (w.scale is None) == (first.scale is None) else None for w in chosen]
    adapted = [weights for weights in chosen if weights is not None]
    frozen = bias = None
    # Sharded and float8 layers are other classes.
    if adapted and type(narrow) is nn.Linear and not narrow.weight.requires_grad and narrow.weight.dtype == x.dtype:
        frozen, bias = narrow.weight, narrow.bias
    ys, n = apply_adapted(x, adapted, frozen) if adapted else ([], None)
    remaining = iter(ys)
    outputs = [layer(x) if w is None else next(remaining) for layer, w in zip(layers, chosen, strict=True)]
    if n is not None:
        return outputs, n if bias is None else n + bias
    return outputs, None if narrow is None else narrow(x)


def _adapted_weights(layer: nn.Module, dtype: torch.dtype) -> AdaptedWeights | None:
    # By attribute: adapters are a layer above the model.
    choose: Callable[[torch.dtype], AdaptedWeights | None] | None = getattr(layer, "adapted_weights", None)
    return None if choose is None else choose(dtype)


def apply_adapted(
    x: Tensor, layers: Sequence[AdaptedWeights], narrow: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Applies adapted layers to one input.

    Args:
        x: [..., in].
        layers: weights of each layer, at least one.
        narrow: frozen weight [rows, in] of another layer.

    Returns:
        The outputs of `layers` [..., out], and `x narrow^T` [..., rows].
    """
    factors = [layer.lora_a for layer in layers] + ([] if narrow is None else [narrow])
    biases = [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
    if all(layer.bias is None for layer in layers):
        biases = []
    tokens, weights = x.flatten(0, -2), [layer.weight for layer in layers]
    lora_a = factors[0] if len(factors) == 1 else torch.cat(factors)
    lora_b, scalings = [layer.lora_b for layer in layers], [layer.scaling for layer in layers]
    scales = [layer.scale for layer in layers if layer.scale is not None]
    if scales:
        # The input of a single layer comes from a gate or an activation, which a compiler fuses with the quantization;
        # that of several from a norm's kernel.
        fuses = len(layers) == 1 and narrow is None and len(tokens) >= FEWEST_TOKENS
        quantized = list(fused_quantize(tokens.detach())) if fuses else []
        outputs = float8_adapted_linears(tokens, quantized, weights, scales, biases, lora_a, lora_b, scalings)
    else:
        outputs = adapted_linears(tokens, weights, biases, lora_a, lora_b, scalings)
    ys = [y.unflatten(0, x.shape[:-1]) for y in outputs[: len(layers)]]
    return ys, None if narrow is None else outputs[len(layers)].unflatten(0, x.shape[:-1])


@torch.library.custom_op("ltx_titan::adapted_linears", mutates_args=())
def adapted_linears(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], lora_a: Tensor, lora_b: list[Tensor], scalings: list[float]
) -> list[Tensor]:
    """Returns each y_i [tokens, out]; n [tokens, rows] if there are rows N; and z [tokens, ranks + rows].

    Differentiable in `x`, `lora_a` and `lora_b`, not in the base; z is for the backward pass.

    Args:
        x: inputs [tokens, in].
        weights: [out, in] of each frozen layer.
        biases: [out] of each frozen layer, or empty.
        lora_a: [ranks + rows, in], A of every layer, then N.
        lora_b: [out, rank] of each layer.
        scalings: factor on each adapter.
    """
    z = torch.mm(x, lora_a.t())
    ys, start = [], 0
    for i, (weight, b, scaling) in enumerate(zip(weights, lora_b, scalings, strict=True)):
        part = scaled(z[:, start : start + b.shape[1]], scaling)
        y = torch.addmm(biases[i], part, b.t()) if biases else torch.mm(part, b.t())
        ys.append(y.addmm_(x, weight.t()))
        start += b.shape[1]
    # A copy, because outputs must not share memory.
    return [*ys, z[:, start:].clone(), z] if start < z.shape[1] else [*ys, z]


@adapted_linears.register_fake
def _(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], lora_a: Tensor, lora_b: list[Tensor], scalings: list[float]
) -> list[Tensor]:
    tokens, rows = x.shape[0], lora_a.shape[0] - sum(b.shape[1] for b in lora_b)
    outputs = [x.new_empty(tokens, weight.shape[0]) for weight in weights]
    if rows:
        outputs.append(x.new_empty(tokens, rows))
    return [*outputs, x.new_empty(tokens, lora_a.shape[0])]


@torch.library.custom_op("ltx_titan::adapted_linears_backward", mutates_args=())
def _adapted_linears_backward(
    dys: list[Tensor],
    dn: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_b: list[Tensor],
    z: Tensor,
    scalings: list[float],
    needs_dx: bool,
) -> list[Tensor]:
    """Returns the gradients of `lora_a` and of each of `lora_b`, and of `x` if needed; `dn` is that of n."""
    dz, dbs = gradients_of_adapters(dys, dn, lora_b, z, scalings)
    gradients = [torch.mm(dz.t(), x), *dbs]
    if needs_dx:
        dx = torch.mm(dz, lora_a)
        for dy, weight in zip(dys, weights, strict=True):
            dx.addmm_(dy, weight)
        gradients.append(dx)
    return gradients


@_adapted_linears_backward.register_fake
def _(
    dys: list[Tensor],
    dn: Tensor | None,
    x: Tensor,
    weights: list[Tensor],
    lora_a: Tensor,
    lora_b: list[Tensor],
    z: Tensor,
    scalings: list[float],
    needs_dx: bool,
) -> list[Tensor]:
    gradients = [lora_a.new_empty(lora_a.shape), *(b.new_empty(b.shape) for b in lora_b)]
    return [*gradients, x.new_empty(x.shape)] if needs_dx else gradients


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, biases, lora_a, lora_b, ctx.scalings = inputs
    ctx.layers, ctx.has_bias, ctx.has_rows = len(weights), bool(biases), len(output) > len(weights) + 1
    ctx.save_for_backward(x, lora_a, output[-1], *weights, *lora_b)
    ctx.mark_non_differentiable(output[-1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    count = ctx.layers
    x, lora_a, z, *rest = ctx.saved_tensors
    da, *others = _adapted_linears_backward(
        grads[:count],
        grads[count] if ctx.has_rows else None,
        x,
        rest[:count],
        lora_a,
        rest[count:],
        z,
        ctx.scalings,
        ctx.needs_input_grad[0],
    )
    dx = others[count] if ctx.needs_input_grad[0] else None
    return dx, [None] * count, [None] * (count if ctx.has_bias else 0), da, others[:count], None


adapted_linears.register_autograd(_backward, setup_context=_save)
