"""A frozen linear layer and its low-rank adapter as one operation, which never writes the adapter's output by itself.

    z = s x A^T        y = (b + z B^T) + x W^T        [tokens, in] -> [tokens, out], A [rank, in], B [out, rank]

The adapter's second matmul adds the bias, and the base's matmul adds to its output in place: three passes over the
output instead of five. Activation checkpointing sees one matmul as expensive as the base's, and saves the sum rather
than the base's output, from which the adapter would have to be recomputed. The backward pass of `x` is the same with
the roles of inputs and outputs exchanged.

In place is why this is an operation and no formula: `addmm` with a matrix to add copies it first.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("ltx_titan::adapted_linear", mutates_args=())
def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Returns y [tokens, out] and z [tokens, rank]; differentiable in `x`, `lora_a` and `lora_b`, not in the base.

    Args:
        x: inputs [tokens, in].
        weight, bias: of the frozen layer, [out, in] and [out].
        lora_a, lora_b: of the adapter, [rank, in] and [out, rank], in the dtype of `x`.
        scaling: factor on the adapter.
    """
    z = torch.mm(x, lora_a.t())
    if scaling != 1.0:
        z *= scaling
    y = torch.mm(z, lora_b.t()) if bias is None else torch.addmm(bias, z, lora_b.t())
    return y.addmm_(x, weight.t()), z


@adapted_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.custom_op("ltx_titan::adapted_linear_backward", mutates_args=())
def _adapted_linear_backward(dy: Tensor, weight: Tensor, lora_a: Tensor, dz: Tensor) -> Tensor:
    """The gradient of `x`, from those of y and of x A^T."""
    return torch.mm(dz, lora_a).addmm_(dy, weight)


@_adapted_linear_backward.register_fake
def _(dy: Tensor, weight: Tensor, lora_a: Tensor, dz: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_a, lora_b, ctx.scaling = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, z = ctx.saved_tensors
    dz = torch.mm(dy, lora_b)
    if ctx.scaling != 1.0:
        dz = dz * ctx.scaling
    dx = torch.ops.ltx_titan.adapted_linear_backward(dy, weight, lora_a, dz) if ctx.needs_input_grad[0] else None
    return dx, None, None, torch.mm(dz.t(), x), torch.mm(dy.t(), z), None


adapted_linear.register_autograd(_backward, setup_context=_save)
