"""Resolution buckets: the few shapes that all clips of a data set are brought to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bucket:
    """A shape of clips in pixels; one frame is a still image."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


def parse_buckets(text: str, scale_factors: tuple[int, int, int]) -> list[Bucket]:
    """Parse `WxHxF;WxHxF;...`.

    Args:
        text: the option's value.
        scale_factors: pixels per latent along (time, height, width), which the sizes have to fit.

    Raises:
        ValueError: text of another form, or a size that does not fit.
    """
    time, height_factor, width_factor = scale_factors
    buckets = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            width, height, frames = (int(number) for number in part.lower().split("x"))
        except ValueError:
            raise ValueError(
                f"--resolution-buckets: {part!r} is not of the form WIDTHxHEIGHTxFRAMES, as in '768x448x89;512x512x49'"
            ) from None
        if (
            min(width, height, frames) < 1
            or width % width_factor
            or height % height_factor
            or frames % time != 1 % time
        ):
            raise ValueError(
                f"--resolution-buckets: {part!r} does not fit the video VAE: width must be a multiple of "
                f"{width_factor}, height of {height_factor}, frames 1 more than a multiple of {time} "
                f"(1, {time + 1}, {2 * time + 1}, ...)"
            )
        buckets.append(Bucket(width, height, frames))
    if not buckets:
        raise ValueError("--resolution-buckets: names no bucket; expected WxHxF;WxHxF;...")
    return buckets


def choose_bucket(buckets: Sequence[Bucket], width: int, height: int, frames: int) -> Bucket | None:
    """The bucket for a clip, or None where all need more frames than it has.

    Among those with enough frames: the closest aspect ratio (in its logarithm), then the most frames, then the largest
    area.
    """
    aspect = math.log(width / height)
    fitting = [bucket for bucket in buckets if bucket.frames <= frames]
    return min(
        fitting,
        key=lambda bucket: (
            abs(math.log(bucket.width / bucket.height) - aspect),
            -bucket.frames,
            -bucket.width * bucket.height,
        ),
        default=None,
    )
