"""Frozen float8 layers of one input and their low-rank adapters as one operation; see `adapted_linear.py`.

    x8 = quantized x                             y_i = s_x (x8 Q_i^T) s_i + b_i + z_i B_i^T          z = x [A; N]^T
    g8 = quantized [dy_1 s_1, ..., dz s_A]       dx  = s_g (g8 [Q_1; Q_2; ...; A8])                  A8 s_A = [A; N]

The input is quantized once for all layers. The gradients of their outputs are quantized as one tensor, with one scale
a token, so that the gradient of the input is one matmul with the layers' joined weights: no sum over layers, and no
pass that adds the adapters, which are some more rows of the joined weight, rounded to float8 like the others. The
gradients of A and B are computed from unrounded factors.

Few tokens (audio) are multiplied in bfloat16 with weights that are dequantized on the way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltx_titan.model.float8_linear import (
    FEWEST_TOKENS,
    FLOAT8_MULTIPLE,
    multiply,
    multiply_dequantized,
    multiply_transposed,
    quantize,
)
from ltx_titan.model.low_rank import gradients_of_adapters, scaled
from ltx_titan_kernels.formulas import MAX_WIDTH, quantize_tokens

_E4M3 = torch.float8_e4m3fn


@torch.library.custom_op("ltx_titan::float8_adapted_linears", mutates_args=())
def float8_adapted_linears(
    x: Tensor,
    quantized: list[Tensor],
    qdata: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    lora_a: Tensor,
    lora_b: list[Tensor],
    scalings: list[float],
) -> list[Tensor]:
    """Returns each y_i [tokens, out]; n [tokens, rows] if there are rows N; and z [tokens, ranks + rows].

    Differentiable in `x`, `lora_a` and `lora_b`, not in the base; z is for the backward pass.

    Args:
        x: inputs [tokens, in].
        quantized: the same in e4m3 [tokens, in] with scales [tokens, 1], or empty to quantize them here.
        qdata: e4m3 weight [out, in] of each layer, as bfloat16 numbers [out, in / 2].
        scales: of their rows [out, 1].
        biases: [out] of each layer, or empty.
        lora_a: [ranks + rows, in], A of every layer, then N.
        lora_b: [out, rank] of each layer.
        scalings: factor on each adapter.
    """
    operand = None
    if x.shape[0] >= FEWEST_TOKENS:
        operand = (quantized[0], quantized[1]) if quantized else quantize(x)
    z = torch.mm(x, lora_a.t())
    ys, start = [], 0
    for i, (weight, scale, b, scaling) in enumerate(zip(qdata, scales, lora_b, scalings, strict=True)):
        part = scaled(z[:, start : start + b.shape[1]], scaling)
        bias = biases[i].to(x.dtype) if biases else None
        if operand is None:
            y = torch.mm(part, b.t()) if bias is None else torch.addmm(bias, part, b.t())
            multiply_dequantized(x, weight, scale, out=y)
        else:
            # cuBLAS adds a bias to a float8 matmul, but not a matrix.
            y = multiply(*operand, weight.view(_E4M3), scale.float().t(), bias, x.dtype).addmm_(part, b.t())
        ys.append(y)
        start += b.shape[1]
    # A copy, because outputs must not share memory.
    return [*ys, z[:, start:].clone(), z] if start < z.shape[1] else [*ys, z]


@float8_adapted_linears.register_fake
def _(
    x: Tensor,
    quantized: list[Tensor],
    qdata: list[Tensor],
    scales: list[Tensor],
    biases: list[Tensor],
    lora_a: Tensor,
    lora_b: list[Tensor],
    scalings: list[float],
) -> list[Tensor]:
    tokens, rows = x.shape[0], lora_a.shape[0] - sum(b.shape[1] for b in lora_b)
    outputs = [x.new_empty(tokens, weight.shape[0]) for weight in qdata]
    if rows:
        outputs.append(x.new_empty(tokens, rows))
    return [*outputs, x.new_empty(tokens, lora_a.shape[0])]


@torch.library.custom_op("ltx_titan::float8_adapted_linears_backward", mutates_args=())
def _float8_adapted_linears_backward(
    dys: list[Tensor],
    dn: Tensor | None,
    x: Tensor,
    qdata: list[Tensor],
    scales: list[Tensor],
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
        if x.shape[0] < FEWEST_TOKENS:
            dx = torch.mm(dz, lora_a)
            for dy, weight, scale in zip(dys, qdata, scales, strict=True):
                multiply_dequantized(dy, weight, scale, out=dx, transposed=True)
        else:
            dx = _input_gradient(dys, dz, qdata, scales, lora_a)
        gradients.append(dx)
    return gradients


@_float8_adapted_linears_backward.register_fake
def _(
    dys: list[Tensor],
    dn: Tensor | None,
    x: Tensor,
    qdata: list[Tensor],
    scales: list[Tensor],
    lora_a: Tensor,
    lora_b: list[Tensor],
    z: Tensor,
    scalings: list[float],
    needs_dx: bool,
) -> list[Tensor]:
    gradients = [lora_a.new_empty(lora_a.shape), *(b.new_empty(b.shape) for b in lora_b)]
    return [*gradients, x.new_empty(x.shape)] if needs_dx else gradients


def _input_gradient(
    dys: Sequence[Tensor], dz: Tensor, qdata: Sequence[Tensor], scales: Sequence[Tensor], lora_a: Tensor
) -> Tensor:
    """Gradient of the input [tokens, in] by one float8 matmul."""
    weights, parts, factors = [w.view(_E4M3) for w in qdata], list(dys), [scale.flatten() for scale in scales]
    joins = len(lora_a) % FLOAT8_MULTIPLE == 0
    if joins:
        a, a_scale = quantize(lora_a)
        weights, parts, factors = [*weights, a], [*parts, dz], [*factors, a_scale.flatten()]
    dx = multiply_transposed(*_quantize_joined(parts, factors), weights, dz.dtype)
    return dx if joins else dx.addmm_(dz, lora_a)


def _quantize_joined(xs: Sequence[Tensor], factors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    if xs[0].is_cuda and sum(x.shape[1] for x in xs) <= MAX_WIDTH:
        from ltx_titan_kernels import float8

        return float8.quantize_joined(xs, factors)
    return quantize_tokens(torch.cat([x.float() * f.float() for x, f in zip(xs, factors, strict=True)], dim=1))


def _save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    x, quantized, qdata, scales, biases, lora_a, lora_b, ctx.scalings = inputs
    ctx.layers, ctx.has_rows = len(qdata), len(output) > len(qdata) + 1
    ctx.lengths = len(quantized), len(biases)
    ctx.save_for_backward(x, lora_a, output[-1], *qdata, *scales, *lora_b)
    ctx.mark_non_differentiable(output[-1])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple:
    count = ctx.layers
    x, lora_a, z, *rest = ctx.saved_tensors
    da, *others = _float8_adapted_linears_backward(
        grads[:count],
        grads[count] if ctx.has_rows else None,
        x,
        rest[:count],
        rest[count : 2 * count],
        lora_a,
        rest[2 * count :],
        z,
        ctx.scalings,
        ctx.needs_input_grad[0],
    )
    dx = others[count] if ctx.needs_input_grad[0] else None
    quantized, biases = ctx.lengths
    frozen = [None] * count
    return dx, [None] * quantized, frozen, frozen, [None] * biases, da, others[:count], None


float8_adapted_linears.register_autograd(_backward, setup_context=_save)
