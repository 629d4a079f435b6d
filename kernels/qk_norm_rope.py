"""RMS norm of queries and keys over the full inner width, with weight, then split rotary embedding, in one launch.

    z = x / sqrt(sum(x ** 2) / width + eps) * weight                    over all heads at once
    o_i = z_i cos_p - z_j sin_p,  o_j = z_j cos_p + z_i sin_p           i < K / 2,  j = i + K / 2,  p = head * K / 2 + i

x, z, o [B, S, D] with D = heads * K: contiguous tokens of contiguous heads, which attention takes as [B, H, S, K]
without a copy. Angle p belongs to axis (p - pad) mod axes and to frequency (p - pad) div axes; the first `pad` angles
turn nothing. Cosines and sines come from the small tables of rope.py, so nothing of the size of q is read besides q.

Queries and keys with the same angles (self-attention) are done token by token together, which reads the angles once.
Without angles it is the norm alone (text attention). Under tensor parallelism the sums of squares come from outside,
summed over ranks, and their gradient is returned.

Forward: reads and writes q and k. Backward: reads do, x and writes dx for each; weight gradients are summed on the way,
per program, then over programs, without atomics. torch.compile writes the rotation in several passes and needs another
for the weights.
"""

import torch
from torch import Tensor

from ltx_titan.model import ops
from ltx_titan.model.ops import HeadShare
from ltx_titan.model.rope import PackedRotation
from ltx_titan_kernels.launches import is_supported, operator
from ltx_titan_kernels.qk_norm_rope_backward import launch_backward
from ltx_titan_kernels.qk_norm_rope_forward import launch_forward

reference = ops.qk_norm_rope
"""The same in plain torch operations, with angles written out per token; what the kernel is held against."""


def _fake_forward(q, k, weights, tables, rows, sums, head_dim, width, first_head, eps):
    return [
        *(x.new_empty(x.shape) for x in (q, k)),
        *(x.new_empty(x.shape[:2], dtype=torch.float32) for x in (q, k)),
    ]


@operator("qk_norm_rope", _fake_forward)
def _forward_op(
    q: Tensor,
    k: Tensor,
    weights: list[Tensor],
    tables: list[Tensor],
    rows: list[Tensor],
    sums: list[Tensor],
    head_dim: int,
    width: int,
    first_head: int,
    eps: float,
) -> list[Tensor]:
    return launch_forward(q, k, weights, tables, rows, sums, head_dim, width, first_head, eps)


def _fake_backward(grads, q, k, rstds, weights, tables, rows, is_summed, head_dim, width, first_head):
    return [
        *(x.new_empty(x.shape) for x in (q, k)),
        weights[0].new_empty((2, q.shape[-1])),
        *(rstd.new_empty(rstd.shape) for rstd in rstds if is_summed),
    ]


@operator("qk_norm_rope_backward", _fake_backward)
def _backward_op(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    rstds: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor],
    rows: list[Tensor],
    is_summed: bool,
    head_dim: int,
    width: int,
    first_head: int,
) -> list[Tensor]:
    return launch_backward(grads, q, k, rstds, weights, tables, rows, is_summed, head_dim, width, first_head)


def _setup_context(ctx, inputs, output) -> None:
    q, k, weights, tables, rows, sums, *ctx.sizes, _ = inputs
    ctx.save_for_backward(q, k, *output[2:], *weights, *tables, *rows)
    ctx.is_summed = bool(sums)
    ctx.tables = len(tables)
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, grads: list[Tensor]) -> tuple:
    q, k, *rest = ctx.saved_tensors
    rstds, weights, rest = rest[:2], rest[2:4], rest[4:]
    tables, rows = rest[: ctx.tables], rest[ctx.tables :]
    dq, dk, d_weights, *d_sums = _backward_op(grads[:2], q, k, rstds, weights, tables, rows, ctx.is_summed, *ctx.sizes)
    d_weights = [d.to(weight.dtype) for d, weight in zip(d_weights.unbind(0), weights, strict=True)]
    nothing = [None] * ctx.tables
    return dq, dk, d_weights, nothing, nothing, d_sums, None, None, None, None


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rotation: PackedRotation | None,
    k_rotation: PackedRotation | None,
    *,
    head_dim: int,
    eps: float,
    interleaved: bool = False,
    share: HeadShare | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm with weight over the full inner width, then split rotation of each head.

    Args:
        q, k: projections [B, S, D] and [B, T, D], any strides; under tensor parallelism this rank's heads of them.
        q_weight, k_weight: weights of the two norms [D].
        q_rotation, k_rotation: angles of all heads; None rotates nothing.
        head_dim: width of a head, even.
        eps: added to the mean square.
        interleaved: must be False: a model with interleaved rotation is given the plain torch form (kernel_ops.py).
        share: which heads these are, where they are not all.

    Returns:
        Queries [B, heads, S, head_dim] and keys [B, heads, T, head_dim], as views of contiguous [B, S, D].
    """
    assert not interleaved, "interleaved rotation has no kernel"
    assert is_supported(q, ()), (q.dtype, q.shape)
    assert q.dtype == k.dtype, (q.dtype, k.dtype)
    rotations = [r for r in (q_rotation, k_rotation) if r is not None]
    if q_rotation is k_rotation and q.shape == k.shape:
        rotations = rotations[:1]
    sums = [] if share is None else [ops.sum_squares(x, share) for x in (q, k)]
    outputs = _forward_op(
        q,
        k,
        [q_weight, k_weight],
        [rotation.table for rotation in rotations],
        [rotation.rows for rotation in rotations],
        sums,
        head_dim,
        q.shape[-1] if share is None else share.width,
        0 if share is None else share.first,
        eps,
    )
    q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in outputs[:2])
    return q, k
