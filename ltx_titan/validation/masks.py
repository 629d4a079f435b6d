"""Mask files to masks of latent tokens: True where a token is given.

A video mask is scaled and cut as its clip is, so that it stays on what it covers. A latent cell takes the mean over
its pixels and the maximum over its frames, and is given above one half. The first latent frame stands for one pixel
frame, every later one for as many as the codec compresses.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_titan.media import MediaError, fit_frames, is_image, iter_frames, read_image, read_sound


def read_video_mask(
    path: str | Path, frames: int, width: int, height: int, scale_factors: tuple[int, int, int]
) -> Tensor:
    """Mask of a clip's latent cells [F', H', W'], from an image (for all frames) or a video.

    Raises:
        MediaError: the file cannot be read or is shorter than the clip.
    """
    if is_image(path):
        mask = _grey(read_image(path), width, height).expand(frames, -1, -1)
    else:
        decoded = [
            _grey(torch.from_numpy(np.ascontiguousarray(frame))[None], width, height)
            for frame in islice(iter_frames(path), frames)
        ]
        if len(decoded) < frames:
            raise MediaError(path, f"has {len(decoded)} frames, its clip {frames}; give a longer mask or an image")
        mask = torch.cat(decoded)
    time, down, right = scale_factors
    cells = F.avg_pool2d(mask[:, None], (down, right))[:, 0]
    groups = [cells[:1], *(cells[1:].split(time) if frames > 1 else ())]
    return torch.stack([group.amax(0) for group in groups]) > 0.5


def read_audio_mask(path: str | Path, steps: int) -> Tensor:
    """Mask of latent steps [T], from a `.pt` file (a tensor, or a dict with `mask`) or a sound, given where it is loud.

    Raises:
        MediaError: the file cannot be read.
    """
    if Path(path).suffix == ".pt":
        stored = torch.load(path, map_location="cpu", weights_only=True)
        stored = stored.get("mask") if isinstance(stored, dict) else stored
        if not isinstance(stored, Tensor) or stored.numel() == 0:
            raise MediaError(path, "holds no mask; expected a tensor, or a dict with the key 'mask'")
        values = stored.float().flatten()
    else:
        sound = read_sound(path)
        if sound is None:
            raise MediaError(path, "has no sound track")
        values = sound.waveform.abs().mean(0)
    return F.interpolate(values[None, None], steps, mode="nearest")[0, 0] > 0.5


def _grey(frames: Tensor, width: int, height: int) -> Tensor:
    """uint8 [F, H, W, 3] -> mean over the colours [F, height, width] in [0, 1]."""
    return (fit_frames(frames, width, height).mean(0) + 1) / 2
