"""Rotary position embedding over continuous coordinates (seconds, pixels).

    frequencies  w_j = theta ** (j / (n - 1)) * pi / 2,   j = 0 .. n-1,   n = width // (2 * axes)
    phase        w_j * (coordinate / max_position * 2 - 1)

A frequency belongs to one axis, so cos and sin of each axis' distinct coordinates are small tables [N, n], and a
token needs only the index of its coordinate on each axis. Over the width the frequency index is outermost and the
axis index innermost; if axes * n < width / 2, the front is padded with zero rotation, before the split into heads, so
heads have different frequencies.

Phases reach 1.6e4 rad, where float32 has a step of 1e-3: the order of operations above, in float32, *is* the
specification. Only the frequencies are computed in float64, and only if the checkpoint requires it
(`frequencies_precision`). Everything here runs eagerly: a compiler's rewrite of the division moves cos by 2e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi
from typing import NamedTuple

import torch
from torch import Tensor

from ltx_titan_kernels.formulas import rotate as rotate


class Rotation(NamedTuple):
    """RoPE cos/sin of every token and head, [B, H, S, head_dim / 2] each, float32."""

    cos: Tensor
    sin: Tensor


class PackedRotation(NamedTuple):
    """RoPE cos/sin as tables of distinct coordinates, all axes concatenated, in the form that kernels read.

    Attributes:
        table: cos and sin [N, n, 2] float32, one axis after the other.
        rows: row of the table for each token and axis [B, axes, S], int32.
    """

    table: Tensor
    rows: Tensor


@dataclass(frozen=True)
class RotaryTables:
    """RoPE cos/sin of a set of tokens, as one table of distinct coordinates per axis.

    Attributes:
        cos, sin: per axis, [N_axis, n] float32 for its N_axis distinct coordinates.
        index: row of those tables for each token and axis [B, axes, S].
        width: inner width of the attention, over all heads.
        heads: number of heads.
    """

    cos: tuple[Tensor, ...]
    sin: tuple[Tensor, ...]
    index: Tensor
    width: int
    heads: int

    def expand(self) -> Rotation:
        """Expands the tables to cos/sin of every token and head."""
        return Rotation(self._per_token(self.cos, padding=1.0), self._per_token(self.sin, padding=0.0))

    def pack(self) -> PackedRotation:
        """Concatenates the tables of all axes, without expanding anything per token."""
        # Offsets as Python numbers: a tensor of them would be copied from the host, which a CUDA graph cannot contain.
        start, rows = 0, []
        for axis, table in enumerate(self.cos):
            # Indices count within an axis, rows within the concatenated table.
            rows.append(self.index[:, axis] + start)
            start += table.shape[0]
        # cos and sin of a frequency side by side: a kernel fetches both with one load.
        table = torch.stack([torch.cat(self.cos), torch.cat(self.sin)], dim=-1)
        return PackedRotation(table, torch.stack(rows, dim=1).int())

    def _per_token(self, tables: tuple[Tensor, ...], padding: float) -> Tensor:
        batch, _, tokens = self.index.shape
        by_axis = torch.stack([table[self.index[:, axis]] for axis, table in enumerate(tables)], dim=-1)
        # [B, S, n, axes] -> [B, S, n * axes]: the axis is innermost.
        packed = by_axis.flatten(-2)
        # Padding comes first, so it is in head 0. cos = 1 and sin = 0 leave these channels as they are.
        front = packed.new_full((batch, tokens, self.width // 2 - packed.shape[-1]), padding)
        return torch.cat([front, packed], dim=-1).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def frequency_grid(theta: float, count: int, double_precision: bool) -> Tensor:
    """Angular frequencies [count], float32, on the CPU, rising from pi / 2 to theta * pi / 2.

    Args:
        theta: ratio of the highest to the lowest frequency.
        count: number of frequencies.
        double_precision: compute in float64 and round once; otherwise compute in float32 (differs by up to 4e-7).
    """
    # On the CPU: `linspace` and `pow` may round differently on a GPU.
    exponents = torch.linspace(0.0, 1.0, count, dtype=torch.float64 if double_precision else torch.float32)
    return (theta**exponents * (pi / 2)).float()


# The grid is the same for all batches. Device and arguments of `frequency_grid` -> grid on that device.
_GRIDS: dict[tuple[torch.device, float, int, bool], Tensor] = {}


def _grid_on(device: torch.device, theta: float, count: int, double_precision: bool) -> Tensor:
    """Copies `frequency_grid` to a device once: a CUDA graph cannot contain the copy."""
    key = (device, theta, count, double_precision)
    grid = _GRIDS.get(key)
    if grid is None:
        grid = frequency_grid(theta, count, double_precision).to(device)
        # A dry run computes with fake tensors, which a later real forward could not use.
        if type(grid) is Tensor:
            _GRIDS[key] = grid
    return grid


def midpoints(positions: Tensor) -> Tensor:
    """Midpoint of each interval: [B, axes, S, 2] -> [B, axes, S]."""
    start, end = positions.unbind(-1)
    return (start + end) / 2


def distinct_coordinates(coordinates: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Finds the distinct values of each axis over the batch; the host waits for the device.

    Args:
        coordinates: [B, axes, S].

    Returns:
        Per axis the sorted values [N_axis], and the index [B, axes, S].
    """
    found = [axis.unique(return_inverse=True) for axis in coordinates.unbind(1)]
    return tuple(values for values, _ in found), torch.stack([index for _, index in found], dim=1)


def rotary_tables(
    values: Sequence[Tensor],
    index: Tensor,
    *,
    width: int,
    heads: int,
    max_positions: Sequence[float],
    theta: float,
    double_precision: bool,
) -> RotaryTables:
    """Computes the cos/sin tables of distinct coordinates.

    Args:
        values: per axis, its distinct coordinates [N_axis], float32.
        index: index into them for each token and axis [B, axes, S].
        width: inner width of the attention, over all heads.
        heads: number of heads.
        max_positions: per axis, the coordinate that maps to the end of the range.
        theta: ratio of the highest to the lowest frequency.
        double_precision: see `frequency_grid`.
    """
    axes = len(values)
    assert index.shape[1] == axes == len(max_positions), (index.shape, axes, max_positions)
    grid = _grid_on(index.device, float(theta), width // (2 * axes), double_precision)
    cos, sin = [], []
    for coordinates, max_position in zip(values, max_positions, strict=True):
        # Divide by a tensor: a division by a Python number may become a multiplication by its rounded reciprocal.
        # `full` fills on the device; `tensor` would copy from the host, which a CUDA graph cannot contain.
        fraction = coordinates / torch.full((), max_position, dtype=torch.float32, device=coordinates.device)
        # [N_axis, 1] * [n] -> [N_axis, n].
        phase = (fraction * 2 - 1)[:, None] * grid
        cos.append(phase.cos())
        sin.append(phase.sin())
    return RotaryTables(tuple(cos), tuple(sin), index, width, heads)
