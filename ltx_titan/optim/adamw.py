"""torch's fused AdamW, on this rank's shards."""

from typing import Any

from torch import Tensor
from torch.optim import AdamW

from ltx_titan.optim.sharding import local


class ShardedAdamW(AdamW):
    """AdamW whose state is sharded like the parameters and whose update sees only plain tensors.

    The update is elementwise, so shards are all it needs, and the same kernel gets the same numbers as in torch's own.
    That one hands it lists of DTensors, whose bookkeeping keeps the host busy, most of all in the first step.
    """

    def _init_group(self, group: dict[str, Any], *collected: list[Tensor]) -> bool:
        """Collects parameters, gradients and state for the update; torch's, then their shards in place of them."""
        has_complex = super()._init_group(group, *collected)
        for tensors in collected:
            tensors[:] = map(local, tensors)
        return has_complex
