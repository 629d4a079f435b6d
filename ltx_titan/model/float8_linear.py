"""A frozen float8 layer whose matmuls are in float8.

    y = s_x (x8 Q^T) s_w + b
    dx = s_g (g8 Q)                        g8 = quantized g s_w

W = s_w Q is stored in e4m3 with one scale per row. Tokens are quantized on use, with one scale each, in the backward
pass after multiplication by the weight's scales. The matmuls are opaque operations: the transposed weight is scratch
memory of one of them, which no compiler can decide to keep.

Few tokens (audio) do not repay their quantization: they are multiplied in bfloat16 with a weight that is dequantized
on the way. Layers with adapters are in `float8_adapted.py`.

On a CPU, which has no float8 matmuls, the operations multiply the same numbers in float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltx_titan_kernels.formulas import quantize_tokens

_E4M3 = torch.float8_e4m3fn
FLOAT8_MULTIPLE = 16
"""Dims of a float8 matmul are multiples of it; in the backward pass one of them is the number of tokens."""
FEWEST_TOKENS = 256
"""Audio of ten seconds. Below it both ways wait for the weight, and cuBLAS refuses some shapes."""


@torch.library.custom_op("ltx_titan::float8_linear", mutates_args=())
def float8_linear(
    x: Tensor, x_scale: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies quantized tokens by a weight; not differentiable.

    Args:
        x, x_scale: tokens, e4m3 [tokens, in] and float32 [tokens, 1].
        qdata: e4m3 weight [out, in] as bfloat16 numbers [out, in / 2].
        scale: of its rows [out, 1].
        bias: [out], or None.
        dtype: of the result.

    Returns:
        [tokens, out].
    """
    return multiply(x, x_scale, qdata.view(_E4M3), scale.float().t(), bias, dtype)


@float8_linear.register_fake
def _(x: Tensor, x_scale: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], qdata.shape[0], dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_linear_backward", mutates_args=())
def float8_linear_backward(g: Tensor, g_scale: Tensor, qdata: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies quantized gradients by the transposed weight, without its scales.

    Args:
        g, g_scale: gradients times the weight's scales, e4m3 [tokens, out] and float32 [tokens, 1].
        qdata: e4m3 weight [out, in] as bfloat16 numbers [out, in / 2].
        dtype: of the result.

    Returns:
        [tokens, in].
    """
    return multiply_transposed(g, g_scale, [qdata.view(_E4M3)], dtype)


@float8_linear_backward.register_fake
def _(g: Tensor, g_scale: Tensor, qdata: Tensor, dtype: torch.dtype) -> Tensor:
    return g.new_empty(g.shape[0], qdata.shape[1] * 2, dtype=dtype)


def multiply(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    is_exact: bool = False,
) -> Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, e4m3, with scales [T, 1] and [1, N], plus `bias` [N].

    `is_exact` adds in float32 throughout, which takes 15 to 25 % longer.
    """
    bias = None if bias is None else bias.to(dtype)
    if x.is_cuda:
        try:
            return torch._scaled_mm(
                x,
                weight.t(),
                scale_a=x_scale,
                scale_b=w_scale,
                bias=bias,
                out_dtype=dtype,
                use_fast_accum=not is_exact,
            )
        except RuntimeError as error:
            # cuBLAS has no such kernel for a few shapes. It says so before it launches anything, so this works while a
            # graph is recorded, too.
            if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
                raise
    # bfloat16 holds every e4m3 number, so that only the result is rounded.
    wide = torch.bfloat16 if x.is_cuda else torch.float32
    y = ((x.to(wide) @ weight.to(wide).t()).float() * x_scale * w_scale).to(dtype)
    return y if bias is None else y + bias


def multiply_transposed(g: Tensor, g_scale: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """`g` [T, N], e4m3 with scales [T, 1], times weights [N_i, K] whose rows are joined: [T, K]."""
    if g.is_cuda:
        # Here, not above: Triton is not installed everywhere.
        from ltx_titan_kernels.float8 import transpose_bytes

        transposed, ones = transpose_bytes(weights)
    else:
        transposed, ones = torch.cat([w.view(torch.uint8) for w in weights]).view(_E4M3).t(), None
        ones = g_scale.new_ones(1, transposed.shape[0])
    return multiply(g, g_scale, transposed, ones, None, dtype)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [T, K] in e4m3 with one scale each [T, 1], by a kernel on a GPU."""
    if not x.is_cuda:
        return quantize_tokens(x)
    from ltx_titan_kernels import float8

    return float8.quantize_tokens(x)


class Float8Linear(torch.autograd.Function):
    """`apply(x, qdata, scale, bias)` for tokens [tokens, in]; differentiable in `x`, not in the layer.

    An autograd function, so that a compiler sees the quantization and fuses it with what makes its input: GELU, or the
    gradient of GELU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output [tokens, out]."""
        ctx.save_for_backward(qdata, scale)
        return float8_linear(*fused_quantize(x), qdata, scale, bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of `x`."""
        qdata, scale = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            dx = float8_linear_backward(*fused_quantize(grad, scale.flatten()), qdata, grad.dtype)
        return dx, None, None, None


def fused_quantize(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_tokens`, as a formula where a compiler can fuse it with what makes `x`, and by a kernel elsewhere."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return quantize_tokens(x, factor)
    from ltx_titan_kernels import float8

    return float8.quantize_tokens(x, factor)


@torch.library.custom_op("ltx_titan::few_tokens_linear", mutates_args=())
def few_tokens_linear(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """A float8 layer of a few tokens, as if its weight were dequantized to the dtype of `x`; differentiable in `x`.

    Args:
        x: [tokens, in].
        qdata: e4m3 weight [out, in] as bfloat16 numbers [out, in / 2].
        scale: of its rows [out, 1].
        bias: [out], or None.

    Returns:
        [tokens, out].
    """
    return multiply_dequantized(x, qdata, scale, bias=bias)


@few_tokens_linear.register_fake
def _(x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], qdata.shape[0])


@torch.library.custom_op("ltx_titan::few_tokens_linear_backward", mutates_args=())
def _few_tokens_linear_backward(grad: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    return multiply_dequantized(grad, qdata, scale, transposed=True)


@_few_tokens_linear_backward.register_fake
def _(grad: Tensor, qdata: Tensor, scale: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[0], qdata.shape[1] * 2)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _few_tokens_linear_backward(grad, *ctx.saved_tensors), None, None, None


few_tokens_linear.register_autograd(_backward, setup_context=_save)


def multiply_dequantized(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """`x` [T, in] times a stored weight in the dtype of `x`: [T, out], or with `transposed` [T, out] to [T, in].

    Args:
        x: tokens or gradients.
        qdata, scale: the weight, as above.
        bias: added to the product.
        out: the product is added to it in place, if given.
        transposed: multiply by the weight instead of its transpose, for the gradient of the input.
    """
    if x.is_cuda:
        from ltx_titan_kernels.few_tokens import multiply_few_tokens

        return multiply_few_tokens(x, qdata.view(_E4M3), scale, bias=bias, out=out, transposed=transposed)
    weight = (qdata.view(_E4M3).float() * scale.float()).to(x.dtype)
    matrix = weight if transposed else weight.t()
    if out is not None:
        return out.addmm_(x, matrix)
    return x @ matrix if bias is None else torch.addmm(bias.to(x.dtype), x, matrix)


def matmul_refusal(device: torch.device) -> str | None:
    """The reason of torch not to multiply with scales of rows on a GPU, or None; measured on Hopper only."""
    x = torch.zeros(1024, 2048, device=device, dtype=torch.bfloat16).to(_E4M3)
    weight, scale = x.new_zeros(2048, 2048, dtype=torch.bfloat16).to(_E4M3), torch.ones(2048, device=device)
    try:
        torch._scaled_mm(x, weight.t(), scale_a=scale[:1024, None], scale_b=scale[None], out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"torch {torch.__version__} refuses them here: {str(error).splitlines()[0]}"
    return None
