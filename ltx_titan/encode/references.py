"""Stage: the column `reference_video` to `reference_latents/`: what in-context training puts before the target.

A reference is brought to its target's bucket, cut at the same place, and may then be made smaller or slower than it.
Slower keeps frame 0 and then frames 1, 1 + s, 1 + 2 s, ..., so that each of its latent frames covers whole latent
frames of the target; its stored rate is that of the frames that are left.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ltx_titan.codecs import VideoCodec
from ltx_titan.commands.process.stage import Output, Plan, Stage
from ltx_titan.commands.report import Report
from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.clips import Clip, ClipRules, read_pixels
from ltx_titan.encode.videos import latent_bytes, latent_fields
from ltx_titan.media import MediaError, frames_at_rate, is_image, probe_video
from ltx_titan.media.tables import SampleRow


@dataclass(frozen=True)
class ReferenceScale:
    """How much less a reference has than its target.

    Attributes:
        space: width and height are the target's divided by this.
        time: so is the number of frames after the first.
    """

    space: int = 1
    time: int = 1

    def check(self, rules: ClipRules) -> None:
        """Checks that every bucket can be divided.

        Raises:
            ValueError: one cannot; with the option that says so.
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

    def shrink(self, clip: Clip, fps: Fraction) -> Clip:
        """Shape of the reference of a clip.

        Args:
            clip: the target's shape.
            fps: frames per second of the reference before frames are left out.
        """
        bucket = clip.bucket
        frames = (bucket.frames - 1) // self.time + 1
        small = Bucket(bucket.width // self.space, bucket.height // self.space, frames)
        return Clip(small, fps / self.time)


def reference_stage(
    rules: ClipRules,
    scale: ReferenceScale,
    report: Report,
    clip_of: Callable[[SampleRow], Clip],
    load_codec: Callable[[], VideoCodec],
) -> Stage:
    """The stage that encodes reference videos.

    Args:
        rules: how clips are brought to a shape.
        scale: how much less a reference has than its target.
        report: told what is out of the ordinary.
        clip_of: shape of a sample's target.
        load_codec: loads a video codec with an encoder.
    """

    def shape(sample: SampleRow) -> tuple[Clip, Clip]:
        """The reference before and after frames are left out."""
        path, target = sample.extras["reference_video"], clip_of(sample)
        if is_image(path):
            still = Clip(Bucket(target.bucket.width, target.bucket.height, 1), Fraction(1))
            small = ReferenceScale(scale.space).shrink(still, still.fps)
            return small, small
        info = probe_video(path)
        frames = frames_at_rate(info, rules.fps)
        if frames < target.bucket.frames:
            raise MediaError(path, f"has {frames} frames, its video's clip {target.bucket.frames}; give a longer one")
        fps = rules.fps or info.fps
        return ReferenceScale(scale.space).shrink(target, fps), scale.shrink(target, fps)

    def plan(sample: SampleRow) -> Plan:
        small = shape(sample)[1]
        return Plan(str(small), latent_bytes(small, rules))

    def read(sample: SampleRow) -> tuple[Clip, Tensor, bool]:
        whole, small = shape(sample)
        pixels = read_pixels(sample.extras["reference_video"], whole, rules, sample.key)
        if scale.time > 1:
            pixels = torch.cat([pixels[:, :1], pixels[:, 1 :: scale.time]], dim=1)
        differs = whole.bucket.frames > 1 and abs(float(whole.fps - clip_of(sample).fps)) > 1e-3
        return small, pixels, differs

    def load() -> Callable[[SampleRow, tuple[Clip, Tensor, bool]], Output]:
        codec = load_codec()

        def encode(sample: SampleRow, item: tuple[Clip, Tensor, bool]) -> Output:
            small, pixels, differs = item
            if differs:
                report.notes["references of another frame rate than their video (--fps would make them equal)"] += 1
            return {"reference_latents": latent_fields(pixels, float(small.fps), codec)}

        return encode

    return Stage(
        "references",
        ("reference_latents",),
        lambda sample: str(sample.extras["reference_video"]),
        plan,
        read,
        load,
    )
