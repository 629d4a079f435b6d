"""Moves an optimizer's state to the host for as long as something else needs the device's memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


@contextmanager
def offloaded(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps all state tensors of an optimizer on the host inside the context; values come back unchanged.

    Takes as much host memory as the state has on the device, and as much time as copying it twice.
    """
    kept: list[tuple[dict, str, Tensor, torch.device, DTensor | None]] = []
    for state in optimizer.state.values():
        for name, value in state.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            if not isinstance(local, Tensor) or local.device.type == "cpu":
                continue
            sharded = value if isinstance(value, DTensor) else None
            kept.append((state, name, local.cpu(), local.device, sharded))
    # Only layouts of sharded tensors are kept below, never the tensors: they would hold on to the memory.
    restore = []
    for state, name, host, device, sharded in kept:
        layout = None
        if sharded is not None:
            layout = (sharded.device_mesh, sharded.placements, sharded.shape, sharded.stride())
        state[name] = host
        restore.append((state, name, host, device, layout))
    del kept
    state = sharded = value = local = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for state, name, host, device, layout in restore:
            back = host.to(device)
            if layout is not None:
                mesh, placements, shape, stride = layout
                back = DTensor.from_local(back, mesh, placements, run_check=False, shape=shape, stride=stride)
            state[name] = back
