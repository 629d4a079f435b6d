"""Activation checkpointing: recompute activations in the backward pass instead of saving them.

    none        everything is saved
    full        a block saves its inputs only: least memory, the forward pass runs twice
    every_k     every k-th block as in full, the others save everything
    selective   a block saves its inputs and the outputs that are most expensive to recompute per byte: of attention, of
                the feed-forward's second matmul, and of reduce-scatters

The position relative to compilation differs. `full` and `every_k` wrap the compiled block: inside the compiled region
they fail with tensor parallelism on torch 2.13. `selective` is compiled with the block: outside it would see a compiled
block as one operation, with nothing to select from.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ltx_titan.parallel.offload import ActivationOffload

_aten, _c10d = torch.ops.aten, torch.ops._c10d_functional
# One name per backend of SDPA, which chooses by device, dtype and torch version.
_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_SAVED = {getattr(_aten, name).default for name in _ATTENTION} | {_c10d.reduce_scatter_tensor.default}
# Matmul -> index of its first factor among the arguments.
_MATMULS = {_aten.mm.default: 0, _aten._scaled_mm.default: 0, _aten.addmm.default: 1}


def apply_selective_checkpointing(blocks: nn.ModuleList, *, tp: int = 1) -> None:
    """Wraps every block so that it recomputes all but what `_policy` saves. Apply before compilation.

    Args:
        blocks: the model's repeated blocks, replaced in place.
        tp: degree of tensor parallelism.
    """
    # One object for all blocks: compiled blocks share their code, which is guarded by it.
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, tp == 1))
    for number, block in enumerate(blocks):
        blocks[number] = _Selective(block, contexts)


def apply_full_checkpointing(blocks: nn.ModuleList, *, every: int = 1, offload: bool = False) -> None:
    """Wraps blocks so that they save their inputs only. Apply after compilation.

    Args:
        blocks: the model's repeated blocks, replaced in place.
        every: one block in this many is recomputed; 1 for `full`.
        offload: keep the inputs of recomputed blocks in host memory; without effect on a CPU.
    """
    store = ActivationOffload() if offload else None
    for number in range(0, len(blocks), every):
        blocks[number] = _Recomputed(blocks[number], store)


class _Recomputed(ActivationWrapper):
    """A block that saves its inputs only, on the device or in host memory. Names in the state dict stay."""

    def __init__(self, block: nn.Module, store: ActivationOffload | None) -> None:
        super().__init__(block)
        self.store = store

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.store is None:
            return self._recompute(*args, **kwargs)
        with self.store.saved_tensors():
            return self._recompute(*args, **kwargs)

    def _recompute(self, *args: Any, **kwargs: Any) -> Any:
        # Blocks draw no random numbers, so there is no generator state to save and restore.
        block = self._checkpoint_wrapped_module
        return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Selective(ActivationWrapper):
    """A block that saves its inputs and what a policy selects. Names in the state dict stay."""

    def __init__(self, block: nn.Module, contexts: Callable) -> None:
        super().__init__(block)
        self.contexts = contexts

    def forward(self, *args: Any) -> Any:
        # Not reentrant: that variant loses the weights' gradients if no input of the block requires one, as in the
        # first block of a LoRA job.
        block = self._checkpoint_wrapped_module
        return checkpoint(block, *args, use_reentrant=False, context_fn=self.contexts, preserve_rng_state=False)


def _policy(save_matmuls: bool, context: Any, operation: Callable, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Saves the outputs that take most arithmetic per byte.

    For attention this ratio grows with the sequence. For a matmul it is the width that is summed over: the
    feed-forward's second one, whose input is four times as wide as its output, is worth saving. Under tensor
    parallelism its output is a partial sum for all tokens; the reduce-scatter's output, of own tokens only, is smaller
    and saves recomputing both.
    """
    if operation in _SAVED:
        return CheckpointPolicy.MUST_SAVE
    if save_matmuls and operation in _MATMULS:
        # [M, K] @ [K, N] takes 2 K FLOPs per output, so the matmuls that narrow (K > N) are the expensive ones to
        # repeat.
        left, right = args[_MATMULS[operation] :][:2]
        if left.shape[1] > right.shape[1]:
            return CheckpointPolicy.MUST_SAVE
    # Not MUST: the partitioner of a compiled block may still save what is cheaper to keep than to recompute.
    return CheckpointPolicy.PREFER_RECOMPUTE
