"""From a video or image to the pixels of its bucket: which frames, at which rate, cut where.

The rules are in one place because three stages need the same answer: a clip's mask and its reference must show what
the clip shows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from torch import Tensor

from ltx_titan.encode.buckets import Bucket, choose_bucket
from ltx_titan.media import MediaError, fit_frames, frames_at_rate, is_image, probe_video, read_clip, read_image
from ltx_titan.media.image import CENTER

Reshape = Literal["center", "random"]

# A still image lasts one second on the time axis of the positions, as in published data sets.
_IMAGE_FPS = Fraction(1)


@dataclass(frozen=True)
class ClipRules:
    """How clips are brought to a shape.

    Attributes:
        buckets: shapes to choose from.
        scale_factors: pixels per latent along (time, height, width).
        fps: rate that all videos are read at, None for each one's own.
        reshape: where what does not fit is cut off: evenly, or at a place that differs from sample to sample.
    """

    buckets: Sequence[Bucket]
    scale_factors: tuple[int, int, int]
    fps: Fraction | None = None
    reshape: Reshape = "center"

    def anchor(self, key: Path) -> tuple[float, float]:
        """Place of a sample's cut; the same in every run, for its clip, its reference and its mask."""
        if self.reshape == "center":
            return CENTER
        digest = hashlib.blake2b(key.as_posix().encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32


@dataclass(frozen=True)
class Clip:
    """The shape that a file is brought to.

    Attributes:
        bucket: pixels and frames.
        fps: frames per second of the result.
        repeats_frames: whether its own rate is lower than the one that was asked for.
    """

    bucket: Bucket
    fps: Fraction
    repeats_frames: bool = False

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return float(self.bucket.frames / self.fps)

    def latent_size(self, scale_factors: tuple[int, int, int]) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        time, down, right = scale_factors
        return (self.bucket.frames - 1) // time + 1, self.bucket.height // down, self.bucket.width // right

    def __str__(self) -> str:
        return str(self.bucket) if self.bucket.frames == 1 else f"{self.bucket} at {float(self.fps):.5g} fps"


def plan_clip(path: Path, rules: ClipRules) -> Clip:
    """Chooses the bucket of a video or image from its header.

    Raises:
        MediaError: the file cannot be read, or is too short for every bucket.
    """
    if is_image(path):
        image = read_image(path)
        return Clip(_bucket(path, rules, image.shape[2], image.shape[1], 1), _IMAGE_FPS)
    info = probe_video(path)
    bucket = _bucket(path, rules, info.width, info.height, frames_at_rate(info, rules.fps))
    return Clip(bucket, rules.fps or info.fps, rules.fps is not None and info.fps < rules.fps)


def read_pixels(path: Path, clip: Clip, rules: ClipRules, key: Path) -> Tensor:
    """Reads the first frames of a video, or an image, at the size of its bucket: [3, F, H, W] in [-1, 1].

    Raises:
        MediaError: the file cannot be read, or ends before its header says.
    """
    bucket, anchor = clip.bucket, rules.anchor(key)
    if is_image(path):
        return fit_frames(read_image(path), bucket.width, bucket.height, anchor)
    return read_clip(path, bucket.frames, bucket.width, bucket.height, fps=rules.fps, anchor=anchor)


def _bucket(path: Path, rules: ClipRules, width: int, height: int, frames: int) -> Bucket:
    bucket = choose_bucket(rules.buckets, width, height, frames)
    if bucket is None:
        shortest = min(bucket.frames for bucket in rules.buckets)
        remedy = "add a bucket of 1 frame for still images" if frames == 1 else "add a shorter bucket"
        at_rate = "" if rules.fps is None or frames == 1 else f" at {float(rules.fps):.5g} fps"
        raise MediaError(path, f"has {frames} frame(s){at_rate}, the shortest bucket needs {shortest}; {remedy}")
    return bucket
