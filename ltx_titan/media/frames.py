"""Frames to the shape a model wants: scaled to cover a size, cut around the centre, in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_frames(frames: Tensor, width: int, height: int) -> Tensor:
    """Scale frames so that they just cover width x height, and cut the rest off evenly.

    Bicubic with antialiasing; nothing is stretched.

    Args:
        frames: uint8 [F, H, W, 3].
        width: pixels of the result.
        height: pixels of the result.

    Returns:
        Pixels [3, F, height, width] in [-1, 1], float32.
    """
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = (max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale)))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    # The bicubic kernel overshoots at edges.
    return (pixels.clamp(0, 1) * 2 - 1).transpose(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Turn decoded pixels [3, F, H, W] around [-1, 1] into frames to be written, uint8 [F, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
