"""Schedule-free AdamW (Defazio et al., 2024, arXiv 2405.15682): an average of the weights replaces the rate's decay.

    y = (1 - b1) z + b1 x                       the weights in training, at which gradients are taken
    z <- z - lr (g / sqrt(v) + wd y)            v: AdamW's second moment
    x <- (1 - c) x + c z                        c: weight of the step, max(lr)^2, as a share of all so far

x is the model to sample, evaluate and export; it is not stored, but follows from y and z. The update is that of the
package `schedulefree`, on local shards. The package keeps step count, sum of weights and largest rate in Python numbers
and swaps y for x in place, which rounds; here the numbers are tensors, and y is kept during a swap. So a run resumes
exactly on any mesh, and neither saving nor validating changes it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ltx_titan.common.tensors import local
from ltx_titan.optim.sharding import chunks, like

# The package's numbers of a parameter group, with their initial values.
_NUMBERS = {"k": 0, "weight_sum": 0.0, "lr_max": -1.0}


class ScheduleFreeAdamW(Optimizer):
    """Schedule-free AdamW on plain or sharded parameters, which hold y.

    Args:
        params: parameters or groups.
        lr: of the package's update; raise it linearly at the start, and never lower it.
        betas: weight of x in y, above 0, and decay rate of the second moment.
        eps, weight_decay: as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        # Imported here: an optional dependency.
        from schedulefree import AdamWScheduleFree

        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        # Gets the shards of all parameters before each step and none of its own.
        self._update = AdamWScheduleFree([torch.empty(0)])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Updates every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        work = []
        for group in self.param_groups:
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            for values, parameters in self._by_numbers(updated).items():
                known = dict(zip(_NUMBERS, values, strict=True))
                settings = {**self._update.defaults, **group, **known, "train_mode": True}
                # The package allocates temporary tensors of the size of a group.
                for chunk in chunks(parameters):
                    work.append((chunk, {**settings, "params": [self._shard_with_state(p) for p in chunk]}))
        if not work:
            return
        self._update.param_groups = [group for _, group in work]
        self._update.step()
        for chunk, group in work:
            # On the host, and in float64, which holds a Python number exactly.
            numbers = {name: torch.tensor(group[name], dtype=torch.float64) for name in _NUMBERS}
            for parameter, shard in zip(chunk, group["params"], strict=True):
                state = self.state[parameter]
                for name, value in self._update.state[shard].items():
                    state.setdefault(name, like(parameter, value, parameter.shape))
                state |= numbers
        # The shards hold gradients, which are to be freed.
        self._update.state.clear()
        self._update.param_groups = []

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the parameters hold x; y is kept in host memory and restored bit for bit."""
        kept = self._to_average()
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, trained in kept:
                    weight.copy_(trained)

    @torch.no_grad()
    def _to_average(self) -> list[tuple[Tensor, Tensor]]:
        kept = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self.state:
                    weight, z = local(parameter), local(self.state[parameter]["z"])
                    kept.append((weight, weight.to("cpu", copy=True)))
                    weight.copy_(average_of(weight, z.to(weight.device), group["betas"][0]))
        return kept

    def _shard_with_state(self, parameter: Tensor) -> Tensor:
        """The parameter's shard as a parameter of the package, with gradient and state in shared storage."""
        assert parameter.grad is not None
        shard = local(parameter).detach()
        shard.grad = local(parameter.grad)
        state = self.state.get(parameter, {})
        self._update.state[shard] = {name: local(value) for name, value in state.items() if name not in _NUMBERS}
        return shard

    def _by_numbers(self, parameters: list[Tensor]) -> dict[tuple[float, ...], list[Tensor]]:
        """Parameters by the numbers of their next update.

        They differ if some had no gradient before, or if an update in the backward pass has a part of a group.
        """
        found: dict[tuple[float, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            numbers = tuple(_NUMBERS.values())
            if (state := self.state.get(parameter)) is not None:
                numbers = tuple(type(initial)(state[name].item()) for name, initial in _NUMBERS.items())
            found[numbers].append(parameter)
        return found


def average_of(weight: Tensor, z: Tensor, beta: float) -> Tensor:
    """x, the average of the weights, from the trained weights y and the state z: x = y + (1 - 1 / b1) (z - y).

    Args:
        weight: y.
        z: of the same shape and device.
        beta: b1, the first of `optimizer.betas`.
    """
    return weight.lerp(z, 1 - 1 / beta)
