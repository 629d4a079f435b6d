"""A small captioned data set from the clip that comes with the package: eight short windows with audio.

It is what a first job trains on, on any machine, before there are clips of one's own.
"""

import argparse
import json
import os
from importlib import resources
from pathlib import Path

from ltx_titan.media import cut_windows

CLIP_NAME = "big_buck_bunny_5s.mp4"
_FRAMES, _WIDTH, _HEIGHT = 25, 384, 216

_SETTING = (
    "Animated film. A grassy hillside in warm morning light with a burrow under tree roots, grey boulders beside it "
    "and a stone ruin under a violet sky behind."
)
# What the clip shows from 0 s to 5 s; one caption per window.
_ACTIONS = (
    "A big grey rabbit looks out of its burrow, drowsy, one paw on the ground.",
    "A big grey rabbit crawls out of its burrow and props itself on a boulder, blinking.",
    "A big grey rabbit leaves its burrow and straightens up, smiling with half-closed eyes.",
    "A big grey rabbit rises in front of its burrow and spreads its arms for balance.",
    "A big grey rabbit stands tall and begins to stretch, fists lifted to the sides.",
    "A big grey rabbit stretches with its head thrown back and yawns with a wide open mouth.",
    "A big grey rabbit finishes a long yawn, its arms still raised above its shoulders.",
    "A big grey rabbit lowers its arms after a yawn and scratches the back of its head, content.",
)


def make_debug_dataset(folder: str | Path) -> Path:
    """Write eight windows of 25 frames (384x216, 25 fps, with audio) and `dataset.jsonl`; returns the latter's path.

    The clip's licence asks for its attribution, which goes into the folder as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assets = resources.files("ltx_titan") / "assets"
    with resources.as_file(assets / CLIP_NAME) as clip:
        paths = cut_windows(clip, folder, _FRAMES, len(_ACTIONS), _WIDTH, _HEIGHT)
    rows = [
        {"video": path.name, "caption": f"{_SETTING} {action}"} for path, action in zip(paths, _ACTIONS, strict=True)
    ]
    (folder / "README.md").write_text((assets / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    metadata = folder / "dataset.jsonl"
    temporary = metadata.with_name(f"{metadata.name}.tmp.{os.getpid()}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.rename(metadata)
    return metadata


DESCRIPTION = """\
Write a small data set to try a job on: eight captioned windows of one second, with audio, cut from the five seconds of
"Big Buck Bunny" (Blender Foundation, CC BY 3.0) that come with this package.

example:
  ltx-titan make-debug-dataset clips/
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "256x160x25" --model-path ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan make-debug-dataset`."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to; made if it does not exist")


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan make-debug-dataset`; returns the exit status."""
    print(make_debug_dataset(arguments.out))
    return 0
