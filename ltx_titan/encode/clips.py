"""From a video or image to the pixels of its bucket: the frames, their rate, and the crop.

The rules are in one place because several outputs must agree: a clip's mask and its reference must show what the clip
shows, and a clip that is encoded while training must equal the prepared one.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from torch import Tensor

from ltx_titan.encode.buckets import Bucket, choose_bucket
from ltx_titan.encode.windows import FIRST_WINDOW, WindowRule, frames_used
from ltx_titan.media import (
    Audio,
    MediaError,
    TooFewFramesError,
    VideoInfo,
    after_time,
    fit_frames,
    frames_at_rate,
    is_image,
    is_same_rate,
    probe_video,
    read_audio,
    read_clip,
    read_image,
    read_video_mask,
)
from ltx_titan.media.image import CENTER, image_has_alpha

Reshape = Literal["center", "random"]

# Animations that are read as videos; those in formats of stills are refused.
ANIMATED_SUFFIXES = frozenset({".gif", ".apng"})
# A still image lasts one second on the time axis of the positions, as in published datasets.
IMAGE_FPS = Fraction(1)
# Aspect ratios that differ by less are the same, rounded.
_SAME_SHAPE = 0.02


@dataclass(frozen=True)
class ClipRules:
    """Rules by which clips are brought to a shape.

    Attributes:
        buckets: shapes to choose from.
        scale_factors: pixels per latent along (time, height, width).
        fps: rate that all videos are read at, None for each one's own.
        reshape: position of the crop: the center, or one that differs from sample to sample.
        max_enlargement: factor of enlargement above which a clip is refused.
        max_crop: share of its area above which a clip that is to be cropped is refused.
        windows: choice of windows of a clip that is longer than its bucket.
    """

    buckets: Sequence[Bucket]
    scale_factors: tuple[int, int, int]
    fps: Fraction | None = None
    reshape: Reshape = "center"
    max_enlargement: float = math.inf
    max_crop: float = 1.0
    windows: WindowRule = FIRST_WINDOW

    def anchor(self, key: Path) -> tuple[float, float]:
        """Position of a sample's crop (down, right); the same in every run, for its clip, reference and mask."""
        if self.reshape == "center":
            return CENTER
        digest = hashlib.blake2b(os.fsencode(key.as_posix()), digest_size=8).digest()
        # From a hash of the key rather than a generator: independent of the order of rows and of the number of workers.
        return int.from_bytes(digest[:4]) / 2**32, int.from_bytes(digest[4:]) / 2**32


@dataclass(frozen=True)
class Clip:
    """The shape that a file is brought to.

    Attributes:
        bucket: pixels and frames.
        fps: frames per second of the result.
        notes: what happens to the file that a user should know, as plural phrases to be counted.
    """

    bucket: Bucket
    fps: Fraction
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Duration in seconds."""
        return float(self.bucket.frames / self.fps)

    def latent_size(self, scale_factors: tuple[int, int, int]) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        time, down, right = scale_factors
        return (self.bucket.frames - 1) // time + 1, self.bucket.height // down, self.bucket.width // right

    def __str__(self) -> str:
        return str(self.bucket) if self.bucket.frames == 1 else f"{self.bucket} at {float(self.fps):.5g} fps"


@dataclass(frozen=True)
class DecodedClip:
    """A clip as read from its file, before encoding.

    Attributes:
        clip: its shape.
        pixels: [3, F, H, W] in [-1, 1].
        audio: the audio track from the first of these frames on, None without any.
    """

    clip: Clip
    pixels: Tensor
    audio: Audio | None


def read_header(path: Path) -> VideoInfo:
    """Reads size, frame count and rate of a video or image.

    Raises:
        MediaError: the file cannot be read.
    """
    if is_image(path):
        image = read_image(path)
        return VideoInfo(1, image.shape[2], image.shape[1], IMAGE_FPS, has_audio=False, has_alpha=image_has_alpha(path))
    return probe_video(path)


def plan_clip(path: Path, rules: ClipRules, header: VideoInfo | None = None) -> Clip:
    """Chooses the bucket and rate of a video or image.

    Args:
        path: the file.
        rules: rules by which clips are brought to a shape.
        header: the file's, if it was read before.

    Raises:
        MediaError: the file cannot be read, is too short for every bucket, or exceeds a limit of the rules.
    """
    header = header or read_header(path)
    # An image has no rate to resample.
    fps = None if is_image(path) else rules.fps
    frames = frames_at_rate(header, fps)
    bucket = choose_bucket(rules.buckets, header.width, header.height, frames)
    if bucket is None:
        shortest = min(bucket.frames for bucket in rules.buckets)
        remedy = "add a bucket of 1 frame for still images" if frames == 1 else "add a shorter bucket"
        at_rate = "" if fps is None or frames == 1 else f" at {float(fps):.5g} fps"
        raise MediaError(path, f"has {frames} frame(s){at_rate}, the shortest bucket needs {shortest}; {remedy}")
    size = f"is {header.width}x{header.height}, which the bucket {bucket} would"
    if (enlargement := bucket.enlargement(header.width, header.height)) > rules.max_enlargement:
        raise MediaError(path, f"{size} enlarge {enlargement:.2f} times; the limit is {rules.max_enlargement:g}")
    if (cropped := bucket.cropped(header.width, header.height)) > rules.max_crop + 1e-9:
        raise MediaError(path, f"{size} crop by {cropped:.0%} of its area; the limit is {rules.max_crop:.0%}")
    rate = fps or header.fps
    # The start of a random window does not matter for the number of frames.
    used = frames_used(rules.windows.starts(frames, bucket.frames, rate, path), bucket.frames)
    notes = _notes(path, header, fps) + bucket.notes(header.width, header.height, frames, used)
    return Clip(bucket, rate, notes)


def _notes(path: Path, header: VideoInfo, fps: Fraction | None) -> tuple[str, ...]:
    notes = {
        "videos of another frame rate, resampled to --fps": fps is not None and header.fps != fps,
        "animated images, of few colors and with varying times (convert them to video)": path.suffix.lower()
        in ANIMATED_SUFFIXES,
        "videos slower than the frame rate asked for, whose frames were repeated": fps is not None and header.fps < fps,
        "videos of variable frame rate, resampled by their time stamps": header.is_variable,
        "interlaced videos, deinterlaced by FFmpeg's bwdif at one frame for two fields": header.is_interlaced,
        "videos and images with transparency, shown over white": header.has_alpha,
    }
    return tuple(note for note, applies in notes.items() if applies)


def read_pixels(path: Path, clip: Clip, rules: ClipRules, key: Path, start: int = 0) -> Tensor:
    """Reads consecutive frames of a video, or an image, at the size of its bucket: [3, F, H, W] in [-1, 1].

    Args:
        path: the file.
        clip: the shape that it is brought to.
        rules: rules by which clips are brought to a shape.
        key: the sample's key, which a random crop depends on.
        start: first frame, at the rate of the rules.

    Raises:
        MediaError: the file cannot be read, or has fewer frames than its header states.
    """
    bucket, anchor = clip.bucket, rules.anchor(key)
    if is_image(path):
        return fit_frames(read_image(path), bucket.width, bucket.height, anchor)
    return read_clip(path, bucket.frames, bucket.width, bucket.height, start, rules.fps, anchor)


def decode_clip(path: Path, rules: ClipRules, key: Path, with_audio: bool, start: int = 0) -> DecodedClip:
    """Reads a video or image at the shape of its bucket, and its audio track if `with_audio`, from frame `start` on.

    A video of which fewer frames decode than its packets promise gets the bucket of those that do; a window that does
    not start at frame 0 is refused then.

    Raises:
        MediaError: the file cannot be read, or is too short for every bucket.
    """
    header = read_header(path)
    clip = plan_clip(path, rules, header)
    try:
        pixels = read_pixels(path, clip, rules, key, start)
    except TooFewFramesError as error:
        if start:
            raise
        fps = rules.fps or header.fps
        # Counted at the rate of the rules; a header counts at its own.
        decoded = replace(header, frames=math.floor(error.frames / fps * header.fps))
        clip = plan_clip(path, rules, decoded)
        pixels = read_pixels(path, clip, rules, key)
    audio = read_audio(path) if with_audio and not is_image(path) else None
    if audio is not None and start:
        audio = after_time(audio, start / clip.fps)
    return DecodedClip(clip, pixels, audio)


def read_clip_mask(path: Path, media: Path, clip: Clip, rules: ClipRules, key: Path, start: int = 0) -> Tensor:
    """Reads the mask of a clip's latent cells [F', H', W'], True where conditioned; cropped like the clip.

    A video is read at the rate of the clip, so that it shows the same moments. One that has as many frames as the
    clip's file was drawn frame by frame, whatever rate its header states.

    Args:
        path: the mask.
        media: file of the clip; may be gone.
        clip: shape of the clip.
        rules: rules by which clips are brought to a shape.
        key: the sample's key, which a random crop depends on.
        start: first frame of the clip in its file, and in that of the mask.

    Raises:
        MediaError: the file cannot be read, or is shorter than the clip.
    """
    bucket, fps = clip.bucket, rules.fps
    if mask_has_other_rate(path, media, clip):
        is_frame_by_frame = media.is_file() and probe_video(path).frames == probe_video(media).frames
        if is_frame_by_frame and fps is not None:
            raise MediaError(
                path,
                f"has as many frames as its clip, at {float(probe_video(path).fps):.5g} fps instead of "
                f"{float(probe_video(media).fps):.5g}, and --fps reads both by their times; write it at that rate",
            )
        fps = None if is_frame_by_frame else clip.fps
    return read_video_mask(
        path, bucket.frames, bucket.width, bucket.height, rules.scale_factors, fps, rules.anchor(key), start
    )


def mask_has_other_rate(path: Path, media: Path, clip: Clip) -> bool:
    """Whether a mask is a video of another frame rate than its clip's file, or than the clip if the file is gone.

    Raises:
        MediaError: the mask cannot be read.
    """
    if is_image(path) or is_image(media):
        return False
    own = probe_video(media).fps if media.is_file() else clip.fps
    return not is_same_rate(probe_video(path).fps, own)


def has_other_shape(path: Path, media: Path) -> bool:
    """Whether a reference or mask has another aspect ratio than its clip's file, so that other parts are cropped.

    Raises:
        MediaError: a file cannot be read.
    """
    if not media.is_file():
        return False
    own, other = read_header(media), read_header(path)
    return abs(other.width / other.height * own.height / own.width - 1) > _SAME_SHAPE
