"""Keeps an optimizer's state in host memory and brings it to the device for the time of its step.

Give it optimizers that hold a block of the model each: then the device has room for one block's state instead of all,
and the copies of one block overlap with the kernels of the next. The update itself is the same, on the same device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Smaller tensors, such as step counts, stay where they are: a transfer costs more than they take.
_SMALLEST = 4096


def keep_state_on_host(optimizer: Optimizer) -> None:
    """Registers the transfers around `optimizer.step`. Between steps the state is in pinned host memory.

    The way back is not waited for: synchronise the device once after the last step, before anything reads the state.
    """
    hosts: dict[tuple[Tensor, str], Tensor] = {}

    def fetch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if (parameter, key) in hosts:
                    values[key] = torch.empty_like(value, device=parameter.device).copy_(value, non_blocking=True)

    def store(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if value.numel() >= _SMALLEST:
                    host = hosts.get((parameter, key))
                    if host is None:
                        pinned = parameter.device.type == "cuda"
                        host = hosts[parameter, key] = torch.empty_like(value, device="cpu", pin_memory=pinned)
                    values[key] = host.copy_(value, non_blocking=True)

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(store)
