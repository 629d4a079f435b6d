"""RMS norm of queries and keys over the full inner width, with weight, then split rotary embedding, in one launch.

    z = x / sqrt(sum(x ** 2) / width + eps) * weight                    over all heads at once
    o_i = z_i cos_p - z_j sin_p,  o_j = z_j cos_p + z_i sin_p           i < K / 2,  j = i + K / 2,  p = head * K / 2 + i

Shapes: x, z, o [B, S, D] with D = heads * K: contiguous tokens of contiguous heads, which attention takes as
[B, H, S, K] without a copy. Pair p belongs to axis (p - pad) mod axes and to frequency (p - pad) div axes; the first
`pad` pairs are not rotated. Cosines and sines come from a table [N, n, 2] of the distinct coordinates, so that nothing
of the size of q is read besides q. Without a table it is the norm alone (text attention). Under tensor parallelism the
sums of squares are inputs, summed over ranks, and their gradient is returned.

Bytes: forward reads and writes q and k, 2 (S + T) D elements; backward reads do, x and writes dx of each, 3 (S + T) D,
and adds weight gradients on the way (launches.py). Queries and keys with the same cosines and sines (self-attention)
are computed token by token together, which loads these once.

Wins: with rotation in both directions, because torch.compile writes it in several passes and needs another for the
weights; without, in backward. Loses: the norm alone, forward, by 2 to 4 % from 16,128 tokens on.

us forward / backward as an operation, bfloat16, one sample, D = 4096 (2048 with 126 audio keys; 1,024 text keys); H100
80GB HBM3, torch 2.11.0, triton 3.6.0 (docs/benchmarks/kernels.jsonl, run 6; a copy reaches 3.00 TB/s):

    tokens    case                       kernel           torch.compile    share of copy
     4,032    qk_norm_rope               54.6 / 88.3      102.5 / 220.7    0.81 / 0.75
     4,032    qk_norm_rope, audio keys   12.3 / 28.3      35.0 / 72.8      0.92 / 0.60
     4,032    qk_norm, text              31.5 / 54.6      33.5 / 144.3     0.87 / 0.76
    32,256    qk_norm_rope               397.3 / 605.0    756.2 / 1345.7   0.89 / 0.87
    32,256    qk_norm_rope, audio keys   94.8 / 151.6     197.9 / 358.9    0.93 / 0.87
    32,256    qk_norm, text              194.8 / 302.5    187.9 / 696.0    0.93 / 0.90

The Triton kernels are in qk_norm_rope_kernels.py.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from ltx_titan_kernels.formulas import CosSin, HeadShare, norm_heads, rotate_heads, sum_squares
from ltx_titan_kernels.launches import (
    Launch,
    Tiles,
    is_supported,
    operator,
    sum_weight_partials,
    tile_tokens,
    tile_two,
    with_unit_stride,
    wrap_if_traced,
)
from ltx_titan_kernels.qk_norm_rope_kernels import qk_norm_rope_backward_kernel, qk_norm_rope_forward_kernel

TableAndIndex = tuple[Tensor, Tensor]
"""Cosines and sines [N, n, 2] float32 of all axes' distinct coordinates, and each token's rows [B, axes, S] int32."""


def forward_launch(width: int, tables: int) -> Launch:
    """Launch of the forward kernel at this inner width, the fastest measured on an H100 at 4096 (docs/benchmarks).

    Args:
        width: inner width.
        tables: 0 without rotation, 1 that queries and keys share, or 2.
    """
    without, shared, separate = Launch(8, 32, None), Launch(4, 2, None), Launch(8, 16, None)
    return (without, shared, separate)[tables].scaled_to(width)


def backward_launch(width: int, tables: int) -> Launch:
    """Launch of the backward kernel; arguments as in `forward_launch`."""
    if tables == 2:
        # Measured at 2048, the width of cross-modal attention.
        return Launch(4, 3, 3).scaled_to(width, measured_at=2048)
    without, shared = Launch(16, 2, 3), Launch(8, 1, 3)
    return (without, shared)[tables].scaled_to(width)


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rotation: CosSin | None,
    k_rotation: CosSin | None,
    *,
    head_dim: int,
    eps: float,
    share: HeadShare | None = None,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` in plain PyTorch, in float32, with cosines and sines of every token instead of a table."""
    q = rotate_heads(norm_heads(q, q_weight, head_dim, eps, share), q_rotation, share)
    return q, rotate_heads(norm_heads(k, k_weight, head_dim, eps, share), k_rotation, share)


def _tile(q: Tensor, k: Tensor, tables: list[Tensor], launch: Launch) -> tuple[Tiles, Tiles]:
    """Tiles of queries and of keys; equal ones if they share a table, for programs that do both."""
    if len(tables) == 1:
        tiles = tile_tokens(q, launch.programs)
        return tiles, tiles
    # Audio loads cosines and sines per token; video reuses them within a frame, so audio programs are slower.
    return tile_two(q, k, launch.programs, is_shorter_slower=bool(tables))


def _grid_arguments(
    q: Tensor,
    k: Tensor,
    tiles: tuple[Tiles, Tiles],
    tables: list[Tensor],
    indices: list[Tensor],
    head_dim: int,
    width: int,
    first_head: int,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and keyword arguments that both kernels take: tables, sizes, strides and layout."""
    q_tiles, k_tiles = tiles
    heads, half = q.shape[-1] // head_dim, head_dim // 2
    is_shared = len(tables) == 1
    # 1 and not 0 without rotation: the kernels divide by the number of axes.
    frequencies, axes = (tables[0].shape[1], indices[0].shape[1]) if tables else (1, 1)
    arguments = {
        # Pointers that are never read without rotation; any tensor serves.
        "q_table_ptr": tables[0] if tables else q,
        "k_table_ptr": tables[-1] if tables else q,
        "q_index_ptr": indices[0] if tables else q,
        "k_index_ptr": indices[-1] if tables else q,
        "q_tokens": q.shape[1],
        "k_tokens": k.shape[1],
        # The shorter tensor's programs start first.
        "first_program": q_tiles.programs if k.shape[1] < q.shape[1] else 0,
        "q_programs": q_tiles.programs,
        "q_tokens_per_program": q_tiles.tokens,
        "k_tokens_per_program": k_tiles.tokens,
        "q_stride_b": q.stride(0),
        "q_stride_s": q.stride(1),
        "k_stride_b": k.stride(0),
        "k_stride_s": k.stride(1),
        # Pairs are numbered over all ranks' heads; what the frequencies do not fill is padding in front.
        "first_pair": first_head * half,
        "pad": width // 2 - frequencies * axes if tables else width // 2,
        "width": width,
        "D": q.shape[-1],
        "HEADS": heads,
        "HALF": half,
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "FREQUENCIES": frequencies,
        "AXES": axes,
        "ROTATED": bool(tables),
        "SHARED": is_shared,
    }
    programs = q_tiles.programs if is_shared else q_tiles.programs + k_tiles.programs
    return (programs, q.shape[0]), arguments


def launch_forward(
    q: Tensor,
    k: Tensor,
    weights: list[Tensor],
    tables: list[Tensor],
    indices: list[Tensor],
    sums: list[Tensor],
    head_dim: int,
    width: int,
    first_head: int,
    eps: float,
    launch: Launch | None = None,
) -> list[Tensor]:
    """Runs the forward kernel. `launch` overrides the default, for sweeps.

    Args:
        q, k: [B, S, D] and [B, T, D].
        weights: of queries and of keys [D].
        tables, indices: see `TableAndIndex`; of queries and of keys, one if they share it, none without rotation.
        sums: sums of squares of queries [B, S] and keys [B, T] float32, or none to compute them.
        head_dim: width of a head.
        width: inner width over all ranks.
        first_head: index of the first head of this rank.
        eps: added to the mean square.
        launch: see above.

    Returns:
        Queries [B, S, D], keys [B, T, D], and their 1 / rms, [B, S] and [B, T] float32.
    """
    launch = launch or forward_launch(q.shape[-1], len(tables))
    q, k = with_unit_stride(q), with_unit_stride(k)
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    q_rstd, k_rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for x in (q, k))
    q_weight, k_weight = (weight.contiguous() for weight in weights)
    # Never read without sums; any tensor serves.
    q_sum, k_sum = (total.contiguous() for total in sums) if sums else (q_rstd, k_rstd)
    tiles = _tile(q, k, tables, launch)
    grid, arguments = _grid_arguments(q, k, tiles, tables, indices, head_dim, width, first_head)
    wrap_if_traced(qk_norm_rope_forward_kernel, q)[grid](
        q_ptr=q,
        q_weight_ptr=q_weight,
        q_sum_ptr=q_sum,
        q_out_ptr=q_out,
        q_rstd_ptr=q_rstd,
        k_ptr=k,
        k_weight_ptr=k_weight,
        k_sum_ptr=k_sum,
        k_out_ptr=k_out,
        k_rstd_ptr=k_rstd,
        eps=eps,
        SUMMED=bool(sums),
        num_warps=launch.warps,
        **arguments,
    )
    return [q_out, k_out, q_rstd, k_rstd]


def launch_backward(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    rstds: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor],
    indices: list[Tensor],
    is_summed: bool,
    head_dim: int,
    width: int,
    first_head: int,
    launch: Launch | None = None,
    weight_grads: bool = True,
) -> list[Tensor]:
    """Runs the backward kernel; arguments as in `launch_forward`, `rstds` from it, `grads` of its two outputs.

    Returns:
        dq, dk; if the sums of squares were inputs, their gradients [B, S] and [B, T] float32; and, with `weight_grads`,
        the weight gradients [2, D] of queries and of keys.
    """
    launch = launch or backward_launch(q.shape[-1], len(tables))
    q, k = with_unit_stride(q), with_unit_stride(k)
    q_grad, k_grad = (with_unit_stride(grad) for grad in grads)
    q_rstd, k_rstd = rstds
    q_weight, k_weight = (weight.contiguous() for weight in weights)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dsums = [torch.empty_like(rstd) for rstd in rstds] if is_summed else []
    q_dsum, k_dsum = dsums or rstds
    q_tiles, k_tiles = tiles = _tile(q, k, tables, launch)
    slots = q_tiles.programs + k_tiles.programs
    # A pointer that is never written without `weight_grads`; any output serves.
    partial = dq
    if weight_grads:
        # A slot per program and tensor: programs do not write zeros for the tensor that they did not read
        # (docs/benchmarks/log.md, fourth round).
        partial = q.new_empty((q.shape[0], slots, q.shape[-1]), dtype=torch.float32)
    grid, arguments = _grid_arguments(q, k, tiles, tables, indices, head_dim, width, first_head)
    wrap_if_traced(qk_norm_rope_backward_kernel, q)[grid](
        q_grad_ptr=q_grad,
        q_ptr=q,
        q_rstd_ptr=q_rstd,
        q_weight_ptr=q_weight,
        dq_ptr=dq,
        q_dsum_ptr=q_dsum,
        k_grad_ptr=k_grad,
        k_ptr=k,
        k_rstd_ptr=k_rstd,
        k_weight_ptr=k_weight,
        dk_ptr=dk,
        k_dsum_ptr=k_dsum,
        partial_ptr=partial,
        slots=slots,
        q_grad_stride_b=q_grad.stride(0),
        q_grad_stride_s=q_grad.stride(1),
        k_grad_stride_b=k_grad.stride(0),
        k_grad_stride_s=k_grad.stride(1),
        SUMMED=is_summed,
        WEIGHTS=weight_grads,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **arguments,
    )
    if not weight_grads:
        return [dq, dk, *dsums]
    return [dq, dk, *dsums, sum_weight_partials(partial, q_tiles.programs, weights[0].dtype)]


def _fake_forward(q, k, weights, tables, indices, sums, head_dim, width, first_head, eps, weight_grads):
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
    indices: list[Tensor],
    sums: list[Tensor],
    head_dim: int,
    width: int,
    first_head: int,
    eps: float,
    weight_grads: bool,
) -> list[Tensor]:
    return launch_forward(q, k, weights, tables, indices, sums, head_dim, width, first_head, eps)


def _fake_backward(grads, q, k, rstds, weights, tables, indices, is_summed, weight_grads, head_dim, width, first_head):
    return [
        *(x.new_empty(x.shape) for x in (q, k)),
        *(rstd.new_empty(rstd.shape) for rstd in rstds if is_summed),
        *([weights[0].new_empty((2, q.shape[-1]))] if weight_grads else []),
    ]


@operator("qk_norm_rope_backward", _fake_backward)
def _backward_op(
    grads: list[Tensor],
    q: Tensor,
    k: Tensor,
    rstds: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor],
    indices: list[Tensor],
    is_summed: bool,
    weight_grads: bool,
    head_dim: int,
    width: int,
    first_head: int,
) -> list[Tensor]:
    sizes = (head_dim, width, first_head)
    return launch_backward(grads, q, k, rstds, weights, tables, indices, is_summed, *sizes, weight_grads=weight_grads)


def _setup_context(ctx, inputs, output) -> None:
    q, k, weights, tables, indices, sums, *ctx.sizes, _, ctx.weight_grads = inputs
    ctx.save_for_backward(q, k, *output[2:], *weights, *tables, *indices)
    ctx.is_summed = bool(sums)
    ctx.tables = len(tables)
    # 1 / rms is an output only to be saved; its gradient is part of that of q and k.
    ctx.mark_non_differentiable(*output[2:])


def _differentiate(ctx, grads: list[Tensor]) -> tuple:
    q, k, *rest = ctx.saved_tensors
    rstds, weights, rest = rest[:2], rest[2:4], rest[4:]
    tables, indices = rest[: ctx.tables], rest[ctx.tables :]
    dq, dk, *others = _backward_op(
        grads[:2], q, k, rstds, weights, tables, indices, ctx.is_summed, ctx.weight_grads, *ctx.sizes
    )
    d_weights: list[Tensor | None] = [None, None]
    if ctx.weight_grads:
        d_weights = [d.to(weight.dtype) for d, weight in zip(others.pop().unbind(0), weights, strict=True)]
    # Cosines and sines depend on positions, which are not trained.
    nothing = [None] * ctx.tables
    return dq, dk, d_weights, nothing, nothing, others, *[None] * 5


_forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rotation: TableAndIndex | None,
    k_rotation: TableAndIndex | None,
    *,
    head_dim: int,
    eps: float,
    interleaved: bool = False,
    share: HeadShare | None = None,
) -> tuple[Tensor, Tensor]:
    """RMS norm with weight over the full inner width, then split rotary embedding of each head.

    Args:
        q, k: projections [B, S, D] and [B, T, D], any strides; under tensor parallelism this rank's heads of them.
        q_weight, k_weight: weights of the two norms [D].
        q_rotation, k_rotation: cosines and sines of all heads as `TableAndIndex`; None rotates nothing. The same
            object for both is loaded once.
        head_dim: width of a head, even.
        eps: added to the mean square.
        interleaved: must be False: models with interleaved rotation use plain PyTorch.
        share: heads of this rank, unless it has all of them.

    Returns:
        Queries [B, heads, S, head_dim] and keys [B, heads, T, head_dim], as views of contiguous [B, S, D].
    """
    assert not interleaved, "interleaved rotation has no kernel"
    assert is_supported(q, ()), (q.dtype, q.shape)
    assert q.dtype == k.dtype, (q.dtype, k.dtype)
    rotations = [r for r in (q_rotation, k_rotation) if r is not None]
    # By identity: a comparison of values would make the host wait for the device.
    if q_rotation is k_rotation and q.shape == k.shape:
        rotations = rotations[:1]
    outputs = _forward_op(
        q,
        k,
        [q_weight, k_weight],
        [table for table, _ in rotations],
        [index for _, index in rotations],
        # Outside the kernel: between the sum and the norm there is an all-reduce.
        [] if share is None else [sum_squares(x, share) for x in (q, k)],
        head_dim,
        q.shape[-1] if share is None else share.width,
        0 if share is None else share.first,
        eps,
        q_weight.requires_grad or k_weight.requires_grad,
    )
    # Views: attention kernels take [B, H, S, K] with any strides of the first three.
    q, k = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in outputs[:2])
    return q, k
