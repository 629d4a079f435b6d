"""Proposes resolution buckets for a dataset from the sizes and lengths of its clips, with a reason for each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ltx_titan.encode.buckets import Bucket

# Aspect ratios that cameras and screens have; clips are cropped to the nearest.
_ASPECTS = {"16:9": 16 / 9, "3:2": 3 / 2, "4:3": 4 / 3, "1:1": 1.0, "3:4": 3 / 4, "2:3": 2 / 3, "9:16": 9 / 16}
# An aspect ratio with fewer clips shares the bucket of its neighbor: each bucket makes batches harder to fill.
_MIN_SHARE = 0.1
# Area and length of the recipes' clips: 4,032 video tokens.
_MAX_AREA = 768 * 448
_MAX_FRAMES = 89
# So many of a bucket's clips are long enough for it.
_LONG_ENOUGH = 0.9


class Source(NamedTuple):
    """Size in pixels, as displayed, and number of frames of a clip; 1 for a still image."""

    width: int
    height: int
    frames: int


class Proposal(NamedTuple):
    """A bucket, and why."""

    bucket: Bucket
    reason: str


def propose_buckets(sources: Sequence[Source], scale_factors: tuple[int, int, int]) -> list[Proposal]:
    """Proposes one bucket for each common aspect ratio of the clips, and of the still images.

    Sides are those of the group's median clip, reduced to the area of 768x448 at most; nothing typical is enlarged.
    Frames are as many as nine of ten clips of the group have, 89 at most.

    Args:
        sources: the clips.
        scale_factors: pixels per latent along (time, height, width).

    Raises:
        ValueError: there is no clip.
    """
    if not sources:
        raise ValueError("--resolution-buckets auto: expected clips that can be read, found none.")
    proposals = []
    for kind in ("clips", "still images"):
        members = [source for source in sources if (source.frames == 1) == (kind == "still images")]
        for aspect, group in _by_aspect(members).items():
            bucket = _bucket(group, _ASPECTS[aspect], scale_factors)
            short = sum(source.frames < bucket.frames for source in group)
            width, height = _median_size(group)
            one = len(group) == 1
            size = f" of {width}x{height}" if one else f", half of them at least {width}x{height}"
            reason = f"{len(group)} {kind.removesuffix('s') if one else kind} near {aspect}{size}"
            if kind == "clips":
                frames = sorted({source.frames for source in group})
                reason += f" with {' to '.join(map(str, (frames[0], frames[-1])[: len(frames)]))} frames"
                reason += f", {short} of them too short" if short else ""
            proposals.append(Proposal(bucket, reason))
    # Two groups may end in one bucket.
    return list({proposal.bucket: proposal for proposal in reversed(proposals)}.values())[::-1]


def explain(proposals: Sequence[Proposal]) -> list[str]:
    """The buckets with their reasons, and the option that asks for the same again, as lines of text."""
    buckets = ";".join(str(proposal.bucket) for proposal in proposals)
    return [
        *(f"bucket {proposal.bucket!s:<14} {proposal.reason}" for proposal in proposals),
        f'to prepare more clips alike, pass: --resolution-buckets "{buckets}"',
    ]


def _by_aspect(sources: Sequence[Source]) -> dict[str, list[Source]]:
    """Clips by the nearest common aspect ratio."""
    counts = dict.fromkeys(_ASPECTS, 0)
    for source in sources:
        counts[_nearest(source, list(_ASPECTS))] += 1
    common = [aspect for aspect, count in counts.items() if count and count >= _MIN_SHARE * len(sources)]
    groups: dict[str, list[Source]] = {}
    for source in sources:
        groups.setdefault(_nearest(source, common), []).append(source)
    return groups


def _nearest(source: Source, aspects: Sequence[str]) -> str:
    # In the logarithm, as `choose_bucket` compares them.
    own = math.log(source.width / source.height)
    return min(aspects, key=lambda aspect: abs(math.log(_ASPECTS[aspect]) - own))


def _bucket(group: Sequence[Source], aspect: float, scale_factors: tuple[int, int, int]) -> Bucket:
    time, rows, columns = scale_factors
    width, height = _median_size(group)
    # The largest rectangle of the aspect ratio within the median clip.
    width_, height_ = min(width, height * aspect), min(height, width / aspect)
    scale = min(1.0, math.sqrt(_MAX_AREA / (width_ * height_)))
    # The nearest multiple: rounding down would change the aspect ratio of small buckets.
    sides = [max(round(side * scale / factor), 1) * factor for side, factor in ((width_, columns), (height_, rows))]
    frames = sorted((source.frames for source in group), reverse=True)
    enough = min(frames[max(math.ceil(_LONG_ENOUGH * len(frames)), 1) - 1], _MAX_FRAMES)
    return Bucket(sides[0], sides[1], (enough - 1) // time * time + 1)


def _median_size(group: Sequence[Source]) -> tuple[int, int]:
    widths, heights = sorted(source.width for source in group), sorted(source.height for source in group)
    return widths[(len(group) - 1) // 2], heights[(len(group) - 1) // 2]
