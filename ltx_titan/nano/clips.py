"""Procedural clips with audio: one moving shape, and a tone that follows it. Captions describe both.

The tone plays while the shape moves. Its pitch follows the height of the shape, its balance the horizontal position,
its register the size: either stream tells direction, size and timing of the other. Start, timing and shades vary from
clip to clip and are in no caption, so only cross-modal attention can make the two streams agree.

Some combinations of shape, color and motion are held out: all pairs of their attributes are in the training clips, the
combinations themselves are not.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import torch
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
# A shape that no training clip of the transformer has, and the word that stands for it in captions.
CONCEPT_SHAPE, TRIGGER = "ring", "zorb"
ALL_SHAPES = (*SHAPES, CONCEPT_SHAPE)
COLORS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.12, 0.72, 0.20),
    "blue": (0.16, 0.26, 0.92),
    "yellow": (0.92, 0.84, 0.12),
    "magenta": (0.84, 0.16, 0.82),
    "cyan": (0.16, 0.82, 0.86),
}
COLOR_NAMES = tuple(COLORS)
SIZES = ("small", "large")
# Radius in pixels of a frame of 64 pixels.
RADII = ((11.0, 12.0), (15.0, 16.0))
MOTIONS = ("left", "right", "up", "down")
BACKGROUNDS = {"black": 0.06, "gray": 0.45, "white": 0.94}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
# The register of the tone is that of the size: small shapes are high.
PITCHES = ("high", "low")
PITCH_HZ = (1200.0, 400.0)
# Octaves over the height of the frame.
OCTAVES = 1.6

FRAME, FRAMES, FPS = 64, 25, 25
# Width of an edge in pixels. Soft, as in photographs: where an edge is sharp, any codec this small blurs it.
EDGE = 3.0
SECONDS = FRAMES / FPS
SAMPLE_RATE = 16000
TRAVEL = 20.0
MOVE_SECONDS = 0.6
_EARLIEST, _LATEST = 0.08, 0.32
_FADE_SECONDS = 0.02
_AMPLITUDE = 0.4
_OVERTONE = 0.25

_DIRECTIONS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
_TONE_VERBS = (("pans left", "pans right", "rises", "falls"), ("panning left", "panning right", "rising", "falling"))


class Combination(NamedTuple):
    """Attributes that a caption names, as indices into the tuples of this module."""

    shape: int
    color: int
    motion: int
    size: int
    background: int


def is_held_out(shape: int, color: int, motion: int) -> bool:
    """Whether no training clip shows this shape in this color with this motion: 12 of 96, among them red circle, left.

    Every second pair of shape and color loses one of its four motions.
    """
    return shape < len(SHAPES) and (shape + color) % 2 == 0 and motion == (shape + color // 2) % len(MOTIONS)


def combinations(*, held_out: bool, shapes: Sequence[int] = range(len(SHAPES))) -> list[Combination]:
    """All combinations of attributes that training clips have, or all that are held out."""
    return [
        Combination(shape, color, motion, size, background)
        for shape in shapes
        for color in range(len(COLORS))
        for motion in range(len(MOTIONS))
        for size in range(len(SIZES))
        for background in range(len(BACKGROUNDS))
        if is_held_out(shape, color, motion) == held_out
    ]


def caption_of(combination: Combination, template: int = 0) -> str:
    """Caption in one of two wordings; the shape of the concept is called by its trigger word."""
    shape = (*SHAPES, TRIGGER)[combination.shape]
    color, size = COLOR_NAMES[combination.color], SIZES[combination.size]
    motion, background = MOTIONS[combination.motion], BACKGROUND_NAMES[combination.background]
    tone = f"a {PITCHES[combination.size]} tone {_TONE_VERBS[template][combination.motion]}"
    if template == 0:
        return f"A {size} {color} {shape} moves {motion} on a {background} background while {tone}."
    return f"{background} background, {color} {shape}, {size}, moving {motion}, {tone}"


@dataclass(frozen=True)
class Clips:
    """A batch of clips as numbers: everything that `render_video` and `render_audio` need.

    Attributes:
        shape: index into `ALL_SHAPES` [B].
        color: index into `COLORS` [B].
        motion: index into `MOTIONS` [B].
        size: index into `SIZES` and `PITCHES` [B].
        background: index into `BACKGROUNDS` [B].
        template: wording of the caption [B].
        shade: color of the shape in [0, 1] [B, 3].
        level: gray level of the background in [0, 1] [B].
        radius: pixels [B].
        start: center of the shape before it moves, pixels right and down [B, 2].
        onset: seconds at which it starts to move [B].
    """

    shape: Tensor
    color: Tensor
    motion: Tensor
    size: Tensor
    background: Tensor
    template: Tensor
    shade: Tensor
    level: Tensor
    radius: Tensor
    start: Tensor
    onset: Tensor

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, rows: slice | Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All clips of several batches."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def to(self, device: torch.device | str) -> Self:
        """The same clips with tensors on a device."""
        return type(self)(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def combinations(self) -> list[Combination]:
        """Attributes of each clip."""
        columns = (self.shape, self.color, self.motion, self.size, self.background)
        return [Combination(*row) for row in torch.stack(columns, dim=1).tolist()]

    @property
    def captions(self) -> list[str]:
        """Caption of each clip."""
        return [caption_of(c, t) for c, t in zip(self.combinations, self.template.tolist(), strict=True)]

    def position(self, seconds: Tensor) -> Tensor:
        """Center of the shape at times [T]: [B, T, 2], pixels right and down."""
        progress = ((seconds[None] - self.onset[:, None]) / MOVE_SECONDS).clamp(0, 1)
        direction = torch.tensor(_DIRECTIONS, device=self.start.device)[self.motion]
        return self.start[:, None] + TRAVEL * progress[..., None] * direction[:, None]


def draw_clips(count: int, seed: int, among: Sequence[Combination]) -> Clips:
    """Draws clips of the given combinations, each about equally often; the same for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor(among)
    # Whole rounds over all combinations, in random order: every prefix is nearly balanced.
    order = torch.cat([torch.randperm(len(among), generator=generator) for _ in range(-(-count // len(among)))])
    shape, color, motion, size, background = rows[order[:count]].unbind(1)

    def uniform(low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    shade = torch.tensor(list(COLORS.values()))[color] + uniform(-0.05, 0.05, count, 3)
    level = torch.tensor(list(BACKGROUNDS.values()))[background] + uniform(-0.03, 0.03, count)
    low, high = torch.tensor(RADII)[size].unbind(1)
    radius = uniform(low, high, count)
    # The reach of a triangle's corners, so that no part of any shape leaves the frame.
    reach = 1.2 * radius[:, None] + EDGE / 2
    travel = TRAVEL * torch.tensor(_DIRECTIONS)[motion]
    first = torch.maximum(reach, reach - travel)
    last = torch.minimum(FRAME - reach, FRAME - reach - travel)
    start = first + (last - first) * torch.rand(count, 2, generator=generator)
    onset = uniform(_EARLIEST, _LATEST, count)
    template = torch.randint(len(_TONE_VERBS), (count,), generator=generator)
    return Clips(
        shape, color, motion, size, background, template, shade.clamp(0, 1), level.clamp(0, 1), radius, start, onset
    )


def signed_distance(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance in pixels to the outline of a shape, negative inside, exact along straight edges.

    Args:
        shape: index into `ALL_SHAPES`, broadcastable to the rest.
        x, y: pixels right of and below the center.
        radius: pixels.
    """
    distance = torch.hypot(x, y)
    box = torch.maximum(x.abs(), y.abs())
    bar = torch.minimum(x.abs(), y.abs())
    # Three half planes at 0.6 radius from the center, one corner up.
    slope = math.sqrt(3) / 2
    triangle = torch.maximum(y, slope * x.abs() - 0.5 * y) - 0.6 * radius
    cross = torch.maximum(box - radius, bar - 0.36 * radius)
    ring = (distance - 0.775 * radius).abs() - 0.225 * radius
    outlines = (distance - radius, box - 0.88 * radius, triangle, cross, ring)
    result = outlines[0]
    for index, outline in enumerate(outlines[1:], start=1):
        result = torch.where(shape == index, outline, result)
    return result


def coverage(shape: Tensor, center: Tensor, radius: Tensor, size: int = FRAME) -> Tensor:
    """Opacity of a shape at each pixel: it falls from 1 to 0 over the width of an edge.

    Args:
        shape: index into `ALL_SHAPES` [B].
        center: pixels right and down [B, T, 2].
        radius: pixels [B].
        size: width and height of the frame.

    Returns:
        [B, T, size, size].
    """
    axis = torch.arange(size, device=center.device) + 0.5
    x = axis[None, None, None, :] - center[..., 0, None, None]
    y = axis[None, None, :, None] - center[..., 1, None, None]
    x, y = torch.broadcast_tensors(x, y)
    distance = signed_distance(shape[:, None, None, None], x, y, radius[:, None, None, None])
    return (0.5 - distance / EDGE).clamp(0, 1)


def render_video(clips: Clips) -> Tensor:
    """Frames [B, 3, 25, 64, 64] in [-1, 1], float32, on the device of the clips."""
    seconds = torch.arange(FRAMES, device=clips.start.device) / FPS
    alpha = coverage(clips.shape, clips.position(seconds), clips.radius)[:, None]
    shade, level = clips.shade[:, :, None, None, None], clips.level[:, None, None, None, None]
    return 2 * torch.lerp(level.expand_as(shade), shade, alpha) - 1


def render_audio(clips: Clips, sample_rate: int = SAMPLE_RATE) -> Tensor:
    """Stereo audio [B, 2, N] of one second, float32, on the device of the clips."""
    device = clips.start.device
    seconds = torch.arange(round(SECONDS * sample_rate), device=device) / sample_rate
    position = clips.position(seconds) / FRAME
    base = torch.tensor(PITCH_HZ, device=device)[clips.size]
    hertz = base[:, None] * 2 ** (OCTAVES * (0.5 - position[..., 1]))
    # float64: after a second of cycles, float32 would detune the overtone.
    phase = 2 * math.pi * (hertz.double() / sample_rate).cumsum(-1)
    tone = (phase.sin() + _OVERTONE * (2 * phase).sin()).float()
    since = seconds[None] - clips.onset[:, None]
    fade = (torch.minimum(since, MOVE_SECONDS - since) / _FADE_SECONDS).clamp(0, 1)
    tone = _AMPLITUDE * tone * torch.sin(fade * math.pi / 2) ** 2
    right = position[..., 0]
    # Equal power: the loudness of both channels together does not depend on the balance.
    return torch.stack([tone * (1 - right).sqrt(), tone * right.sqrt()], dim=1)
