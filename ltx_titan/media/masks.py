"""Reading mask files as masks of latent tokens: True marks a conditioned token.

A video mask is scaled and cropped like its clip, so that it stays aligned with it. A latent cell takes the mean over
its pixels and the maximum over its frames, and is conditioned above one half. The first latent frame covers one pixel
frame, every later one the codec's temporal factor. An audio file as a mask has the time axis of its audio.
"""

from fractions import Fraction
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_titan.media.audio import read_audio, to_duration
from ltx_titan.media.container import MediaError
from ltx_titan.media.image import CENTER, fit_frames, image_has_alpha, is_image, read_image
from ltx_titan.media.video import iter_fitted

# Containers round durations, so the end of an audio mask may be missing up to this.
_MISSING_S = 0.1


def read_video_mask(
    path: str | Path,
    frames: int,
    width: int,
    height: int,
    scale_factors: tuple[int, int, int],
    fps: Fraction | None = None,
    anchor: tuple[float, float] = CENTER,
    start: int = 0,
) -> Tensor:
    """Reads a mask of a clip's latent cells [F', H', W'], from an image (for all frames) or a video.

    Args:
        path: the mask; white is conditioned.
        frames: pixel frames of the clip.
        width: of the clip, pixels.
        height: of the clip, pixels.
        scale_factors: pixels per latent along (time, height, width).
        fps: rate at which the mask is read, None for its own.
        anchor: position of the clip's crop.
        start: first frame of the clip.

    Raises:
        MediaError: the file cannot be read, is a transparent image, or is shorter than the clip.
    """
    if is_image(path):
        image = read_image(path)
        if image_has_alpha(path):
            # Over white, as clips are shown, a transparent part would be conditioned whatever its color.
            raise MediaError(
                path,
                "has transparent pixels, expected white where the clip is conditioned and black elsewhere; save it as "
                "gray, with its transparent parts black or white",
            )
        # A view: one image serves all frames without copies.
        mask = _gray(fit_frames(image, width, height, anchor)).expand(frames, -1, -1)
    else:
        decoded = [_gray(frame) for frame in islice(iter_fitted(path, width, height, fps, anchor, start), frames)]
        if len(decoded) < frames:
            found = f"has {len(decoded)} frames from frame {start}" if start else f"has {len(decoded)} frames"
            raise MediaError(path, f"{found}, its clip {frames}; use a longer mask or an image")
        mask = torch.cat(decoded)
    time, down, right = scale_factors
    # [F, H, W] -> [F, H', W'].
    cells = F.avg_pool2d(mask[:, None], (down, right))[:, 0]
    # The first latent frame of the causal codec covers one pixel frame, so it is a group of its own.
    groups = [cells[:1]]
    if frames > 1:
        groups += cells[1:].split(time)
    # Maximum over time: content that appears in any frame of a latent frame is within that latent.
    return torch.stack([group.amax(0) for group in groups]) > 0.5


def read_audio_mask(path: str | Path, steps: int, steps_per_second: float) -> Tensor:
    """Reads a mask of latent steps [T] from a `.pt` file (a tensor, or a dict with `mask`) or an audio file.

    A tensor spans the whole sample, whatever its length. An audio file has the time of the sample's audio: a step is
    conditioned if its peak exceeds one half of full scale, and what is longer than the sample is cut.

    Args:
        path: the mask.
        steps: latent steps of the audio that it belongs to.
        steps_per_second: of the audio codec.

    Raises:
        MediaError: the file cannot be read, or is shorter than its audio.
    """
    if Path(path).suffix == ".pt":
        values = _load_tensor(path).float().flatten()
        # Nearest rather than linear: a mask must stay a mask.
        return F.interpolate(values[None, None], steps, mode="nearest")[0, 0] > 0.5
    audio = read_audio(path)
    if audio is None:
        raise MediaError(path, "has no audio track")
    duration_s = steps / steps_per_second
    if audio.duration_s < duration_s - _MISSING_S:
        raise MediaError(path, f"lasts {audio.duration_s:.2f} s, its audio {duration_s:.2f} s; use a longer mask")
    # The peak of a step and not one of its samples, which of a tone may be near 0.
    loudness = to_duration(audio, duration_s).waveform.abs().amax(0)
    return F.adaptive_max_pool1d(loudness[None], steps)[0] > 0.5


def _load_tensor(path: str | Path) -> Tensor:
    try:
        # Masks come from other people's tools: a plain pickle could run code.
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise MediaError(path, "no such file") from error
    except Exception as error:  # damaged bytes can raise nearly anything, also in the zip and pickle modules
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise MediaError(path, f"not a readable PyTorch file ({reason})") from error
    stored = stored.get("mask") if isinstance(stored, dict) else stored
    if not isinstance(stored, Tensor) or stored.numel() == 0 or stored.layout != torch.strided or stored.is_quantized:
        raise MediaError(path, "holds no mask; expected a dense tensor, or a dict with the key 'mask'")
    return stored


def _gray(pixels: Tensor) -> Tensor:
    """Converts pixels [3, F, H, W] in [-1, 1] to their mean over the colors [F, H, W] in [0, 1]."""
    return (pixels.mean(0) + 1) / 2
