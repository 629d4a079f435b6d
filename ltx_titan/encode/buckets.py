"""Resolution buckets: the few shapes that all clips of a dataset are brought to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltx_titan.common.options import parse_size

# What is worth a note in a report.
MAX_ENLARGEMENT = 1.5
MAX_CROP = 1 / 3
MAX_UNUSED = 1 / 3
# A share that is exactly the limit does not exceed it.
_ROUNDING = 1e-9
# Twice the sides of 8K video; a frame beyond is a typing error, which ends as one of memory.
_LONGEST_SIDE = 16384


@dataclass(frozen=True)
class Bucket:
    """A shape of clips in pixels; one frame is a still image."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    def enlargement(self, width: int, height: int) -> float:
        """Factor by which a source of this size is scaled to cover the bucket; below 1 it is reduced."""
        return max(self.width / width, self.height / height)

    def cropped(self, width: int, height: int) -> float:
        """Share of the area of a source of this size that is cut off after scaling, 0 to 1."""
        scale = self.enlargement(width, height)
        return 1 - self.width * self.height / (scale**2 * width * height)

    def notes(self, width: int, height: int, frames: int, used: int | None = None) -> tuple[str, ...]:
        """Losses of a source of this size and length, as plural phrases to be counted.

        Args:
            width: pixels.
            height: pixels.
            frames: of the source.
            used: frames that samples are made of; by default those of the bucket.
        """
        used = used or self.frames
        notes = {
            f"clips enlarged more than {MAX_ENLARGEMENT:g} times for their bucket (add a smaller one, or reject them "
            "by --max-enlargement)": self.enlargement(width, height) > MAX_ENLARGEMENT,
            "clips of whose area cropping removes more than a third (add a bucket of their shape, or reject them by "
            "--max-crop)": self.cropped(width, height) > MAX_CROP + _ROUNDING,
            "videos of which more than a third is after the frames used (cut them by ltx-titan split-scenes, take "
            "several windows by --windows, or add a longer bucket)": 1 - used / frames > MAX_UNUSED + _ROUNDING,
        }
        return tuple(note for note, applies in notes.items() if applies)


def parse_buckets(text: str, scale_factors: tuple[int, int, int], option: str = "--resolution-buckets") -> list[Bucket]:
    """Parses `WxHxF;WxHxF;...`.

    Args:
        text: the buckets.
        scale_factors: pixels per latent along (time, height, width), which the sizes must be multiples of.
        option: name of the option or job key, for messages.

    Raises:
        ValueError: the text has another form, or a size does not fit the video VAE.
    """
    time, height_factor, width_factor = scale_factors
    buckets = []
    for part in text.split(";"):
        part = part.strip()
        if not part:
            continue
        width, height, frames = parse_size(part, option)
        if max(width, height) > _LONGEST_SIDE:
            raise ValueError(f"{option}: {part!r}: expected sides of at most {_LONGEST_SIDE} pixels; correct it")
        fits_space = width % width_factor == 0 and height % height_factor == 0
        # The first latent frame covers one frame, every later one `time` frames.
        fits_time = (frames - 1) % time == 0
        if not fits_space or not fits_time:
            raise ValueError(
                f"{option}: {part!r} does not fit the video VAE: width must be a multiple of "
                f"{width_factor}, height of {height_factor}, frames 1 more than a multiple of {time} "
                f"(1, {time + 1}, {2 * time + 1}, ...)"
            )
        buckets.append(Bucket(width, height, frames))
    if not buckets:
        raise ValueError(f"{option}: names no bucket; expected WxHxF;WxHxF;...")
    return buckets


def choose_bucket(buckets: Sequence[Bucket], width: int, height: int, frames: int) -> Bucket | None:
    """Chooses the bucket of a clip; None if all buckets need more frames than it has.

    Among those with enough frames: the closest aspect ratio (in its logarithm), then the most frames, then the largest
    area.
    """
    # In the logarithm, 2:1 is as far from 1:1 as 1:2 is.
    aspect = math.log(width / height)
    # Never padded: repeated frames would be trained on as content.
    fitting = [bucket for bucket in buckets if bucket.frames <= frames]
    return min(
        fitting,
        key=lambda bucket: (
            abs(math.log(bucket.width / bucket.height) - aspect),
            # Negative, because `min` is to prefer the most frames and the largest area.
            -bucket.frames,
            -bucket.width * bucket.height,
        ),
        default=None,
    )
