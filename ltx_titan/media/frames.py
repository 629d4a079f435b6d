"""Frames to the shape a model wants: scaled to cover a size, cut around the centre, in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

CENTRE = (0.5, 0.5)
"""Where a cut lies that leaves as much at either side."""


def fit_frames(frames: Tensor, width: int, height: int, anchor: tuple[float, float] = CENTRE) -> Tensor:
    """Scale frames so that they just cover width x height, and cut the rest off.

    Bicubic with antialiasing; nothing is stretched.

    Args:
        frames: uint8 [F, H, W, 3].
        width: pixels of the result.
        height: pixels of the result.
        anchor: place of the cut (down, right), from 0 (all of the rest is cut off at the end) to 1 (at the start).

    Returns:
        Pixels [3, F, height, width] in [-1, 1], float32.
    """
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = (max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale)))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = int((size[0] - height) * anchor[0]), int((size[1] - width) * anchor[1])
    pixels = pixels[:, :, top : top + height, left : left + width]
    # The bicubic kernel overshoots at edges.
    return (pixels.clamp(0, 1) * 2 - 1).transpose(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Turn decoded pixels [3, F, H, W] around [-1, 1] into frames to be written, uint8 [F, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
