"""torch.compile of each block in place: one small graph that all layers share, names unchanged."""

import torch
import torch._functorch.config
import torch._inductor.config
from torch import nn

# Dynamo's limit per block: one entry per combination of token counts, streams and masks. The default of 8 is too few.
_RECOMPILE_LIMIT = 64


def apply_compile(blocks: nn.ModuleList) -> None:
    """Compiles every block on its first call and for each new set of shapes: static shapes run faster than dynamic.

    Args:
        blocks: the model's repeated blocks; they share the compiled code.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _RECOMPILE_LIMIT)
    # From rows >= 2 x width on (8,192 tokens), torch 2.11 fuses sums over rows into other reductions, and can then give
    # the gradient of a [1, 1, D] input the shape [D], which autograd refuses.
    torch._inductor.config.triton.mix_order_reduction = False
    # Allow the partitioner to recompute tensors that backward has to materialize as matmul inputs: GELU's output and
    # gated attention, a sixth of a block's saved activations, for one more write in kernels that read the rest anyway.
    torch._functorch.config.ban_recompute_materialized_backward = False
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
