"""Activation checkpointing: recompute a block's activations in the backward pass instead of keeping them."""

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper


def apply_activation_checkpointing(blocks: nn.ModuleList) -> None:
    """Wraps every block: memory falls to one residual stream per block, the forward pass runs twice.

    Apply after compilation: a wrapper inside the compiled region fails with tensor parallelism on torch 2.13.
    """
    for number, block in enumerate(blocks):
        # The blocks draw no random numbers, so there is no generator state to save and restore.
        blocks[number] = checkpoint_wrapper(
            block, checkpoint_impl=CheckpointImpl.NO_REENTRANT, preserve_rng_state=False
        )
