"""A frozen float8 layer, with or without an adapter, whose matmuls are in float8.

    y = s_x (x8 Q^T) s_w + b + z B^T            z = s x A^T
    dx = s_g (g8 Q) + dz A                      g8 = quantized g s_w,  dz = s g B

W = s_w Q is stored in e4m3 with one scale per row. Tokens are quantized on use, with one scale each, in the backward
pass after multiplication by the weight's scales. The adapter's part adds to the matmul's output in place, in the dtype
of `x` throughout. The two matmuls are opaque operations: the transposed weight is scratch memory of one of them, which
no compiler can decide to keep, and activation checkpointing sees one matmul for base and adapter.

On a CPU, which has no float8 matmuls, the operations multiply the same numbers in float32.
"""

from typing import Any

import torch
from torch import Tensor

from ltx_titan_kernels.formulas import quantize_tokens

_E4M3 = torch.float8_e4m3fn
FLOAT8_MULTIPLE = 16
"""Widths of a float8 matmul are multiples of it."""


@torch.library.custom_op("ltx_titan::float8_linear", mutates_args=())
def float8_linear(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Multiplies quantized tokens by a weight; not differentiable.

    Args:
        x, x_scale: tokens, e4m3 [tokens, in] and float32 [tokens, 1].
        qdata: e4m3 weight [out, in] as bfloat16 numbers [out, in / 2].
        scale: of its rows [out, 1].
        bias: [out], or None.
        z, lora_b: of the adapter, [tokens, rank] and [out, rank]; None without one.
        dtype: of the result.

    Returns:
        [tokens, out].
    """
    bias = None if bias is None else bias.to(dtype)
    y = _matmul(x, x_scale, qdata.view(_E4M3), scale.float().t(), bias, dtype)
    return y if z is None else y.addmm_(z, lora_b.t())


@float8_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    z: Tensor | None,
    lora_b: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], qdata.shape[0], dtype=dtype)


@torch.library.custom_op("ltx_titan::float8_linear_backward", mutates_args=())
def float8_linear_backward(
    g: Tensor, g_scale: Tensor, qdata: Tensor, dz: Tensor | None, lora_a: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Multiplies quantized gradients by the transposed weight, without its scales.

    Args:
        g, g_scale: gradients times the weight's scales, e4m3 [tokens, out] and float32 [tokens, 1].
        qdata: e4m3 weight [out, in] as bfloat16 numbers [out, in / 2].
        dz, lora_a: of the adapter, [tokens, rank] and [rank, in]; None without one.
        dtype: of the result.

    Returns:
        [tokens, in].
    """
    weight = qdata.view(_E4M3)
    if g.is_cuda:
        # Here, not above: Triton is not installed everywhere.
        from ltx_titan_kernels.float8 import transpose_bytes

        transposed, ones = transpose_bytes(weight)
    else:
        transposed, ones = weight.t(), g_scale.new_ones(1, weight.shape[1])
    dx = _matmul(g, g_scale, transposed, ones, None, dtype)
    return dx if dz is None else dx.addmm_(dz, lora_a)


@float8_linear_backward.register_fake
def _(
    g: Tensor, g_scale: Tensor, qdata: Tensor, dz: Tensor | None, lora_a: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return g.new_empty(g.shape[0], qdata.shape[1] * 2, dtype=dtype)


def _matmul(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, with scales [T, 1] and [1, N]."""
    if x.is_cuda:
        try:
            return torch._scaled_mm(
                x, weight.t(), scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=dtype, use_fast_accum=True
            )
        except RuntimeError as error:
            # cuBLAS has no such kernel for a few shapes: seen at 51 tokens in the audio's feed-forward. It says so
            # before it launches anything, so this works while a graph is recorded, too.
            if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
                raise
    # bfloat16 holds every e4m3 number, so that only the result is rounded.
    wide = torch.bfloat16 if x.is_cuda else torch.float32
    y = ((x.to(wide) @ weight.to(wide).t()).float() * x_scale * w_scale).to(dtype)
    return y if bias is None else y + bias


class Float8Linear(torch.autograd.Function):
    """`apply(x, qdata, scale, bias, lora_a, lora_b, scaling)` for tokens [tokens, in]; the adapter may be None.

    Differentiable in `x` and the adapter, [rank, in] and [out, rank] in the dtype of `x`, not in the base.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        qdata: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """The layer's output [tokens, out]."""
        z = None if lora_a is None else torch.mm(x, lora_a.t()) * scaling
        ctx.save_for_backward(*((qdata, scale) if z is None else (qdata, scale, x, lora_a, lora_b, z)))
        ctx.scaling = scaling
        return float8_linear(*_quantize(x, None), qdata, scale, bias, z, lora_b, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of `x` and of the adapter."""
        qdata, scale, *adapter = ctx.saved_tensors
        dz = lora_a = d_lora_a = d_lora_b = dx = None
        if adapter:
            x, lora_a, lora_b, z = adapter
            dz = torch.mm(grad, lora_b) * ctx.scaling
            d_lora_a, d_lora_b = torch.mm(dz.t(), x), torch.mm(grad.t(), z)
        if ctx.needs_input_grad[0]:
            dx = float8_linear_backward(*_quantize(grad, scale.flatten()), qdata, dz, lora_a, grad.dtype)
        return dx, None, None, None, d_lora_a, d_lora_b, None


def matmul_refusal(device: torch.device) -> str | None:
    """The reason of torch not to multiply with scales of rows on a GPU, or None; measured on Hopper only."""
    x = torch.zeros(1024, 2048, device=device, dtype=torch.bfloat16).to(_E4M3)
    weight, scale = x.new_zeros(2048, 2048, dtype=torch.bfloat16).to(_E4M3), torch.ones(2048, device=device)
    try:
        torch._scaled_mm(x, weight.t(), scale_a=scale[:1024, None], scale_b=scale[None], out_dtype=torch.bfloat16)
    except RuntimeError as error:
        return f"torch {torch.__version__} refuses them here: {str(error).splitlines()[0]}"
    return None


def _quantize(x: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or not x.is_cuda:
        # A compiler fuses the formula with what makes `x`, GELU or a gate, and quantizes a tensor once that several
        # layers read.
        return quantize_tokens(x, factor)
    from ltx_titan_kernels import float8

    return float8.quantize_tokens(x, factor)
