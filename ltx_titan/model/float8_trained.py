"""A trained linear layer whose three matmuls are in float8.

    y  = s_x (x8 W8^T) s_w + b                    W8 s_w = W, rows quantized to e4m3 with one scale each
    dx = s_g (g8 W8)                              g8 s_g = g s_w, one scale per token
    dW = (S / s_w) ((g8 s_g s_x / S)^T x8)        S = max s_g s_x over the tokens;   db = sum g

Every quantization is along rows, in the pass that writes its operand, where a compiler fuses it. The gradient of the
weight sums over tokens, so their scales cannot be taken out of the sum. They are powers of two instead, and one factor
takes both: g8 s_g s_x / S is exact, but for numbers that are 2^-15 of the largest, and costs no pass, because Hopper
needs g8 transposed anyway. No tensor is read for its largest value first, and none is quantized twice.

The weight is quantized on use, in both passes: 6 bytes of traffic per bfloat16 weight and step, and no memory. Nothing
but the weight is a parameter, so FSDP2, checkpoints and exports see a plain linear layer. For the backward pass the
quantized input is saved, half of its bfloat16.

On a CPU, which has no float8 matmuls, the operations multiply the same numbers in float32.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.model.float8_linear import FLOAT8_MULTIPLE, multiply, quantize
from ltx_titan_kernels.formulas import FLOAT8_MAX, quantize_tokens

_E4M3 = torch.float8_e4m3fn


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
    g: Tensor, g_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiplies quantized gradients by the transposed weight, quantized here, without its scales.

    Args:
        g, g_scale: gradients times the weight's scales, e4m3 [tokens, out] and float32 [tokens, 1].
        weight: [out, in].
        scale: of its rows [out], from the forward pass.
        dtype: of the result.

    Returns:
        [tokens, in].
    """
    if g.is_cuda:
        # Here, not above: Triton is not installed everywhere.
        from ltx_titan_kernels.float8_weights import quantize_transposed

        transposed, ones = quantize_transposed(weight, scale)
    else:
        q = (weight.float() / scale[:, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(_E4M3)
        transposed, ones = q.t(), g_scale.new_ones(1, weight.shape[1])
    return multiply(g, g_scale, transposed, ones, None, dtype)


@float8_trained_linear_backward.register_fake
def _(g: Tensor, g_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape[0], weight.shape[1], dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_weight_gradient", mutates_args=())
def float8_weight_gradient(
    g: Tensor, g_scale: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """Multiplies quantized gradients and tokens, both with scales that are powers of two.

    Args:
        g, g_scale: gradients times the weight's scales, e4m3 [tokens, out] and float32 [tokens, 1].
        x, x_scale: tokens, e4m3 [tokens, in] and float32 [tokens, 1].
        scale: of the weight's rows [out].
        dtype: of the result.

    Returns:
        [out, in].
    """
    scales = (g_scale * x_scale).flatten()
    largest = scales.max()
    if not g.is_cuda:
        g = (g.float() * (scales / largest)[:, None]).to(_E4M3)
        return ((g.float().t() @ x.float()) * (largest / scale)[:, None]).to(dtype)
    from ltx_titan_kernels.float8 import transpose_bytes
    from ltx_titan_kernels.float8_weights import quantize_transposed

    # The number of tokens is summed over. Zeros add nothing.
    if missing := -len(g) % FLOAT8_MULTIPLE:
        g, x = (F.pad(t.view(torch.uint8), (0, 0, 0, missing)).view(_E4M3) for t in (g, x))
        scales = F.pad(scales, (0, missing), value=1.0)
    transposed, _ = quantize_transposed(g, largest / scales)
    inputs, _ = transpose_bytes([x])
    ones = scale.new_ones(len(inputs), 1)
    return multiply(transposed, (largest / scale)[:, None], inputs, ones.t(), None, dtype, is_exact=True)


@float8_weight_gradient.register_fake
def _(g: Tensor, g_scale: Tensor, x: Tensor, x_scale: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape[1], x.shape[1], dtype=dtype)


class _TrainedFloat8(torch.autograd.Function):
    """`apply(x, weight, bias, is_trained)`; a function, so that a compiler fuses quantization with what it reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, is_trained: bool) -> Tensor:
        """The layer's output [tokens, out]."""
        x8, x_scale = quantize_tokens(x, powers_of_two=True)
        y, scale = float8_trained_linear(x8, x_scale, weight, bias, x.dtype)
        ctx.save_for_backward(weight, scale, *([x8, x_scale] if is_trained else []))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x`, `weight` and `bias`."""
        weight, scale, *inputs = ctx.saved_tensors
        g8, g_scale = quantize_tokens(grad, scale, powers_of_two=True)
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = float8_trained_linear_backward(g8, g_scale, weight, scale, grad.dtype)
        if ctx.needs_input_grad[1]:
            dw = float8_weight_gradient(g8, g_scale, *inputs, scale, grad.dtype)
        if ctx.needs_input_grad[2]:
            db = grad.sum(0)
        return dx, dw, db, None


class Float8TrainedLinear(nn.Linear):
    """A linear layer with the matmuls above; widths are multiples of 16."""

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "Float8TrainedLinear":
        """A layer with the same parameters."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        weight = self.weight
        y = _TrainedFloat8.apply(x.flatten(0, -2), weight, self.bias, weight.requires_grad)
        return y.unflatten(0, x.shape[:-1])
