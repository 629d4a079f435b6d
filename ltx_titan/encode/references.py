"""Reference videos of in-context training: brought to their target's bucket, then possibly made smaller or slower.

A reference is cropped at the position of its target. A temporal factor s keeps frame 0 and then frames 1, 1 + s,
1 + 2 s, ..., so that each latent frame of the reference covers whole latent frames of the target; its stored rate is
that of the kept frames.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.clips import IMAGE_FPS, Clip, ClipRules, read_pixels
from ltx_titan.media import MediaError, frames_at_rate, is_image, probe_video


@dataclass(frozen=True)
class ReferenceScale:
    """Size of a reference relative to its target.

    Attributes:
        space: width and height are the target's divided by this.
        time: the number of frames after the first is the target's divided by this.
    """

    space: int = 1
    time: int = 1

    def check(self, rules: ClipRules) -> None:
        """Checks that every bucket can be divided.

        Raises:
            ValueError: a bucket cannot; with the option to change.
        """
        time, down, right = rules.scale_factors
        for option, value in (("downscale", self.space), ("temporal-scale", self.time)):
            if value < 1:
                raise ValueError(f"--reference-{option}-factor = {value}: expected 1 or more")
        for bucket in rules.buckets:
            if bucket.width % (right * self.space) or bucket.height % (down * self.space):
                raise ValueError(
                    f"--reference-downscale-factor = {self.space}: references of bucket {bucket} would have "
                    f"{bucket.width / self.space:g}x{bucket.height / self.space:g} pixels; expected multiples of "
                    f"{right}x{down}; choose another factor, or buckets of multiples of "
                    f"{right * self.space}x{down * self.space}"
                )
            if (bucket.frames - 1) % (time * self.time):
                raise ValueError(
                    f"--reference-temporal-scale-factor = {self.time}: bucket {bucket} has {bucket.frames} frames; "
                    f"expected 1 more than a multiple of {time * self.time}"
                )


@dataclass(frozen=True)
class ReferencePlan:
    """Shapes of a reference.

    Attributes:
        decoded: as read from its file: small, with all frames.
        stored: as encoded: without the frames that the temporal factor drops.
        start: first frame of its file.
    """

    decoded: Clip
    stored: Clip
    start: int = 0


@dataclass(frozen=True)
class DecodedReference:
    """A reference as read from its file, before encoding.

    Attributes:
        clip: its shape.
        pixels: [3, F, H, W] in [-1, 1].
        has_other_rate: whether its frames are at another rate than those of its target.
    """

    clip: Clip
    pixels: Tensor
    has_other_rate: bool


def plan_reference(path: Path, target: Clip, rules: ClipRules, scale: ReferenceScale, start: int = 0) -> ReferencePlan:
    """Finds the shapes of a reference from its header.

    Args:
        path: the reference, a video or image.
        target: shape of the clip that it belongs to.
        rules: rules by which clips are brought to a shape.
        scale: size of a reference relative to its target.
        start: first frame of the target in its file.

    Raises:
        MediaError: the file cannot be read, or is shorter than its target.
    """
    width, height = target.bucket.width // scale.space, target.bucket.height // scale.space
    if is_image(path):
        still = Clip(Bucket(width, height, 1), IMAGE_FPS)
        # An image has no frames to drop, whatever the temporal factor.
        return ReferencePlan(still, still)
    info = probe_video(path)
    frames, needed = frames_at_rate(info, rules.fps), target.bucket.frames
    # Not repeated or padded: reference and target must show the same moments.
    fps = rules.fps or info.fps
    # The same moment, also at another rate.
    first = round(start / target.fps * fps)
    if frames < first + needed:
        raise MediaError(path, f"has {frames} frames, its video's clip {first + needed}; use a longer one")
    kept = (needed - 1) // scale.time + 1
    stored = Clip(Bucket(width, height, kept), fps / scale.time)
    return ReferencePlan(Clip(Bucket(width, height, needed), fps), stored, first)


def decode_reference(
    path: Path, target: Clip, rules: ClipRules, scale: ReferenceScale, key: Path, start: int = 0
) -> DecodedReference:
    """Reads a reference at its stored shape.

    Args:
        path: the reference, a video or image.
        target: shape of the clip that it belongs to.
        rules: rules by which clips are brought to a shape.
        scale: size of a reference relative to its target.
        key: the sample's key, which a random crop depends on.
        start: first frame of the target in its file.

    Raises:
        MediaError: the file cannot be read, or is shorter than its target.
    """
    plan = plan_reference(path, target, rules, scale, start)
    pixels = read_pixels(path, plan.decoded, rules, key, plan.start)
    if scale.time > 1:
        # Frame 0 is a latent frame of its own in target and reference; the frames after it are subsampled, whole latent
        # frames of the target at a time.
        pixels = torch.cat([pixels[:, :1], pixels[:, 1 :: scale.time]], dim=1)
    # Rates of stored targets are floats, hence the tolerance.
    has_other_rate = plan.decoded.bucket.frames > 1 and abs(float(plan.decoded.fps - target.fps)) > 1e-3
    return DecodedReference(plan.stored, pixels, has_other_rate)
