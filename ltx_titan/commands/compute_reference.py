"""`ltx-titan compute-reference`: reference videos for in-context training, computed from the clips themselves."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.console import Console

from ltx_titan.commands.files import write_image
from ltx_titan.commands.filters import Filter, blur, depth, edges, gray
from ltx_titan.commands.report import Report
from ltx_titan.common.files import locked
from ltx_titan.common.options import Flag, Maybe, Positional, alias, default_device, placeholder
from ltx_titan.common.ranks import own_device, own_share
from ltx_titan.data.fingerprints import FileVersion, Fingerprint, FingerprintFile, digest_of, is_changed, version_of
from ltx_titan.media import MediaError, is_image, iter_frames, probe_video, read_image, video_writer
from ltx_titan.tables.folders import REFERENCE_SUFFIXES, VIDEO_SUFFIXES, captions_beside, find_media
from ltx_titan.tables.samples import Row, is_table, media_of_row, moved_row, read_table, relative_name, write_table

DESCRIPTION = """\
Compute reference videos for in-context training (video to video). Each clip gets a video of the same length with

  edges   Canny edges, white on black
  gray    luminance, to train colorization
  blur    a Gaussian blur, to train deblurring
  depth   the output of a depth estimation model (--depth-model), near is white

A reference is written next to its clip as <name>_<kind>.mp4 (gray: <name>_grey.mp4), and its name into the column
reference_video of the table, which process-dataset reads. Other columns are kept. Existing references are kept unless
their clip changed since; unreadable clips are reported at the end and get no reference.

examples:
  ltx-titan compute-reference clips/dataset.jsonl
  ltx-titan compute-reference clips/dataset.csv --kind blur --blur-strength 0.02 --output clips/deblur.csv
  torchrun --nproc-per-node 8 -m ltx_titan.cli compute-reference clips/dataset.jsonl --kind depth \\
      --depth-model Depth-Anything-V2-Large-hf
"""

_COLUMN = "reference_video"
# Written by other trainers; would contradict the new column.
_OLD_COLUMN = "reference_path"


@dataclass(frozen=True)
class ReferenceOptions:
    """Options of `ltx-titan compute-reference`."""

    dataset: Positional[Path]
    """Table of clips (.csv, .json, .jsonl), or a folder of clips."""

    output: Annotated[Maybe[Path], alias("-o")] = None
    """Table to write. Default: the dataset itself, or dataset.jsonl in its folder."""

    kind: Literal["edges", "gray", "grey", "blur", "depth"] = "edges"
    """Content of the references. `grey` is an older name of `gray`."""

    canny: Annotated[tuple[float, float], placeholder("LOW HIGH")] = (100, 200)
    """Gradient thresholds of the Canny edge detector."""

    blur_strength: float = 0.01
    """Standard deviation of the blur as a fraction of the frame's shorter side; 0.01 is 7 px in 720p."""

    depth_model: Annotated[Maybe[Path], placeholder("FOLDER")] = None
    """Local folder of a depth estimation model for transformers. Needed for --kind depth."""

    batch_size: int = 8
    """Frames per forward pass of the depth model."""

    overwrite: Flag = False
    """Compute references again that exist already."""

    dry_run: Flag = False
    """List what would be computed, and stop."""

    strict: Flag = False
    """Exit with status 1 if any file failed; otherwise only if nothing could be done."""

    device: str = field(default_factory=default_device)
    """Device of the depth model."""

    @property
    def table(self) -> Path:
        """The table that is written."""
        return self.output or (self.dataset if is_table(self.dataset) else self.dataset / "dataset.jsonl")


def run(options: ReferenceOptions) -> int:
    """Runs the command; the exit status is 1 if no reference exists at the end, or if one failed with `--strict`."""
    report = compute_references(options)
    report.print("compute-reference")
    if not options.dry_run:
        report.write(f"table: {options.table}")
    return report.status(options.strict, options.dry_run)


def compute_references(options: ReferenceOptions, console: Console | None = None) -> Report:
    """Writes a reference next to each clip and its name into the table; unreadable clips are reported and skipped.

    Raises:
        ValueError: there are no clips, or the options contradict each other.
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
    # Rows may share a clip, which is filtered once.
    records = References(options)
    for clip in own_share(list(dict.fromkeys(clip for clip in clips if clip is not None))):
        # A file is complete if it exists, since it is written under another name and renamed.
        if options.overwrite or not reference_path(clip, options.kind).is_file():
            todo.append(clip)
        elif records.is_current(clip):
            report.add(options.kind, "skipped")
        else:
            report.note(["clip changed since, computed again"], clip.name)
            todo.append(clip)
    if not options.dry_run:
        records.save()
    if options.dry_run:
        for clip in todo:
            report.write(f"{clip} -> {reference_path(clip, options.kind).name}")
        report.notes["would be computed"] = len(todo)
        return report
    _compute(todo, options, records, report)
    # Every rank writes the table from the references that exist by then, under a lock: the last one sees all of them.
    with locked(options.table):
        folder = options.table.parent
        written = [moved_row(row, base, folder) for row in rows]
        for row, clip in zip(written, clips, strict=True):
            row.pop(_OLD_COLUMN, None)
            if clip is not None and reference_path(clip, options.kind).is_file():
                row[_COLUMN] = relative_name(reference_path(clip, options.kind), folder)
        write_table(options.table, written)
    return report


class References:
    """Inputs of the references next to clips, recorded in `.references.jsonl` next to the table."""

    def __init__(self, options: ReferenceOptions) -> None:
        """Reads the records of a table's folder."""
        self._kind, self._table = options.kind, options.table
        self._file = FingerprintFile(options.table.parent, name=".references")
        settings: dict[str, Any] = {"kind": "gray" if options.kind == "grey" else options.kind}
        if options.kind == "edges":
            settings["canny"] = [float(value) for value in options.canny]
        elif options.kind == "blur":
            settings["blur_strength"] = options.blur_strength
        elif options.depth_model is not None:
            settings["depth_model"] = options.depth_model.name
        self._options = self._file.intern(settings)
        self._new: dict[str, Fingerprint] = {}

    def is_current(self, clip: Path) -> bool:
        """Whether an existing reference is of the clip as it is now; one without a record is taken for it.

        Raises:
            ValueError: it was computed with other options.
        """
        key, now = self._key(clip), self._version(clip)
        entry = self._file.entries.get(key)
        if now is None:
            return True
        if entry is None:
            # Of an earlier version or another program; a clip of before this one is compared from now on.
            self._new[key] = Fingerprint({"video": now}, None, self._options, "")
            return True
        if entry.state == "pending" or is_changed(entry.files["video"], now, clip):
            return False
        before, wanted = self._file.values.get(entry.options, {}), self._file.values[self._options]
        for name in wanted:
            if name in before and before[name] != wanted[name]:
                raise ValueError(
                    f"{reference_path(clip, self._kind)}: was computed with {name} = {before[name]}, now it is "
                    f"{wanted[name]}; --overwrite computes all references again"
                )
        if entry.files["video"][:3] != now[:3]:
            self._new[key] = replace(entry, files={"video": now._replace(digest=entry.files["video"].digest)})
        return True

    def save(self) -> None:
        """Records what `is_current` found."""
        # Ranks share the file, and have no process group to wait for each other.
        with locked(self._table):
            self._file.set(self._new)

    @contextmanager
    def recorded(self, clip: Path) -> Iterator[None]:
        """Records the reference that the block writes: as pending before it, as done after it."""
        version = self._version(clip)
        # Before it is read: a clip that is replaced meanwhile is compared again in the next run.
        files = {"video": version._replace(digest=digest_of(clip))} if version else {}
        entry = Fingerprint(files, None, self._options, "")
        with locked(self._table):
            self._file.set({self._key(clip): replace(entry, state="pending")})
        yield
        with locked(self._table):
            self._file.set({self._key(clip): entry})

    def _key(self, clip: Path) -> str:
        return relative_name(reference_path(clip, self._kind), self._table.parent)

    def _version(self, clip: Path) -> FileVersion | None:
        return version_of(clip, relative_name(clip, self._table.parent))


def reference_path(clip: Path, kind: str) -> Path:
    """Path of a clip's reference: `<name>_<kind>.mp4` next to it, `.png` for a still image."""
    return clip.with_name(f"{clip.stem}{REFERENCE_SUFFIXES[kind]}{'.png' if is_image(clip) else '.mp4'}")


def write_reference(clip: Path, target: Path, apply: Filter) -> None:
    """Filters a clip or a still image; the reference has as many frames at the same rate, and no audio.

    Raises:
        MediaError: the clip cannot be read to its end.
    """
    if is_image(clip):
        # A still image is a clip of one frame to a filter.
        write_image(target, next(apply(read_image(clip).numpy())))
        return
    info = probe_video(clip)
    # H.264 needs even sizes; preparation rescales, so a missing row or column of pixels is lost in that.
    width, height = info.width // 2 * 2, info.height // 2 * 2
    with video_writer(target, width, height, Fraction(info.fps)) as write:
        for frame in apply(_cropped(iter_frames(clip), width, height)):
            write(frame)


def _rows(options: ReferenceOptions) -> tuple[Path, list[Row]]:
    """Folder that paths in the rows are relative to, and the rows."""
    if is_table(options.dataset):
        return options.dataset.parent, read_table(options.dataset)
    found = find_media(options.dataset, VIDEO_SUFFIXES)
    if options.table.is_file():
        # A folder has no captions; the table next to it may have, and would be overwritten by bare rows.
        raise ValueError(f"{options.table}: exists, and its columns would be lost; pass the table, or --output")
    captions, _ = captions_beside(options.dataset, found)
    named = [(path, {"video": relative_name(path, options.dataset)}) for path in found]
    return options.dataset, [row | ({"caption": captions[path]} if path in captions else {}) for path, row in named]


def _compute(clips: list[Path], options: ReferenceOptions, records: References, report: Report) -> None:
    if not clips:
        return
    # Once for all clips: the depth model takes longer to load than a clip to filter.
    apply = _filter(options)
    with report.progress(options.kind, len(clips)) as bar:
        for clip in clips:
            try:
                with records.recorded(clip):
                    write_reference(clip, reference_path(clip, options.kind), apply)
            except (MediaError, OSError) as error:
                report.fail(options.kind, str(clip), error.reason if isinstance(error, MediaError) else str(error))
            else:
                report.add(options.kind, "done")
            bar.advance()


def _filter(options: ReferenceOptions) -> Filter:
    if options.kind == "edges":
        return edges(*options.canny)
    if options.kind in ("gray", "grey"):
        return gray()
    if options.kind == "blur":
        return blur(options.blur_strength)
    assert options.depth_model is not None
    return depth(options.depth_model, own_device(options.device), options.batch_size)


def _cropped(frames: Iterable[np.ndarray], width: int, height: int) -> Iterator[np.ndarray]:
    for frame in frames:
        yield np.ascontiguousarray(frame[:height, :width])
