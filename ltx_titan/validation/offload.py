"""Moves optimizer state to the host while something else needs the device memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class _Layout:
    """Mesh and placements of a DTensor, without the tensor itself, which would keep its memory alive."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def rebuild(self, local: Tensor) -> DTensor:
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


@dataclass(frozen=True)
class _Parked:
    """One optimizer state tensor that is on the host."""

    state: dict[str, Any]
    name: str
    device: torch.device
    layout: _Layout | None

    def bring_back(self) -> None:
        local = self.state[self.name].to(self.device)
        self.state[self.name] = local if self.layout is None else self.layout.rebuild(local)


@contextmanager
def offloaded(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps all state tensors of an optimizer on the host inside the context; their values do not change.

    Needs host memory of the size of the state, and two copies of it over PCIe.
    """
    parked = [
        entry for state in optimizer.state.values() for name in list(state) if (entry := _park(state, name)) is not None
    ]
    # The allocator keeps freed blocks, in sizes that sampling may not be able to reuse.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for entry in parked:
            entry.bring_back()


def _park(state: dict[str, Any], name: str) -> _Parked | None:
    value = state[name]
    # Step counters of optimizers that are not fused are on the host already.
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return None
    layout, local = None, value
    if isinstance(value, DTensor):
        layout = _Layout(value.device_mesh, value.placements, value.shape, value.stride())
        local = value.to_local()
    state[name] = local.cpu()
    return _Parked(state, name, local.device, layout)
