"""Exponential moving average of the trained weights, sharded like them.

    average <- average + (1 - d_t) (weight - average)        d_t = min(decay, (1 + t) / (10 + t)) in step t

The ramp keeps the untrained weights out of the average of a short run. The class is a torch Optimizer with the average
as its state, so that checkpoints save, reshard and restore it like any optimizer's.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ltx_titan.common.tensors import local
from ltx_titan.optim.sharding import like, reshard


class EMA(Optimizer):
    """Moving average of parameters in float32; create it between loading the weights and restoring a checkpoint.

    Args:
        parameters: parameters to average; frozen ones are ignored.
        decay: in [0, 1); the average looks back about 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__([p for p in parameters if p.requires_grad], {"lr": 0.0})
        self.decay = decay
        for parameter in self._parameters():
            self._average(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Updates the average; nothing waits for the device.

        Args:
            step: optimizer steps taken, from 1.
        """
        # The ramp of TensorFlow's ExponentialMovingAverage with `num_updates`.
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = self._parameters()
        averages = [local(self._average(parameter)) for parameter in parameters]
        torch._foreach_lerp_(averages, [local(p).detach().to(torch.float32) for p in parameters], 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Context in which the model's weights are the average; they are restored afterwards.

        Args:
            model: module that owns the parameters. FSDP2 units that are still gathered are resharded, since they would
                keep using the gathered weights.
        """
        kept = self._swap(model, {})
        try:
            yield
        finally:
            self._swap(model, kept)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # returns no loss
        """Does nothing: `update` moves the average."""

    @torch.no_grad()
    def _swap(self, model: nn.Module, kept: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Swaps weights and averages; returns the weights whose average has another dtype, for the swap back."""
        reshard(model)
        taken = {}
        for parameter in self._parameters():
            weight, average = local(parameter), local(self._average(parameter))
            if parameter in kept:
                weight.copy_(kept[parameter])
                continue
            held = weight.clone()
            weight.copy_(average)
            if weight.dtype == average.dtype:
                average.copy_(held)
            else:
                # Swapping back from bfloat16 weights would round the float32 average, so it stays where it is.
                taken[parameter] = held
        return taken

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _average(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "ema" not in state:
            # A checkpoint from before `ema_decay` was set has no average: it starts from the current weights.
            shard = local(parameter).detach().to(torch.float32, copy=True)
            state["ema"] = like(parameter, shard, parameter.shape)
        return state["ema"]
