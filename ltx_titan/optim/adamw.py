"""AdamW with sharded state: torch's fused update on plain local tensors, or the kernel of `ltx_titan_kernels.adamw`.

Both compute the same numbers with the same state, so a job may change from one to the other in any step: which one runs
depends on the device and on the tensors.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import AdamW

from ltx_titan.common.tensors import local, runs_triton

if TYPE_CHECKING:
    from ltx_titan_kernels.adamw import Updater


class Skippable:
    """An optimizer whose update reads on the device how to scale gradients, and whether to leave all as it is.

    Attributes:
        grad_scale: divides the gradients, a scalar on their device; None for 1. torch's update stores the quotients.
        found_inf: 1.0 leaves weights and state as they are, 0.0 updates them; None updates.
    """

    # torch's names, made for gradient scalers.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class ShardedAdamW(Skippable, AdamW):
    """torch's AdamW with sharded state, whose update sees plain local tensors; `fused` and without `amsgrad`.

    The update is elementwise, so local shards are enough, and the fused kernel computes the same numbers. torch's own
    passes lists of DTensors to it, whose dispatch keeps the host busy, most of all in the first step.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._updater: Updater | None = None
        super().__init__(*args, **settings, fused=True)

    def _init_group(self, group: dict[str, Any], *collected: list[Tensor]) -> bool:
        """Collects parameters, gradients and state as torch's does, then replaces them by their local shards.

        What the kernel updates is not passed on: the lists are empty then.
        """
        has_complex = super()._init_group(group, *collected)
        for tensors in collected:
            tensors[:] = map(local, tensors)
        if self._update_by_kernel(group, *collected):
            for tensors in collected:
                tensors.clear()
        return has_complex

    def _update_by_kernel(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        _: list[Tensor],
        steps: list[Tensor],
    ) -> bool:
        """Updates the weights of a group if the kernel takes all of them; returns whether it did."""
        if not weights or not runs_triton(weights[0].device) or isinstance(group["lr"], Tensor):
            return False
        if self._updater is None:
            # Imported here: Triton is not everywhere.
            from ltx_titan_kernels.adamw import Updater

            self._updater = Updater()
        return self._updater(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            steps,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=self.grad_scale,
            skip=self.found_inf,
        )
