"""A small captioned dataset from the clip in this package: eight short windows with audio.

First jobs can train on it, on any machine, before other clips are prepared.
"""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from ltx_titan.common.files import write_text
from ltx_titan.common.options import Positional
from ltx_titan.media import cut_windows

DESCRIPTION = """\
Write a small dataset to test a job with: eight captioned windows of one second, with audio, from the five seconds of
"Big Buck Bunny" (Blender Foundation, CC BY 3.0) in this package.

example:
  ltx-titan make-debug-dataset clips/
  ltx-titan process-dataset clips/dataset.jsonl --resolution-buckets "256x160x25" --model-path ...
"""

CLIP_NAME = "big_buck_bunny_5s.mp4"
# One second at the clip's rate, and 1 + a multiple of 8 frames, as the codec needs.
_FRAMES, _WIDTH, _HEIGHT = 25, 384, 216

_SETTING = (
    "Animated film. A grassy hillside in warm morning light with a burrow under tree roots, gray boulders beside it "
    "and a stone ruin under a violet sky behind."
)
# Action in the clip from 0 s to 5 s, one line per window.
_ACTIONS = (
    "A big gray rabbit looks out of its burrow, drowsy, one paw on the ground.",
    "A big gray rabbit crawls out of its burrow and props itself on a boulder, blinking.",
    "A big gray rabbit leaves its burrow and straightens up, smiling with half-closed eyes.",
    "A big gray rabbit rises in front of its burrow and spreads its arms for balance.",
    "A big gray rabbit stands tall and begins to stretch, fists lifted to the sides.",
    "A big gray rabbit stretches with its head thrown back and yawns with a wide open mouth.",
    "A big gray rabbit finishes a long yawn, its arms still raised above its shoulders.",
    "A big gray rabbit lowers its arms after a yawn and scratches the back of its head, content.",
)


@dataclass(frozen=True)
class DebugDatasetOptions:
    """Options of `ltx-titan make-debug-dataset`."""

    out: Positional[Path]
    """Folder to write to; created if it does not exist."""


def run(options: DebugDatasetOptions) -> int:
    """Runs the command and prints the path of the table."""
    print(make_debug_dataset(options.out))
    return 0


def make_debug_dataset(folder: str | Path) -> Path:
    """Writes eight windows of 25 frames (384x216, 25 fps, with audio) and `dataset.jsonl`; returns the latter's path.

    The license of the clip requires attribution, which is written to the folder as well.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    assets = resources.files("ltx_titan") / "assets"
    # `as_file`: the package may be installed as a zip.
    with resources.as_file(assets / CLIP_NAME) as clip:
        paths = cut_windows(clip, folder, _FRAMES, len(_ACTIONS), _WIDTH, _HEIGHT)
    rows = [
        {"video": path.name, "caption": f"{_SETTING} {action}"} for path, action in zip(paths, _ACTIONS, strict=True)
    ]
    write_text(folder / "README.md", (assets / "README.md").read_text(encoding="utf-8"))
    table = folder / "dataset.jsonl"
    write_text(table, "".join(json.dumps(row) + "\n" for row in rows))
    return table
