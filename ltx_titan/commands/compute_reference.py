"""`ltx-titan compute-reference`: reference videos for in-context training, made from the clips themselves."""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from ltx_titan.commands.files import (
    REFERENCE_KINDS,
    VIDEO_SUFFIXES,
    Row,
    find_media,
    is_table,
    media_of_row,
    moved_row,
    read_table,
    relative_name,
    write_image,
    write_table,
)
from ltx_titan.commands.filters import Filter, blur, depth, edges, grey
from ltx_titan.commands.report import Report
from ltx_titan.common.files import locked
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.media import MediaError, is_image, iter_frames, probe_video, read_image, video_writer

_COLUMN = "reference_video"
_OLD_COLUMN = "reference_path"


@dataclass(frozen=True)
class ReferenceOptions:
    """What `compute_references` is told; the command line has the same names.

    Attributes:
        dataset: table of clips, or a folder of them.
        output: table to write; None: the given one, or `dataset.jsonl` in the folder.
        kind: what references show: edges, grey, blur or depth.
        canny: the two thresholds of edges.
        blur_strength: standard deviation of the blur, as a part of the frame's shorter side.
        depth_model: folder of a depth estimation model.
        batch_size: frames that the depth model takes at once.
        device: where the depth model runs.
        overwrite: make again what is there.
        dry_run: only say what would be done.
    """

    dataset: Path
    output: Path | None = None
    kind: str = "edges"
    canny: tuple[float, float] = (100, 200)
    blur_strength: float = 0.01
    depth_model: Path | None = None
    batch_size: int = 8
    device: str = "cpu"
    overwrite: bool = False
    dry_run: bool = False

    @property
    def table(self) -> Path:
        """The table that is written."""
        return self.output or (self.dataset if is_table(self.dataset) else self.dataset / "dataset.jsonl")


def compute_references(options: ReferenceOptions, console: Console | None = None) -> Report:
    """Write a reference beside each clip and its name into the table; bad clips are named and left without one.

    Raises:
        ValueError: there are no clips, or the options do not go together.
    """
    if options.kind == "depth" and options.depth_model is None:
        raise ValueError("--kind depth needs --depth-model: a local folder of a depth estimation model")
    report = Report(console or Console())
    base, rows = _rows(options)
    clips = [media_of_row(row, base / "table") for row in rows]
    for number, clip in enumerate(clips, start=1):
        if clip is None:
            report.fail(options.kind, f"row {number}", "names no video")
    todo = []
    for clip in own_share(list(dict.fromkeys(clip for clip in clips if clip is not None))):
        if not options.overwrite and reference_path(clip, options.kind).is_file():
            report.add(options.kind, "skipped")
        else:
            todo.append(clip)
    if options.dry_run:
        for clip in todo:
            report.console.print(
                f"{clip} -> {reference_path(clip, options.kind).name}", markup=False, highlight=False, soft_wrap=True
            )
        report.notes["would be made"] = len(todo)
        return report
    _make(todo, options, report)
    # Under the lock, and from what is on disk: several processes end here, the last one sees everything.
    with locked(options.table):
        folder = options.table.parent
        written = [moved_row(row, base, folder) for row in rows]
        for row, clip in zip(written, clips, strict=True):
            row.pop(_OLD_COLUMN, None)
            if clip is not None and reference_path(clip, options.kind).is_file():
                row[_COLUMN] = relative_name(reference_path(clip, options.kind), folder)
        write_table(options.table, written)
    return report


def reference_path(clip: Path, kind: str) -> Path:
    """Where a clip's reference lies: beside it, as `<name>_<kind>.mp4` (`.png` for a still image)."""
    return clip.with_name(f"{clip.stem}_{kind}{'.png' if is_image(clip) else '.mp4'}")


def _rows(options: ReferenceOptions) -> tuple[Path, list[Row]]:
    """Folder that the rows' paths start from, and the rows."""
    if is_table(options.dataset):
        return options.dataset.parent, read_table(options.dataset)
    found = find_media(options.dataset, VIDEO_SUFFIXES)
    if options.table.is_file():
        raise ValueError(f"{options.table} is there already and would lose its columns; give the table, or --output")
    return options.dataset, [{"video": relative_name(path, options.dataset)} for path in found]


def _make(clips: list[Path], options: ReferenceOptions, report: Report) -> None:
    if not clips:
        return
    apply = _filter(options)
    with report.progress(options.kind, len(clips)) as bar:
        for clip in clips:
            try:
                write_reference(clip, reference_path(clip, options.kind), apply)
            except (MediaError, OSError) as error:
                report.fail(options.kind, str(clip), error.reason if isinstance(error, MediaError) else str(error))
            else:
                report.add(options.kind, "done")
            bar.advance()


def _filter(options: ReferenceOptions) -> Filter:
    if options.kind == "edges":
        return edges(*options.canny)
    if options.kind == "grey":
        return grey()
    if options.kind == "blur":
        return blur(options.blur_strength)
    assert options.depth_model is not None
    return depth(options.depth_model, own_device(options.device), options.batch_size)


def write_reference(clip: Path, target: Path, apply: Filter) -> None:
    """Write what a filter makes of a clip or a still image: as many frames, at the same rate, without audio.

    Raises:
        MediaError: the clip cannot be read to its end.
    """
    if is_image(clip):
        write_image(target, next(apply(read_image(clip).numpy())))
        return
    info = probe_video(clip)
    # H.264 wants even sizes; a row or column less is nothing to the scaling that follows in preparation.
    width, height = info.width // 2 * 2, info.height // 2 * 2
    with video_writer(target, width, height, Fraction(info.fps)) as write:
        for frame in apply(_even(iter_frames(clip), width, height)):
            write(frame)


def _even(frames: Iterable[np.ndarray], width: int, height: int) -> Iterator[np.ndarray]:
    for frame in frames:
        yield np.ascontiguousarray(frame[:height, :width])


DESCRIPTION = """\
Make reference videos for in-context training (video to video): for each clip, a video of the same length that shows

  edges   Canny edges, white on black
  grey    without colour, to learn colouring
  blur    blurred, to learn sharpening
  depth   depth by a model of your own (--depth-model), near is white

The reference lies beside its clip as <name>_<kind>.mp4, and the column reference_video of the table names it, which
process-dataset takes from there. The table keeps its other columns. What is there is kept; clips that cannot be read
are named at the end and stay without a reference.

examples:
  ltx-titan compute-reference clips/dataset.jsonl
  ltx-titan compute-reference clips/dataset.csv --kind blur --blur-strength 0.02 --output clips/deblur.csv
  torchrun --nproc-per-node 8 -m ltx_titan.cli compute-reference clips/dataset.jsonl --kind depth \\
      --depth-model Depth-Anything-V2-Large-hf
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan compute-reference`."""
    parser.add_argument(
        "dataset", type=Path, metavar="DATASET", help="table of clips (.csv, .json, .jsonl) or a folder"
    )
    parser.add_argument("--output", "-o", type=Path, help="table to write (default: the given one, in place)")
    parser.add_argument(
        "--kind", choices=REFERENCE_KINDS, default="edges", help="what references show (default: edges)"
    )
    parser.add_argument(
        "--canny", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(100, 200), help="thresholds of edges"
    )
    parser.add_argument(
        "--blur-strength",
        type=float,
        default=0.01,
        help="standard deviation of the blur, as a part of the frame's shorter side (default: 0.01, 7 px in 720p)",
    )
    parser.add_argument("--depth-model", type=Path, metavar="FOLDER", help="depth estimation model of transformers")
    parser.add_argument("--batch-size", type=int, default=8, help="frames that the depth model takes at once")
    parser.add_argument("--overwrite", action="store_true", help="make again what is there already")
    parser.add_argument("--dry-run", action="store_true", help="list what would be made, and stop")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the depth model runs (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan compute-reference`; the exit status is 1 only where nothing at all could be made."""
    options = ReferenceOptions(**{name: getattr(arguments, name) for name in ReferenceOptions.__dataclass_fields__})
    report = compute_references(options)
    report.print("compute-reference")
    if not options.dry_run:
        report.console.print(f"table: {options.table}", highlight=False, soft_wrap=True)
    return 0 if options.dry_run or report.succeeded() else 1
