"""Adafactor: AdamW's second moment as the outer product of a row and a column average, without a first moment.

    R <- R + (1 - b_t) (mean_row(G^2) - R)      C likewise over columns          b_t = 1 - t^-0.8
    U = G / sqrt(R C / mean(R))                 for vectors: the plain average of G^2
    W <- (1 - lr wd) W - min(lr, 1 / sqrt(t)) max(1e-3, rms(W)) U / max(1, rms(U))

The formulas are those of torch.optim.Adafactor, which fails on sharded parameters and synchronizes with the device
twice per parameter; so are the numbers on one rank, down to gradients whose squares are below the resolution of the
weight's dtype. torch replaces smaller averages by it, which for bfloat16 (0.008) are all of a large model's: no
normalization is left. The floor here is the paper's, 1e-30. The state is negligible; steps are noisier than AdamW's.

With stochastic rounding, bfloat16 weights are updated in float32 and rounded up or down at random, with the exact value
as the mean: torch's update of a bfloat16 weight, below half a unit of its last bit, changes nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Placement, Replicate
from torch.optim import Optimizer

from ltx_titan.common.tensors import local, seed_of
from ltx_titan.optim.sharding import like, sum_shards

# Shazeer and Stern (2018): exponent of the second moment's decay, and epsilon_2, the floor of a parameter's scale.
_DECAY = -0.8
_SMALLEST_RMS = 1e-3
# And epsilon_1, the floor of the second moment.
_SMALLEST_VARIANCE = 1e-30


class Adafactor(Optimizer):
    """Adafactor on plain or sharded parameters, with float32 averages.

    Args:
        params: parameters or groups.
        lr, weight_decay: as in torch.optim.Adafactor.
        stochastic_rounding: of bfloat16 parameters.
        seed: of the rounding. Random numbers depend on (seed, step) and are the same on all ranks, so that replicas of
            a weight stay equal.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
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
        weight_rms = _rms(weight, parameter)
        rounds = self.stochastic_rounding and weight.dtype == torch.bfloat16
        exact = weight.float() if rounds else weight
        if group["weight_decay"]:
            exact.mul_(1 - group["lr"] * group["weight_decay"])
        squares = gradient.square()
        share = step**_DECAY
        if dims < 2:
            update = local(state["variance"]).lerp_(squares, share).clone()
        else:
            # Means over the whole dim: sums of this rank's shard, summed over the ranks that hold the rest of it.
            rows, columns = local(state["row_var"]), local(state["col_var"])
            rows.lerp_(sum_shards(squares.sum(-1, keepdim=True), parameter, [dims - 1]) / parameter.shape[-1], share)
            columns.lerp_(sum_shards(squares.sum(-2, keepdim=True), parameter, [dims - 2]) / parameter.shape[-2], share)
            mean = sum_shards(rows.sum(-2, keepdim=True), parameter, [dims - 2]) / parameter.shape[-2]
            # Divided first: the product of two small averages could underflow.
            update = rows / mean.clamp(min=_SMALLEST_VARIANCE) * columns
        del squares  # in place and freed early: of the largest weight each of these tensors takes 256 MB
        update.clamp_(min=_SMALLEST_VARIANCE).rsqrt_().mul_(gradient)
        del gradient
        # Steps relative to the parameter's own scale, with the update clipped to an RMS of 1.
        size = min(group["lr"], step**-0.5) * weight_rms.clamp(min=_SMALLEST_RMS) / _rms(update, parameter).clamp(min=1)
        exact.sub_(update.mul_(size))
        if rounds:
            weight.copy_(_rounded(exact, seed_of(f"{self.seed}/{int(step)}", num_bytes=7)))


def _rounded(values: Tensor, seed: int) -> Tensor:
    """Float32 values that bfloat16 can hold, each the one below or above; overwrites `values`."""
    generator = torch.Generator(values.device).manual_seed(seed)
    # bfloat16 is the upper half of float32: a random number below one unit of it, then the lower half is cut off.
    bits = values.view(torch.int32)
    bits.add_(torch.randint(1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator))
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32)


def _rms(shard: Tensor, parameter: Tensor) -> Tensor:
    """Root mean square of the global tensor that `shard` belongs to; it is sharded like `parameter`."""
    squares = sum_shards(shard.float().square().sum(), parameter, range(parameter.ndim))
    return (squares / parameter.numel()).sqrt()
