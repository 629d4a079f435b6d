"""Activation checkpointing: recompute activations in the backward pass instead of saving them.

    none        everything is saved
    full        a block saves its inputs only: least memory, the forward pass runs twice
    every_k     every k-th block as in full, the others save everything
    selective   a block saves its inputs and the outputs that are most expensive to recompute per byte: of attention, of
                the feed-forward's second matmul, and of reduce-scatters
    budget      every block has a level, from `full` to `none`, chosen to fill memory: see memory/budget.py

The position relative to compilation differs. `full` and `every_k` wrap the compiled block: inside the compiled region
they fail with tensor parallelism on torch 2.13. What selects operations is compiled with the block: outside it would
see a compiled block as one operation, with nothing to select from.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# They register their operations.
import ltx_titan.model.adapted_linear
import ltx_titan.model.float8_trained  # noqa: F401
from ltx_titan.parallel.offload import ActivationOffload

Level = Literal["full", "selective", "matmuls", "all_matmuls", "none"]
"""Activations that a block saves under `budget`; each level adds to the one before: inputs, `selective` as above,
matmuls that do not widen, matmuls that widen, everything."""

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
# Our own layers -> index of their weights [out, in], or of a list of them; frozen float8 ones are stored as pairs of
# bytes, so that the inner size is read from the first argument, the input.
_LAYERS = {
    torch.ops.ltx_titan.adapted_linears.default: 1,
    torch.ops.ltx_titan.float8_adapted_linears.default: 2,
    torch.ops.ltx_titan.float8_linear.default: 2,
    torch.ops.ltx_titan.few_tokens_linear.default: 1,
    torch.ops.ltx_titan.float8_trained_linear.default: 2,
}
# Matmul -> index of its second factor [in, out].
_MATMULS = {_aten.mm.default: 1, _aten._scaled_mm.default: 1, _aten.addmm.default: 2}
# A feed-forward's first matmul widens 4 times; an adapter's second one 128 times, which is cheaper to repeat than to
# save.
_MOST_WIDENING = 4


def apply_selective_checkpointing(blocks: nn.ModuleList, levels: Sequence[Level] | None = None, *, tp: int = 1) -> None:
    """Wraps blocks so that they recompute all but what `_policy` saves. Apply before compilation.

    Args:
        blocks: the model's repeated blocks, replaced in place.
        levels: of each block; "full" and "none" leave it as it is. None: every block is `selective`.
        tp: degree of tensor parallelism.
    """
    if levels is None:
        levels = ["selective"] * len(blocks)
    # One object for all blocks of a level: compiled blocks share their code, which is guarded by it.
    contexts = {
        level: partial(create_selective_checkpoint_contexts, partial(_policy, level, tp == 1)) for level in set(levels)
    }
    for number, level in enumerate(levels):
        if level not in ("full", "none"):
            blocks[number] = _Selective(blocks[number], contexts[level])


def apply_full_checkpointing(
    blocks: nn.ModuleList, numbers: Iterable[int] | None = None, *, offload: bool = False
) -> None:
    """Wraps blocks so that they save their inputs only. Apply after compilation.

    Args:
        blocks: the model's repeated blocks, replaced in place.
        numbers: the blocks to recompute; None for all.
        offload: keep the inputs of recomputed blocks in host memory; without effect on a CPU.
    """
    store = ActivationOffload() if offload else None
    for number in range(len(blocks)) if numbers is None else numbers:
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


def _policy(
    level: Level, save_matmuls: bool, context: Any, operation: Callable, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    """Saves the outputs that take most arithmetic per byte.

    For attention this ratio grows with the sequence. For a matmul it is the width that is summed over: the
    feed-forward's second one, whose input is four times as wide as its output, is worth saving. Under tensor
    parallelism its output is a partial sum for all tokens; the reduce-scatter's output, of own tokens only, is smaller
    and saves recomputing both.
    """
    if operation in _SAVED:
        return CheckpointPolicy.MUST_SAVE
    if save_matmuls and (operation in _MATMULS or operation in _LAYERS):
        # [M, K] @ [K, N] takes 2 K FLOPs per output, so the matmuls that narrow (K > N) are the expensive ones to
        # repeat.
        if operation in _LAYERS:
            weights = args[_LAYERS[operation]]
            # Of several outputs all are saved, or none.
            outer = max(len(weight) for weight in (weights if isinstance(weights, list | tuple) else [weights]))
            inner = args[0].shape[1]
        else:
            inner, outer = args[_MATMULS[operation]].shape
        is_saved = {
            "selective": inner > outer,
            "matmuls": inner >= outer,
            "all_matmuls": inner * _MOST_WIDENING >= outer,
        }
        if is_saved[level]:
            return CheckpointPolicy.MUST_SAVE
    # Not MUST: the partitioner of a compiled block may still save what is cheaper to keep than to recompute.
    return CheckpointPolicy.PREFER_RECOMPUTE
