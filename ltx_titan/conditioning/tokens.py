"""Latents as tokens, and the position of each token in time and space.

A video token is one latent cell, frame by frame, row by row; an audio token is one latent step. Its position is a
half-open interval [start, end) per axis, in seconds and pixels, always float32: RoPE is wrong in bfloat16.

A clip has few distinct coordinates per axis, and the index of each token into them follows from its shape.
`Coordinates` therefore holds the intervals of each axis and an index per token, and positions and midpoints are both
read from it. Without a search the host never waits for the device, and table sizes depend on shapes only: the frame
rates of a batch cannot make a compiled model recompile. (Two samples of one frame rate store equal time intervals
twice.)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_SCALE_FACTORS = (8, 32, 32)


class Grid(NamedTuple):
    """Latent sizes of a clip. Audio is a grid of height and width 1."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return " x ".join(map(str, self))

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        return self.height * self.width

    @property
    def num_tokens(self) -> int:
        """Tokens of the clip."""
        return self.frames * self.tokens_per_frame


@dataclass(frozen=True)
class Coordinates:
    """Positions of a batch of token sequences, in compact form.

    Attributes:
        intervals: per axis, [start, end) of each coordinate [N_axis, 2], float32: seconds, pixels down, pixels right.
        index: index into them for each token and axis [B, n, S], int64.
    """

    intervals: tuple[Tensor, ...]
    index: Tensor

    @property
    def positions(self) -> Tensor:
        """Interval of every token [B, n, S, 2], float32."""
        return torch.stack([axis[self.index[:, n]] for n, axis in enumerate(self.intervals)], dim=1)

    @property
    def midpoints(self) -> tuple[Tensor, ...]:
        """Per axis, (start + end) / 2 of each coordinate [N_axis], bitwise equal to the midpoints of `positions`."""
        return tuple((axis[:, 0] + axis[:, 1]) / 2 for axis in self.intervals)

    @classmethod
    def concatenate(cls, parts: "Sequence[Coordinates]") -> "Coordinates":
        """Coordinates of several token sequences, one after the other."""
        axes = range(len(parts[0].intervals))
        intervals = tuple(torch.cat([part.intervals[axis] for part in parts]) for axis in axes)
        shifted, first = [], [0 for _ in axes]
        for part in parts:
            # Each part's index continues after the intervals of the parts before it.
            shifted.append(torch.stack([part.index[:, axis] + first[axis] for axis in axes], dim=1))
            first = [start + part.intervals[axis].shape[0] for axis, start in enumerate(first)]
        return cls(intervals, torch.cat(shifted, dim=2))


class Clip(NamedTuple):
    """Latents as tokens [B, S, C], with their latent sizes and coordinates."""

    tokens: Tensor
    grid: Grid
    coordinates: Coordinates

    @property
    def is_video(self) -> bool:
        """Whether tokens have positions in space."""
        return len(self.coordinates.intervals) == 3


def video_grid(frames: int, height: int, width: int, scale_factors: tuple[int, int, int]) -> Grid:
    """Converts pixel frames, height and width to latent sizes, for compression factors (time, height, width).

    Raises:
        ValueError: the sizes do not fit the factors.
    """
    time, down, right = scale_factors
    if frames < 1 or (frames - 1) % time:
        raise ValueError(f"a clip has {frames} frames; this model needs 1 + a multiple of {time} (1, {1 + time}, ...).")
    if height < 1 or width < 1 or height % down or width % right:
        raise ValueError(f"a clip is {width}x{height} pixels; this model needs multiples of {right}x{down}.")
    return Grid((frames - 1) // time + 1, height // down, width // right)


def audio_steps(duration: float, *, sample_rate: int = 16000, hop_length: int = 160, downsample: int = 4) -> int:
    """Number of latent steps of `duration` seconds of audio, rounded to the nearest."""
    # Python's `round`, half to even, as in the reference.
    return round(duration * sample_rate / hop_length / downsample)


def patchify_video(latents: Tensor, patch_size: int = 1) -> Tensor:
    """[B, C, F, H, W] to tokens [B, F * H/p * W/p, C * p * p], frame-major, then row, then column."""
    batch, channels, frames, height, width = latents.shape
    rows, columns = height // patch_size, width // patch_size
    cells = latents.reshape(batch, channels, frames, rows, patch_size, columns, patch_size)
    # [B, C, F, H/p, p, W/p, p] -> [B, F, H/p, W/p, C, p, p].
    return cells.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, frames * rows * columns, channels * patch_size**2)


def unpatchify_video(tokens: Tensor, grid: Grid, patch_size: int = 1) -> Tensor:
    """Tokens back to latents [B, C, F, H, W] of the sizes in `grid`."""
    batch, rows, columns = tokens.shape[0], grid.height // patch_size, grid.width // patch_size
    channels = tokens.shape[2] // patch_size**2
    cells = tokens.reshape(batch, grid.frames, rows, columns, channels, patch_size, patch_size)
    # [B, F, H/p, W/p, C, p, p] -> [B, C, F, H/p, p, W/p, p].
    return cells.permute(0, 4, 1, 2, 5, 3, 6).reshape(batch, channels, *grid)


def patchify_audio(latents: Tensor) -> Tensor:
    """[B, C, T, M] to tokens [B, T, C * M]; feature c * M + m is mel bin m of channel c."""
    return latents.transpose(1, 2).flatten(2)


def unpatchify_audio(tokens: Tensor, channels: int) -> Tensor:
    """Tokens back to latents [B, C, T, M]."""
    # [B, T, C * M] -> [B, T, C, M] -> [B, C, T, M].
    return tokens.unflatten(2, (channels, -1)).transpose(1, 2)


def video_coordinates(
    grid: Grid,
    fps: Tensor,
    scale_factors: tuple[int, int, int] = DEFAULT_SCALE_FACTORS,
    *,
    patch_size: int = 1,
    causal: bool = True,
) -> Coordinates:
    """Coordinates of video tokens: seconds, pixels down, pixels right.

    A latent cell i spans the pixels [i, i + 1) * factor. The first latent frame of a causal codec decodes to a single
    pixel frame, so all times move back by factor - 1 frames and are clamped at 0. Seconds are frames / fps.

    Args:
        grid: latent sizes.
        fps: frames per second of each sample [B]; its device is that of the result.
        scale_factors: compression factors (time, height, width).
        patch_size: rows and columns of latent cells in one token.
        causal: whether the codec is causal in time.
    """
    device, batch = fps.device, fps.shape[0]
    frames = _bounds(grid.frames, 1, device) * scale_factors[0]
    if causal:
        # Both ends move: the first latent frame is [0, 1) and not [0, 8), frame k >= 1 is [8 k - 7, 8 k + 1).
        frames = (frames + 1 - scale_factors[0]).clamp(min=0)
    # Divide by a tensor: some devices turn a division by a Python number into a multiplication by its rounded inverse.
    seconds = frames.float()[None] / fps.float()[:, None, None]
    down = _bounds(grid.height, patch_size, device) * scale_factors[1]
    right = _bounds(grid.width, patch_size, device) * scale_factors[2]
    shape = grid.frames, down.shape[0], right.shape[0]
    # Frame-major, then rows, then columns: the order of `patchify_video`.
    index = torch.stack(torch.meshgrid(*(torch.arange(size, device=device) for size in shape), indexing="ij"))
    index = index.flatten(1).repeat(batch, 1, 1)
    # Frame rates differ between samples, so each sample has its own time intervals; rows and columns are shared.
    index[:, 0] += grid.frames * torch.arange(batch, device=device)[:, None]
    return Coordinates((seconds.flatten(0, 1), down.float(), right.float()), index)


def audio_coordinates(
    num_steps: int,
    batch: int,
    device: torch.device | str = "cpu",
    *,
    sample_rate: int = 16000,
    hop_length: int = 160,
    downsample: int = 4,
    causal: bool = True,
    shift: int = 0,
) -> Coordinates:
    """Coordinates of audio tokens, in seconds.

    Latent step i begins at spectrogram frame m = downsample * i, or max(0, m + 1 - downsample) of a causal codec, and
    ends where the next begins; a spectrogram frame lasts hop_length / sample_rate seconds.

    Args:
        num_steps: latent steps.
        batch: number of samples; all have the same coordinates.
        device: device of the result.
        sample_rate: samples per second of the spectrogram's audio.
        hop_length: samples per spectrogram frame.
        downsample: spectrogram frames per latent step.
        causal: whether the codec is causal in time.
        shift: latent steps before the first one.
    """
    # Integers up to the division: step bounds are exact, seconds are rounded once.
    frames = (_bounds(num_steps, 1, device) + shift) * downsample
    if causal:
        frames = (frames + 1 - downsample).clamp(min=0)
    seconds = (frames * hop_length).float() / torch.full((1,), sample_rate, dtype=torch.float32, device=device)
    return Coordinates((seconds,), torch.arange(num_steps, device=device).repeat(batch, 1, 1))


def _bounds(size: int, patch_size: int, device: torch.device | str) -> Tensor:
    """[start, end) of each patch along one axis, in latent cells [size / patch_size, 2]."""
    start = torch.arange(0, size, patch_size, device=device)
    return torch.stack([start, start + patch_size], dim=1)
