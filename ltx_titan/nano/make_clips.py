"""`ltx-titan make-clips`: the procedural clips of `nano.clips` as files with captions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltx_titan.common.files import write_text
from ltx_titan.common.options import Flag, Positional
from ltx_titan.media import to_uint8, write_video
from ltx_titan.nano.clips import (
    ALL_SHAPES,
    CONCEPT_SHAPE,
    FPS,
    Clips,
    Combination,
    combinations,
    draw_clips,
    render_audio,
    render_video,
)

DESCRIPTION = """\
Write procedural clips with audio and captions: a colored shape moves over a plain background, and a tone follows it in
pitch and stereo balance. 64x64 pixels, 25 frames, one second; the same files for the same options.

Twelve of the 96 combinations of shape, color and motion are held out (a red circle never moves left, for example), to
test whether a model that knows the parts can combine them.

examples:
  ltx-titan make-clips clips/ --count 200
  ltx-titan make-clips unseen/ --count 72 --held-out only
  ltx-titan make-clips concept/ --count 24 --concept --known 24
"""

# AAC at 16 kHz loses much of the treble; the encoders resample.
_FILE_SAMPLE_RATE = 48000


@dataclass(frozen=True)
class ClipOptions:
    """Options of `ltx-titan make-clips`."""

    out: Positional[Path]
    """Folder to write to; created if it does not exist."""

    count: int = 100
    """Number of clips."""

    seed: int = 0
    """Seed of positions, timing and shades."""

    held_out: Literal["exclude", "only", "include"] = "exclude"
    """Combinations of shape, color and motion that training clips do not have."""

    concept: Flag = False
    """Clips of a ring, called zorb in the captions: a shape and a word that the trained miniature has never seen."""

    known: int = 0
    """With --concept: further clips, of shapes that it knows, lest it forgets them."""


def run(options: ClipOptions) -> int:
    """Runs the command and prints the path of the table."""
    print(make_clips(options))
    return 0


def make_clips(options: ClipOptions) -> Path:
    """Writes the clips and `dataset.jsonl` with a caption and the attributes of each; returns the latter's path.

    Raises:
        ValueError: no clip is asked for, held-out combinations of the concept, which has none, or known shapes without
            the concept.
    """
    if options.count < 1:
        raise ValueError(f"--count {options.count}: expected at least one clip.")
    clips = draw_clips(options.count, options.seed, _combinations(options))
    if options.known:
        if not options.concept:
            raise ValueError("--known: expected --concept, found clips of known shapes only; use a larger --count.")
        clips = Clips.join([clips, draw_clips(options.known, options.seed + 1, combinations(held_out=False))])
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, (combination, caption) in enumerate(zip(clips.combinations, clips.captions, strict=True)):
        # One clip at a time: any count takes the memory of one.
        one = clips[index : index + 1]
        path = options.out / f"clip_{index:05d}.mp4"
        # The track of a clip ends with its last frame.
        write_video(
            path, to_uint8(render_video(one)[0]), FPS, render_audio(one, _FILE_SAMPLE_RATE)[0], _FILE_SAMPLE_RATE
        )
        rows.append({"video": path.name, "caption": caption, **combination._asdict()})
    table = options.out / "dataset.jsonl"
    write_text(table, "".join(json.dumps(row) + "\n" for row in rows))
    return table


def _combinations(options: ClipOptions) -> list[Combination]:
    if options.concept:
        if options.held_out == "only":
            raise ValueError("--held-out only: the concept has no held-out combinations; omit it, or --concept.")
        return combinations(held_out=False, shapes=[ALL_SHAPES.index(CONCEPT_SHAPE)])
    chosen = {"exclude": (False,), "only": (True,), "include": (False, True)}[options.held_out]
    return [combination for held_out in chosen for combination in combinations(held_out=held_out)]
