"""Keeps an optimizer's state in host memory and copies it to the device for its step.

With one optimizer per block, the device holds the state of one block at a time, and the copies of one block overlap
with the kernels of the next. The update itself is the same, on the same device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Smaller tensors, such as step counts, stay on the device: a transfer costs more than their memory is worth.
_SMALLEST = 4096


def keep_state_on_host(optimizer: Optimizer) -> None:
    """Registers the transfers before and after `optimizer.step`. Between steps the state is in pinned host memory.

    The copy to the host is asynchronous: synchronize the device once after the last step, before reading the state.
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
                        # Allocated once and reused: page-locking takes far longer than the copy.
                        pinned = parameter.device.type == "cuda"
                        host = hosts[parameter, key] = torch.empty_like(value, device="cpu", pin_memory=pinned)
                    # The device tensor is freed here. The allocator reuses memory in stream order, hence after this
                    # copy.
                    values[key] = host.copy_(value, non_blocking=True)

    optimizer.register_step_pre_hook(fetch)
    optimizer.register_step_post_hook(store)
