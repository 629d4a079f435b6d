"""Activation checkpointing: compute activations again in the backward pass instead of keeping them.

    none        everything is kept
    full        a block keeps its inputs only: least memory, the forward pass runs twice
    every_k     every k-th block as in full, the others keep everything
    selective   a block keeps its inputs and what is dearest to compute per byte: the results of attention, of the
                feed-forward's second product, and of sums over ranks

Where recomputation sits relative to compilation differs. `full` and `every_k` wrap the compiled block: inside the
compiled region they fail with tensor parallelism on torch 2.13. `selective` must be inside, or it would see a compiled
block as one operation; it is part of the block's own forward, so it is inside whenever the block is compiled.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ltx_titan.parallel.offload import ActivationOffload

Mode = Literal["none", "full", "selective", "every_k"]

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = {getattr(_aten, name).default for name in _ATTENTION} | {_c10d.reduce_scatter_tensor.default}
# Position of the two factors among the arguments.
_PRODUCTS = {_aten.mm.default: 0, _aten._scaled_mm.default: 0, _aten.addmm.default: 1}


def apply_activation_checkpointing(
    blocks: nn.ModuleList, mode: Mode = "full", *, k: int = 1, offload: bool = False, tp: int = 1
) -> None:
    """Makes blocks recompute their activations, in place. Apply after compilation.

    Args:
        blocks: the model's repeated blocks.
        mode: see above.
        k: one block in `k` is recomputed (`every_k`).
        offload: keep the inputs of recomputed blocks in host memory (`full`, `every_k`; nothing on a CPU).
        tp: degree of tensor parallelism.
    """
    if mode == "selective":
        for block in blocks:
            block.__class__ = _recomputing(type(block), tp == 1)
    elif mode != "none":
        store = ActivationOffload() if offload else None
        for number in range(0, len(blocks), k if mode == "every_k" else 1):
            blocks[number] = _Recomputed(blocks[number], store)


class _Recomputed(CheckpointWrapper):
    """A block that keeps its inputs only, on the device or in host memory. Parameter names stay."""

    def __init__(self, block: nn.Module, store: ActivationOffload | None) -> None:
        # Blocks draw no random numbers, so there is no generator state to save and restore.
        super().__init__(block, preserve_rng_state=False)
        self.store = store

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.store is None:
            return super().forward(*args, **kwargs)
        with self.store.saved_tensors():
            return super().forward(*args, **kwargs)


@cache
def _recomputing(base: type[nn.Module], keep_products: bool) -> type[nn.Module]:
    """`base` with a forward that recomputes all but what `_policy` keeps; one class for all blocks of a kind."""
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, keep_products))

    def forward(self: nn.Module, *args: Any) -> Any:
        return checkpoint(
            partial(base.forward, self), *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False
        )

    return type(base.__name__, (base,), {"forward": forward})


def _policy(keep_products: bool, context: Any, operation: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps what takes most arithmetic per byte of its result.

    For attention that grows with the sequence; for a matrix product it is the width that is summed over, so the
    feed-forward's second one, four times as wide as its result, is worth keeping. Under tensor parallelism its result
    is a partial sum for all tokens; the sum of own tokens, from the reduce-scatter, is smaller and spares more.
    """
    if operation in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    if keep_products and operation in _PRODUCTS:
        left, right = args[_PRODUCTS[operation] :][:2]
        if left.shape[1] > right.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
