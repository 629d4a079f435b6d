"""Moves an optimizer's state to the host for as long as something else needs the device's memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


@dataclass(frozen=True)
class _Layout:
    """How a sharded tensor lies on its mesh. The tensor itself is not kept: it would hold on to the memory."""

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
    """One entry of an optimizer's state that is on the host for now."""

    state: dict[str, object]
    name: str
    device: torch.device
    layout: _Layout | None

    def bring_back(self) -> None:
        local = self.state[self.name].to(self.device)
        self.state[self.name] = local if self.layout is None else self.layout.rebuild(local)


@contextmanager
def offloaded(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keeps all state tensors of an optimizer on the host inside the context; values come back unchanged.

    Takes as much host memory as the state has on the device, and as much time as copying it twice.
    """
    parked = [
        entry for state in optimizer.state.values() for name in list(state) if (entry := _park(state, name)) is not None
    ]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for entry in parked:
            entry.bring_back()


def _park(state: dict[str, object], name: str) -> _Parked | None:
    value = state[name]
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return None
    layout, local = None, value
    if isinstance(value, DTensor):
        layout = _Layout(value.device_mesh, value.placements, value.shape, value.stride())
        local = value.to_local()
    state[name] = local.cpu()
    return _Parked(state, name, local.device, layout)
