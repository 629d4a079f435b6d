"""Adafactor: AdamW's second moment as the outer product of a row and a column average, without a first moment.

    R <- R + (1 - b_t) (mean_row(G^2) - R)      C likewise over columns          b_t = 1 - t^-0.8
    U = G / sqrt(R C / mean(R))                 for vectors: the plain average of G^2
    W <- (1 - lr wd) W - min(lr, 1 / sqrt(t)) max(1e-3, rms(W)) U / max(1, rms(U))

The formulas, and on one rank the numbers, are those of torch.optim.Adafactor, which fails on sharded parameters and
synchronizes with the device twice per parameter. Its state is negligible; its steps are noisier than AdamW's.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate
from torch.optim import Optimizer

from ltx_titan.common.tensors import local
from ltx_titan.optim.sharding import like, sum_shards

# Shazeer and Stern (2018): exponent of the second moment's decay, and epsilon_2, the floor of a parameter's scale.
_DECAY = -0.8
_SMALLEST_RMS = 1e-3


class Adafactor(Optimizer):
    """Adafactor on plain or sharded parameters, with float32 averages."""

    def __init__(self, params: Iterable[Any], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Updates every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self._init_state(parameter)
                    self._update(parameter, group)

    def _init_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        shard = local(parameter)
        dims = parameter.ndim
        # On the host: the decay needs it as a number, and a device tensor would have to be waited for.
        state["step"] = torch.tensor(0.0)
        if dims < 2:
            state["variance"] = like(parameter, torch.zeros_like(shard, dtype=torch.float32), parameter.shape)
            return
        for name, dim in (("row_var", dims - 1), ("col_var", dims - 2)):

            def without(placement: Placement, dim: int = dim) -> Placement:
                return Replicate() if placement.is_shard(dim) else placement

            # The averaged dim has size 1, so it is replicated where the parameter is sharded.
            shape, shard_shape = list(parameter.shape), list(shard.shape)
            shape[dim] = shard_shape[dim] = 1
            state[name] = like(parameter, shard.new_zeros(shard_shape, dtype=torch.float32), shape, without)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        weight = local(parameter)
        gradient = local(parameter.grad).float()
        state["step"] += 1
        step = float(state["step"])
        dims = parameter.ndim
        eps = torch.finfo(parameter.dtype).eps
        weight_rms = _rms(weight, parameter)
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        squares = gradient.square()
        share = step**_DECAY
        if dims < 2:
            variance = local(state["variance"]).lerp_(squares, share)
        else:
            # Means over the whole dim: sums of this rank's shard, summed over the ranks that hold the rest of it.
            rows, columns = local(state["row_var"]), local(state["col_var"])
            rows.lerp_(sum_shards(squares.sum(-1, keepdim=True), parameter, [dims - 1]) / parameter.shape[-1], share)
            columns.lerp_(sum_shards(squares.sum(-2, keepdim=True), parameter, [dims - 2]) / parameter.shape[-2], share)
            mean = sum_shards(rows.sum(-2, keepdim=True), parameter, [dims - 2]) / parameter.shape[-2]
            variance = rows * columns / mean.clamp(min=eps)
        # The floor is torch.optim.Adafactor's; the paper adds 1e-30 to the squares instead.
        update = variance.clamp(min=eps * eps).rsqrt().mul_(gradient)
        # Steps relative to the parameter's own scale, with the update clipped to an RMS of 1.
        size = min(group["lr"], step**-0.5) * weight_rms.clamp(min=_SMALLEST_RMS) / _rms(update, parameter).clamp(min=1)
        weight.sub_(update.mul_(size))


def _rms(shard: Tensor, parameter: Tensor) -> Tensor:
    """Root mean square of the global tensor that `shard` belongs to; it is sharded like `parameter`."""
    squares = sum_shards(shard.float().square().sum(), parameter, range(parameter.ndim))
    return (squares / parameter.numel()).sqrt()
