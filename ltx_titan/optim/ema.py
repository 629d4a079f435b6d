"""Exponential moving average of the trained weights, sharded like them.

    average <- average + (1 - d_t) (weight - average)        d_t = min(decay, (1 + t) / (10 + t)) in step t

The ramp keeps the untrained start out of the average of a short run. It is a torch Optimizer in form, with the average
as its state, so that checkpoints save, reshard and restore it as they do any optimizer's.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from ltx_titan.optim.sharding import like, local


class EMA(Optimizer):
    """Average of parameters, float32. Make it when the weights are loaded, before a checkpoint is resumed.

    Args:
        parameters: what is averaged, usually all that is trained.
        decay: in [0, 1); the average looks back about 1 / (1 - decay) steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        super().__init__([p for p in parameters if p.requires_grad], {"lr": 0.0})
        self.decay = decay
        for parameter in self._parameters():
            self._average(parameter)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights; nothing waits for the device.

        Args:
            step: optimizer steps taken, from 1.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        parameters = self._parameters()
        averages = [local(self._average(parameter)) for parameter in parameters]
        torch._foreach_lerp_(averages, [local(p).detach().to(torch.float32) for p in parameters], 1 - decay)

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model's weights are the average; afterwards they are what they were.

        Args:
            model: the module that owns the parameters. FSDP2 units that are still gathered are resharded, for they
                would go on computing with the other weights.
        """
        kept = self._swap(model, {})
        try:
            yield
        finally:
            self._swap(model, kept)

    def step(self, closure: None = None) -> None:
        """Does nothing: the average moves by `update`."""

    @torch.no_grad()
    def _swap(self, model: nn.Module, kept: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Exchanges weights and averages; returns the weights that an average cannot hold without rounding itself."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
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
                taken[parameter] = held
        return taken

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _average(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "ema" not in state:
            # A checkpoint from before averaging was switched on has none: start from the weights as they are.
            part = local(parameter).detach().to(torch.float32, copy=True)
            state["ema"] = like(parameter, part, parameter.shape)
        return state["ema"]
