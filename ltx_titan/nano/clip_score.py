"""Measures what a procedural clip shows and plays, in closed form: geometry of its frames, spectrum of its audio.

Nothing is learned, so a score of generated clips cannot share the faults of a model. A property that cannot be measured
(no shape, silence, no clear direction) is -1 and equals nothing.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_titan.nano.clips import (
    ALL_SHAPES,
    BACKGROUNDS,
    COLORS,
    FPS,
    FRAME,
    MOVE_SECONDS,
    OCTAVES,
    PITCH_HZ,
    RADII,
    TRAVEL,
    Clips,
    coverage,
)

UNKNOWN = -1
# Video and audio are in sync if the middles of motion and tone are at most two frames apart.
SYNC_SECONDS = 0.08

_SHAPE_FRAMES = slice(0, None, 4)
# Fraction of the pixels of a frame that a shape covers at least, and contrast to the background.
_LEAST_AREA, _LEAST_CONTRAST = 0.015, 0.15
# Distance of the center in pixels, and its ratio to the distance across.
_LEAST_TRAVEL, _STRAIGHTNESS = 0.4 * TRAVEL, 2.0
# Best overlap with a template below which a blob is no shape.
_LEAST_OVERLAP = 0.7
_WINDOW_SECONDS, _HOP_SECONDS = 0.064, 0.01
_LOWEST_HZ, _HIGHEST_HZ = 150.0, 3000.0
_LEAST_LEVEL = 0.02


@dataclass(frozen=True)
class Measured:
    """Properties of each clip [B], indices as in `Clips`; -1 is unknown.

    Attributes:
        shape, color, size, background, motion: of the frames.
        seen_at: middle of the motion, seconds; NaN without one.
        pitch: index into `PITCHES`.
        tone_motion: direction that pitch and balance of the tone tell, index into `MOTIONS`.
        heard_at: middle of the tone, seconds; NaN without one.
    """

    shape: Tensor
    color: Tensor
    size: Tensor
    background: Tensor
    motion: Tensor
    seen_at: Tensor
    pitch: Tensor
    tone_motion: Tensor
    heard_at: Tensor


def measure(frames: Tensor, audio: Tensor, sample_rate: int) -> Measured:
    """Measures clips.

    Args:
        frames: [B, 3, F, 64, 64] in [-1, 1], 25 per second.
        audio: [B, 2, N].
        sample_rate: Hz.
    """
    shape, color, size, background, motion, seen_at = _measure_frames(frames.float())
    pitch, tone_motion, heard_at = _measure_audio(audio.float(), sample_rate)
    return Measured(shape, color, size, background, motion, seen_at, pitch, tone_motion, heard_at)


def adherence(measured: Measured, clips: Clips) -> dict[str, float]:
    """Fraction of clips that show and play what their captions say, by attribute.

    `pitch` needs register and direction of the tone, `all` every attribute; `sync` compares the two streams only.
    """
    right = {
        name: getattr(measured, name) == getattr(clips, name)
        for name in ("shape", "color", "size", "background", "motion")
    }
    right["register"] = measured.pitch == clips.size
    right["tone_motion"] = measured.tone_motion == clips.motion
    right["pitch"] = right["register"] & right["tone_motion"]
    right["all"] = torch.stack(list(right.values())).all(0)
    return {name: float(flags.float().mean()) for name, flags in (right | agreement(measured)).items()}


def agreement(measured: Measured) -> dict[str, Tensor]:
    """Whether the two streams of each clip [B] agree in direction, in size and register, in time, and in all three."""
    direction = (measured.motion == measured.tone_motion) & (measured.motion != UNKNOWN)
    register = (measured.size == measured.pitch) & (measured.size != UNKNOWN)
    # A comparison with NaN is False.
    time = (measured.seen_at - measured.heard_at).abs() <= SYNC_SECONDS
    return {
        "sync_direction": direction,
        "sync_register": register,
        "sync_time": time,
        "sync": direction & register & time,
    }


def _measure_frames(frames: Tensor) -> tuple[Tensor, ...]:
    """Shape, color, size, background, motion [B] and the middle of the motion in seconds [B]."""
    pixels = (frames + 1) / 2
    batch, _, count, height, width = pixels.shape
    edges = torch.cat(
        [pixels[..., :2, :].flatten(2), pixels[..., -2:, :].flatten(2), pixels[..., :2].flatten(2)], dim=2
    )
    # The median: a shape covers less than half of the edges.
    ground = edges.median(2).values
    levels = torch.tensor(list(BACKGROUNDS.values()), device=frames.device)
    background = (ground.mean(1, keepdim=True) - levels).abs().argmin(1)

    difference = pixels - ground[:, :, None, None, None]
    contrast = difference.norm(dim=1)
    # Robust maximum: the 5 % of pixels with the most contrast are within the shape.
    strongest = contrast.flatten(1).quantile(0.97, dim=1)
    inside = (contrast > 0.8 * strongest[:, None, None, None]).float()[:, None]
    shade = (pixels * inside).sum((2, 3, 4)) / inside.sum((2, 3, 4)).clamp(min=1)
    palette = torch.tensor(list(COLORS.values()), device=frames.device)
    color = torch.cdist(shade, palette).argmin(1)

    axis = shade - ground
    alpha = torch.einsum("bcfhw,bc->bfhw", difference, axis) / (axis.square().sum(1)[:, None, None, None] + 1e-6)
    # Faint noise over the whole frame would move the center.
    alpha = ((alpha - 0.15) / 0.7).clamp(0, 1)
    area = alpha.sum((2, 3))
    columns = torch.arange(width, device=frames.device) + 0.5
    rows = torch.arange(height, device=frames.device) + 0.5
    center = torch.stack([(alpha.sum(2) * columns).sum(-1), (alpha.sum(3) * rows).sum(-1)], dim=-1)
    center = center / area[..., None].clamp(min=1e-3)

    shape, overlap, radius = _match_shapes(alpha[:, _SHAPE_FRAMES], center[:, _SHAPE_FRAMES])
    edge = (RADII[0][1] + RADII[1][0]) / 2
    size = (radius > edge).long()
    moved = center[:, -3:].mean(1) - center[:, :2].mean(1)
    motion = _direction(moved[:, 0], moved[:, 1], _LEAST_TRAVEL)
    along = ((center - center[:, :2].mean(1, keepdim=True)) * moved[:, None]).sum(-1) / moved.square().sum(-1)[:, None]
    seen_at = _crossing(along, 0.5) / FPS

    exists = (area.median(1).values > _LEAST_AREA * height * width) & (strongest > _LEAST_CONTRAST)
    is_shape = exists & (overlap > _LEAST_OVERLAP)
    shape, size = (torch.where(is_shape, value, UNKNOWN) for value in (shape, size))
    color, motion = (torch.where(exists, value, UNKNOWN) for value in (color, motion))
    seen_at = torch.where(motion == UNKNOWN, math.nan, seen_at)
    return shape, color, size, background, motion, seen_at


def _match_shapes(alpha: Tensor, center: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compares masks [B, T, H, W] with every shape of the same area and center.

    Returns:
        Index of the best shape, its overlap (soft intersection over union, mean over frames), its radius, all [B].
    """
    batch = len(alpha)
    overlaps, radii = [], []
    for index in range(len(ALL_SHAPES)):
        shape = torch.full((batch,), index, device=alpha.device)
        radius = (alpha.sum((2, 3)).mean(1) / _unit_area(index)).sqrt()
        template = coverage(shape, center, radius, alpha.shape[-1])
        union = torch.maximum(alpha, template).sum((2, 3)).clamp(min=1e-3)
        overlaps.append((torch.minimum(alpha, template).sum((2, 3)) / union).mean(1))
        radii.append(radius)
    overlap, best = torch.stack(overlaps, dim=1).max(1)
    return best, overlap, torch.stack(radii, dim=1).gather(1, best[:, None])[:, 0]


def _unit_area(shape: int) -> float:
    """Area of a shape of radius 1, in the order of `ALL_SHAPES`."""
    arm, hole = 0.36, 0.55
    return (math.pi, (2 * 0.88) ** 2, 3 * math.sqrt(3) * 0.6**2, 8 * arm - 4 * arm**2, math.pi * (1 - hole**2))[shape]


def _direction(right: Tensor, down: Tensor, least: float) -> Tensor:
    """Index into `MOTIONS` of a displacement [B], -1 if it is short or diagonal."""
    across, along = right.abs(), down.abs()
    horizontal = torch.where(right < 0, 0, 1)
    vertical = torch.where(down < 0, 2, 3)
    result = torch.where(across > along, horizontal, vertical)
    longer, shorter = torch.maximum(across, along), torch.minimum(across, along)
    return torch.where((longer >= least) & (longer >= _STRAIGHTNESS * shorter), result, UNKNOWN)


def _crossing(values: Tensor, level: float) -> Tensor:
    """Fractional index at which each row [B, T] first reaches a level; 0 if it starts above or never does."""
    above = values >= level
    after = above.int().argmax(1).clamp(min=1)
    high, low = values.gather(1, after[:, None])[:, 0], values.gather(1, after[:, None] - 1)[:, 0]
    return after - 1 + ((level - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _measure_audio(audio: Tensor, sample_rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Register and direction of the tone [B], and its middle in seconds [B]."""
    length, hop = round(_WINDOW_SECONDS * sample_rate), round(_HOP_SECONDS * sample_rate)
    window = torch.hann_window(length, device=audio.device)
    spectrum = torch.stft(
        audio.flatten(0, 1), length, hop, window=window, center=True, pad_mode="constant", return_complex=True
    )
    # [B, 2, bins, T].
    power = spectrum.abs().square().unflatten(0, (-1, 2))
    bin_hz = sample_rate / length
    first, last = math.ceil(_LOWEST_HZ / bin_hz), math.floor(_HIGHEST_HZ / bin_hz)
    mono = power.sum(1)
    peak = mono[:, first:last].argmax(1) + first
    # Parabola through the logarithms of the peak and its neighbors.
    left, top, right = (mono.gather(1, peak[:, None] + step)[:, 0].clamp(min=1e-12).log() for step in (-1, 0, 1))
    offset = (0.5 * (left - right) / (left - 2 * top + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)
    octave = ((peak + offset) * bin_hz).log2()
    loudness = mono.sum(1)
    active = loudness > 0.1 * loudness.amax(1, keepdim=True)
    weight = active.float()
    # Root mean square of the loudest window.
    level = (loudness.amax(1) * 2).sqrt() / window.sum()
    total = weight.sum(1)
    seconds = torch.arange(mono.shape[-1], device=audio.device) * hop / sample_rate
    heard_at = (weight * seconds).sum(1) / total
    balance = (power[:, 1].sum(1) - power[:, 0].sum(1)) / loudness.clamp(min=1e-12)

    def slope(values: Tensor) -> Tensor:
        """Least-squares change of a track [B, T] over the duration of a move."""
        time = seconds - heard_at[:, None]
        mean = (weight * values).sum(1, keepdim=True) / total[:, None]
        covariance = (weight * time * (values - mean)).sum(1)
        return MOVE_SECONDS * covariance / (weight * time.square()).sum(1).clamp(min=1e-6)

    # Both in fractions of the full move: balance changes by twice the fraction of the width.
    fraction = TRAVEL / FRAME
    tone_motion = _direction(slope(balance) / (2 * fraction), -slope(octave) / (OCTAVES * fraction), 0.4)
    middle = (math.log2(PITCH_HZ[0]) + math.log2(PITCH_HZ[1])) / 2
    pitch = ((weight * octave).sum(1) / total < middle).long()
    is_heard = (level > _LEAST_LEVEL) & (total > 0)
    pitch, tone_motion = (torch.where(is_heard, value, UNKNOWN) for value in (pitch, tone_motion))
    return pitch, tone_motion, torch.where(is_heard, heard_at, math.nan)
