"""Trained linear layers whose three matmuls are in float8.

    y  = s_x (x8 W8^T) s_w + b                W8 s_w = W, rows quantized to e4m3 with one scale each
    dx = s_g (g8 Wt8) c                       g8 s_g = g, one scale per token;  Wt8 c = W^T,  c = max s_w
    dW = S (g8 s_g s_x / S)^T x8              S = max s_g s_x over the tokens;  db = sum g

Tokens and gradients are quantized along rows, in one pass that also adds up the gradient of the bias, and in a
feed-forward applies GELU or its gradient. The gradient of the weight sums over tokens, so their scales cannot be taken
out of the sum. They are powers of two instead, and one factor takes both: g8 s_g s_x / S is exact, but for numbers that
are 2^-15 of the largest, and costs no pass, because Hopper needs g8 transposed anyway. No tensor is read for its
largest value first, and none is quantized twice.

Layers of one input are one operation: it is quantized and transposed once, and their gradients are quantized as one
tensor, so that its gradient is one matmul with their joined weights, instead of a sum over layers.

The weight is quantized on use, in both passes: 6 bytes of traffic per bfloat16 weight and step, and no memory. The
gradient of the input sums over the weights' rows, so that these have one scale there. Nothing but the weight is a
parameter, so FSDP2, checkpoints and exports see plain linear layers. For the backward pass the quantized input is
saved, half of its bfloat16.

On a CPU, which has no float8 matmuls, the operations multiply the same numbers in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.model.float8_linear import FLOAT8_MULTIPLE, multiply, quantize
from ltx_titan_kernels.formulas import FLOAT8_MAX, MAX_WIDTH, quantize_tokens

_E4M3 = torch.float8_e4m3fn
_JOINED = 3  # tensors that the kernel joins at most
FEWEST_TRAINED_TOKENS = 1280
"""Fewer tokens (text) do not repay the casts. A weight's cost 6 bytes, 2.1 ps on an H100. A token gains 3.4 fs for each
weight of 4,096 x 4,096 in three matmuls, of which its own casts take 0.8: even at 800 tokens with large matmuls, and
at 1,000 with those of so few tokens."""


@torch.library.custom_op("ltx_titan::float8_rows", mutates_args=())
def float8_rows(
    x: Tensor, gradient: Tensor | None, is_gelu: bool, has_sum: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes x, gelu(x) or the gradient of gelu, with scales that are powers of two; not differentiable.

    Args:
        x: [tokens, width].
        gradient: of gelu(x), to quantize that of x; None for none.
        is_gelu: whether to apply GELU, with the approximation by tanh.
        has_sum: whether to add up what is quantized over the tokens.
        dtype: of the sums.

    Returns:
        e4m3 [tokens, width], scales [tokens, 1] float32, and sums [width], or an empty tensor.
    """
    if x.is_cuda:
        # Here, not above: Triton is not installed everywhere.
        from ltx_titan_kernels.float8_rows import quantize_rows

        q, scale, sums = quantize_rows(x, gradient, is_gelu=is_gelu, has_sum=has_sum)
        return q, scale, sums.to(dtype)
    wide = x.float()
    if gradient is not None:
        wide = torch.ops.aten.gelu_backward(gradient.float(), wide, approximate="tanh")
    elif is_gelu:
        wide = F.gelu(wide, approximate="tanh")
    sums = wide.sum(0) if has_sum else wide.new_empty(0)
    return *quantize_tokens(wide, powers_of_two=True), sums.to(dtype)


@float8_rows.register_fake
def _(
    x: Tensor, gradient: Tensor | None, is_gelu: bool, has_sum: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=_E4M3), scale, x.new_empty(x.shape[1] * has_sum, dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_joined_rows", mutates_args=())
def float8_joined_rows(xs: list[Tensor], has_sum: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`float8_rows` of several tensors [tokens, width] as if their columns were joined."""
    width = sum(x.shape[1] for x in xs)
    if 2 <= len(xs) <= _JOINED and xs[0].is_cuda and width <= MAX_WIDTH:
        from ltx_titan_kernels.float8_rows import quantize_parts

        q, scale, sums = quantize_parts(xs, has_sum=has_sum)
        return q, scale, sums.to(dtype)
    q, scale, sums = float8_rows(torch.cat(xs, dim=1), None, False, has_sum, dtype)
    return q, scale, sums


@float8_joined_rows.register_fake
def _(xs: list[Tensor], has_sum: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = len(xs[0]), sum(x.shape[1] for x in xs)
    scale = xs[0].new_empty(tokens, 1, dtype=torch.float32)
    return xs[0].new_empty(tokens, width, dtype=_E4M3), scale, xs[0].new_empty(width * has_sum, dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_trained_linear", mutates_args=())
def float8_trained_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Multiplies quantized tokens by a weight that is quantized here; not differentiable.

    Args:
        x, x_scale: tokens, e4m3 [tokens, in] and float32 [tokens, 1].
        weight: [out, in].
        bias: [out], or None.
        dtype: of the result.

    Returns:
        [tokens, out], and the scales of the weight's rows [out], float32.
    """
    q, scale = quantize(weight)
    return multiply(x, x_scale, q, scale.t(), bias, dtype), scale.flatten()


@float8_trained_linear.register_fake
def _(x: Tensor, x_scale: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype), x_scale.new_empty(weight.shape[0])


@torch.library.custom_op("ltx_titan::float8_trained_linear_backward", mutates_args=())
def float8_trained_linear_backward(
    g: Tensor, g_scale: Tensor, weights: list[Tensor], scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiplies quantized gradients by transposed weights whose rows are joined, quantized here.

    Args:
        g, g_scale: gradients, e4m3 [tokens, out_1 + out_2 + ...] and float32 [tokens, 1].
        weights: [out_i, in] each.
        scale: of all weights, one float32 value.
        dtype: of the result.

    Returns:
        [tokens, in].
    """
    if g.is_cuda:
        from ltx_titan_kernels.float8_weights import quantize_transposed

        transposed, scales = quantize_transposed(weights, scale, scale)
        return multiply(g, g_scale, transposed, scales, None, dtype)
    q = (torch.cat(weights).float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(_E4M3)
    return multiply(g, g_scale, q.t(), scale.expand(1, q.shape[1]), None, dtype)


@float8_trained_linear_backward.register_fake
def _(g: Tensor, g_scale: Tensor, weights: list[Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape[0], weights[0].shape[1], dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_weight_gradient", mutates_args=())
def float8_weight_gradient(g: Tensor, x: Tensor, divisors: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies quantized gradients and tokens, both with scales that are powers of two.

    Args:
        g: gradients, e4m3 [tokens, out].
        x: tokens, e4m3 [tokens, in].
        divisors: of each token of g, the largest product of scales over its own, float32 [tokens].
        largest: product of the scales of a token of g and x, one float32 value.
        dtype: of the result.

    Returns:
        [out, in].
    """
    if not g.is_cuda:
        g = (g.float() / divisors[:, None]).to(_E4M3)
        return ((g.float().t() @ x.float()) * largest).to(dtype)
    from ltx_titan_kernels.float8 import transpose_bytes
    from ltx_titan_kernels.float8_weights import quantize_transposed

    # The number of tokens is summed over. Zeros add nothing.
    if missing := -len(g) % FLOAT8_MULTIPLE:
        g, x = (F.pad(t.view(torch.uint8), (0, 0, 0, missing)).view(_E4M3) for t in (g, x))
        divisors = F.pad(divisors, (0, missing), value=1.0)
    transposed, factors = quantize_transposed([g], divisors, largest)
    inputs, ones = transpose_bytes([x])
    return multiply(transposed, factors.t(), inputs, ones, None, dtype, is_exact=True)


@float8_weight_gradient.register_fake
def _(g: Tensor, x: Tensor, divisors: Tensor, largest: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape[1], x.shape[1], dtype=dtype)


def _weight_gradient(g: Tensor, g_scale: Tensor, x: Tensor, x_scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Where a compiler sees them: they are small.
    scales = (g_scale * x_scale).flatten().clamp(min=torch.finfo(torch.float32).tiny)
    largest = scales.amax(0, keepdim=True)
    return float8_weight_gradient(g, x, largest / scales, largest, dtype)


class _TrainedFloat8(torch.autograd.Function):
    """`apply(x, are_trained, *weights, *biases)`: layers of one input and one width; biases may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, are_trained: bool, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        """The layers' outputs [tokens, out]."""
        count = len(parameters) // 2
        weights, biases = parameters[:count], parameters[count:]
        x8, x_scale, _ = float8_rows(x, None, False, False, x.dtype)
        ys, scales = [], []
        for weight, bias in zip(weights, biases, strict=True):
            y, scale = float8_trained_linear(x8, x_scale, weight, bias, x.dtype)
            ys.append(y)
            scales.append(scale.amax(0, keepdim=True))
        largest = scales[0] if count == 1 else torch.cat(scales).amax(0, keepdim=True)
        ctx.save_for_backward(*weights, largest, *([x8, x_scale] if are_trained else []))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x`, weights and biases."""
        count, dtype = len(grads), grads[0].dtype
        saved = list(ctx.saved_tensors)  # read once: reading recomputes under activation checkpointing
        weights, (scale, *inputs) = saved[:count], saved[count:]
        needs_dx, _, *needed = ctx.needs_input_grad
        has_sum = any(needed[count:])
        if count == 1:
            g8, g_scale, sums = float8_rows(grads[0], None, False, has_sum, dtype)
        else:
            g8, g_scale, sums = float8_joined_rows(list(grads), has_sum, dtype)
        dx = float8_trained_linear_backward(g8, g_scale, weights, scale, dtype) if needs_dx else None
        gradients: list[Tensor | None] = [None] * (2 * count)
        width = len(weights[0])
        if any(needed[:count]):
            gradients[:count] = _weight_gradient(g8, g_scale, inputs[0], inputs[1], dtype).split(width)
        if has_sum:
            gradients[count:] = sums.split(width)
        return dx, None, *(g if needs else None for g, needs in zip(gradients, needed, strict=True))


class _TrainedFeedForward(torch.autograd.Function):
    """`apply(x, weight1, bias1, weight2, bias2, are_trained)`: two layers with tanh GELU between them.

    Its input is quantized with GELU, and its gradient with that of GELU: neither is written in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
        are_trained: bool,
    ) -> Tensor:
        """The second layer's output [tokens, out]."""
        x8, x_scale, _ = float8_rows(x, None, False, False, x.dtype)
        z, scale1 = float8_trained_linear(x8, x_scale, weight1, bias1, x.dtype)
        a8, a_scale, _ = float8_rows(z, None, True, False, x.dtype)
        y, scale2 = float8_trained_linear(a8, a_scale, weight2, bias2, x.dtype)
        scales = scale1.amax(0, keepdim=True), scale2.amax(0, keepdim=True)
        ctx.save_for_backward(z, weight1, weight2, *scales, *([x8, x_scale, a8, a_scale] if are_trained else []))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, and of weight and bias of both layers."""
        z, weight1, weight2, scale1, scale2, *inputs = ctx.saved_tensors
        needs_dx, needs_dw1, needs_db1, needs_dw2, needs_db2, _ = ctx.needs_input_grad
        dtype = grad.dtype
        g8, g_scale, db2 = float8_rows(grad, None, False, needs_db2, dtype)
        dw2 = _weight_gradient(g8, g_scale, inputs[2], inputs[3], dtype) if needs_dw2 else None
        da = float8_trained_linear_backward(g8, g_scale, [weight2], scale2, dtype)
        g8, g_scale, db1 = float8_rows(z, da, True, needs_db1, dtype)
        dw1 = _weight_gradient(g8, g_scale, inputs[0], inputs[1], dtype) if needs_dw1 else None
        dx = float8_trained_linear_backward(g8, g_scale, [weight1], scale1, dtype) if needs_dx else None
        return dx, dw1, db1 if needs_db1 else None, dw2, db2 if needs_db2 else None, None


def apply_trained(x: Tensor, layers: Sequence["Float8TrainedLinear"]) -> list[Tensor]:
    """Applies layers of one input [..., in] and one width as one operation: [..., out] each; few tokens unrounded."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if x.shape[:-1].numel() < layers[0].fewest_tokens:
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    are_trained = any(weight.requires_grad for weight in weights)
    ys = _TrainedFloat8.apply(x.flatten(0, -2), are_trained, *weights, *biases)
    return [y.unflatten(0, x.shape[:-1]) for y in ys]


def feed_forward(x: Tensor, first: nn.Module, second: nn.Module) -> Tensor | None:
    """`second(gelu(first(x)))` as one operation [..., out], if both are trained float8 layers and tokens are many."""
    if not isinstance(first, Float8TrainedLinear) or not isinstance(second, Float8TrainedLinear):
        return None
    if x.shape[:-1].numel() < first.fewest_tokens:
        return None
    # Each is read once: reading them may be a copy (tensor parallelism).
    weight1, weight2 = first.weight, second.weight
    are_trained = weight1.requires_grad or weight2.requires_grad
    y = _TrainedFeedForward.apply(x.flatten(0, -2), weight1, first.bias, weight2, second.bias, are_trained)
    return y.unflatten(0, x.shape[:-1])


class Float8TrainedLinear(nn.Linear):
    """A linear layer with the matmuls above; widths are multiples of 16.

    Attributes:
        fewest_tokens: fewer are multiplied in their own dtype.
    """

    fewest_tokens: int = 0

    @classmethod
    def from_linear(cls, linear: nn.Linear, fewest_tokens: int = 0) -> "Float8TrainedLinear":
        """A layer with the same parameters."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.fewest_tokens = linear.weight, linear.bias, fewest_tokens
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        return apply_trained(x, [self])[0]
