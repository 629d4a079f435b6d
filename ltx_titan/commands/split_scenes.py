"""`ltx-titan split-scenes`: long videos into clips of one scene each.

Clips are encoded again instead of copied: a copy can start at key frames only and includes frames of the previous
scene. The scenes found are stored next to the clips, so that an interrupted run resumes cutting without detection.
"""

import json
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from rich.console import Console

from ltx_titan.commands.files import write_image
from ltx_titan.commands.report import Report
from ltx_titan.commands.scenes import Detection, arrange, find_scenes, parse_time
from ltx_titan.common.files import json_text, locked, write_text
from ltx_titan.common.options import Flag, Group, Maybe, Positional, alias, placeholder
from ltx_titan.common.ranks import own_share
from ltx_titan.media import MediaError, iter_frames, probe_video, video_writer
from ltx_titan.media.audio import iter_audio_parts
from ltx_titan.tables.folders import VIDEO_SUFFIXES, find_media
from ltx_titan.tables.samples import relative_name, write_table

DESCRIPTION = """\
Cut long videos into clips of one scene each, with their audio: <name>-scene-001.mp4, -002, ... and a table of them,
scenes.jsonl, the input of 'ltx-titan caption'.

Try settings with --dry-run first; --stats writes the detector's value of each frame, to choose --threshold by. Training
uses the first frames of each clip: cut long scenes with --max-length.

Times are frames (123), seconds (12.5s) or HH:MM:SS[.nnn]. Existing clips are kept; unreadable videos are reported at
the end.

examples:
  ltx-titan split-scenes film.mkv clips/ --dry-run
  ltx-titan split-scenes film.mkv clips/ --filter-shorter-than 2s --max-length 5s --trim 2
  ltx-titan split-scenes raw/ clips/ --recursive --detector adaptive
  torchrun --nproc-per-node 8 -m ltx_titan.cli split-scenes raw/ clips/      # eight videos at a time
"""

_SCENES_FOLDER = ".scenes"
_TABLE = "scenes.jsonl"
_STAGE = "split"


@dataclass(frozen=True)
class SplitOptions:
    """Options of `ltx-titan split-scenes`."""

    video: Positional[Path]
    """A video, or a folder of videos."""

    output_dir: Annotated[Positional[Path], placeholder("OUT")]
    """Folder for the clips; created if it does not exist."""

    detection: Group[Detection] = field(default_factory=Detection)

    filter_shorter_than: Annotated[str, placeholder("TIME")] = "0"
    """Skip shorter scenes."""

    max_length: Annotated[Maybe[str], placeholder("TIME")] = None
    """Cut longer scenes into equal parts. Default: keep them whole."""

    trim: Annotated[int, placeholder("FRAMES")] = 0
    """Frames to remove from both ends of a scene."""

    crf: int = 16
    """H.264 quality; lower is better and larger."""

    save_images: Annotated[int, placeholder("N")] = 0
    """Write N frames of each clip to images/."""

    stats: Flag = False
    """Write <name>.stats.csv with the detector's value of each frame."""

    recursive: Annotated[Flag, alias("-r")] = False
    """Search the subfolders of VIDEO."""

    overwrite: Flag = False
    """Detect and cut again; deletes the clips of earlier runs."""

    strict: Flag = False
    """Exit with status 1 if any file failed; otherwise only if nothing could be done."""

    dry_run: Flag = False
    """List the clips that would be cut, and stop."""

    def fingerprint(self) -> dict[str, Any]:
        """The options that clips depend on."""
        names = ("filter_shorter_than", "max_length", "trim", "crf")
        return {**asdict(self.detection), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Scene:
    """One clip to be cut: its file, its first frame and the frame after its last."""

    path: Path
    first: int
    end: int


def run(options: SplitOptions) -> int:
    """Runs the command; the exit status is 1 if no clip exists at the end, or if a film failed with `--strict`."""
    report = split_scenes(options)
    report.print("split-scenes")
    if not options.dry_run:
        report.write(f"clips: {options.output_dir / _TABLE}")
    return report.status(options.strict, options.dry_run and not report.failures)


def split_scenes(options: SplitOptions, console: Console | None = None) -> Report:
    """Cuts videos into scenes; unreadable videos are reported and skipped.

    Raises:
        ValueError: there are no videos, or an option is invalid.
    """
    report = Report(console or Console())
    videos, base = _videos(options)
    if not options.dry_run:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    own = own_share(videos)
    for number, video in enumerate(own, start=1):
        label = video.name if len(own) == 1 else f"{number}/{len(own)} {video.name}"
        target = options.output_dir / video.relative_to(base).with_suffix("")
        try:
            scenes, fps = _scenes(video, target, options, label, report)
            if options.dry_run:
                _print(video, scenes, fps, report)
            else:
                _cut(video, scenes, fps, options, label, report)
        except (MediaError, OSError) as error:
            report.fail(_STAGE, str(video), error.reason if isinstance(error, MediaError) else str(error))
    if not options.dry_run:
        # By every rank when it is done: the last one finds the clips of all.
        _write_table(options.output_dir)
    return report


def _videos(options: SplitOptions) -> tuple[list[Path], Path]:
    """The videos, and the folder whose subfolders are mirrored in the output folder."""
    if options.video.is_file():
        return [options.video], options.video.parent
    videos = find_media(options.video, VIDEO_SUFFIXES, options.recursive)
    # A second run must not split the clips of the first.
    videos = [video for video in videos if not video.resolve().is_relative_to(options.output_dir.resolve())]
    if not videos:
        raise ValueError(f"{options.video}: all of its videos are in the output folder {options.output_dir}")
    names: dict[Path, Path] = {}
    for video in videos:
        if (other := names.setdefault(video.with_suffix(""), video)) != video:
            raise ValueError(f"{video}: its clips would have the same names as those of {other.name}; rename one")
    return videos, options.video


def _scenes(
    video: Path, target: Path, options: SplitOptions, label: str, report: Report
) -> tuple[list[Scene], Fraction]:
    """Scenes of a video and its frame rate: stored by an earlier run, or detected and stored now."""
    record = target.parent / _SCENES_FOLDER / f"{target.name}.json"
    status = video.stat() if video.is_file() else None
    source = {"source": str(video), "size": status and status.st_size, "mtime_ns": status and status.st_mtime_ns}
    if record.is_file():
        stored = json.loads(record.read_text(encoding="utf-8"))
        # Size and time as well as the path: a replaced video has other scenes.
        is_same_file = all(stored[key] == value for key, value in source.items())
        is_same = is_same_file and stored["options"] == options.fingerprint()
        if is_same and not options.overwrite:
            return _named(target, stored["scenes"]), Fraction(stored["fps"])
        if not options.overwrite:
            what = "was split with other options before" if is_same_file else "is not the file that was split before"
            raise MediaError(video, f"{what} (see {record}); use another folder, or --overwrite")
        if not options.dry_run:
            record.unlink()
            for scene in _named(target, stored["scenes"]):
                scene.path.unlink(missing_ok=True)
    info = probe_video(video)
    stats_path = target.with_name(f"{target.name}.stats.csv") if options.stats and not options.dry_run else None
    if stats_path is not None:
        stats_path.parent.mkdir(parents=True, exist_ok=True)
    with report.progress(f"{label}: detecting", info.frames) as bar:
        found, frames = find_scenes(video, options.detection, bar.advance, stats_path)
    shortest = parse_time(options.filter_shorter_than, info.fps, "--filter-shorter-than")
    longest = None if options.max_length is None else parse_time(options.max_length, info.fps, "--max-length")
    parts, skipped = arrange(found, shortest, longest, options.trim)
    if skipped:
        report.notes["short scenes skipped"] += skipped
    if not options.dry_run:
        content = {**source, "options": options.fingerprint(), "fps": str(info.fps), "frames": frames, "scenes": parts}
        # Before cutting, so that an interrupted run does not detect again.
        write_text(record, json_text(content, indent=1) + "\n")
    return _named(target, parts), info.fps


def _named(target: Path, parts: list[tuple[int, int]]) -> list[Scene]:
    # So that names sort in order of time.
    digits = max(3, len(str(len(parts))))
    return [
        Scene(target.with_name(f"{target.name}-scene-{number:0{digits}d}.mp4"), first, end)
        for number, (first, end) in enumerate(parts, start=1)
    ]


def _cut(video: Path, scenes: list[Scene], fps: Fraction, options: SplitOptions, label: str, report: Report) -> None:
    """Cuts the clips that do not exist yet, in one pass over the video."""
    todo = []
    for scene in scenes:
        if scene.path.is_file():
            report.add(_STAGE, "skipped")
        else:
            todo.append(scene)
    if not todo:
        return
    spans = [(float(scene.first / fps), float((scene.end - scene.first) / fps)) for scene in todo]
    # Read along with the frames: the audio of a two-hour film as one tensor takes gigabytes.
    audio_parts = iter_audio_parts(video, spans)
    info = probe_video(video)
    # H.264 in yuv420p needs even sizes.
    width, height = info.width // 2 * 2, info.height // 2 * 2
    frames = enumerate(iter_frames(video))
    position = 0
    with report.progress(f"{label}: cutting", sum(scene.end - scene.first for scene in todo)) as bar:
        for scene in todo:
            part = next(audio_parts)
            if part is None:
                report.notes["clips without audio"] += 1
            waveform, sample_rate = (None, None) if part is None else (part.waveform, part.sample_rate)
            images = _images(scene, options.save_images)
            with video_writer(scene.path, width, height, fps, waveform, sample_rate, options.crf) as write:
                # One decoder for all clips, which therefore must be in order of time.
                for index, frame in islice(frames, scene.first - position, scene.end - position):
                    frame = np.ascontiguousarray(frame[:height, :width])
                    write(frame)
                    if index in images:
                        write_image(images[index], frame)
                    bar.advance()
            position = scene.end
            report.add(_STAGE, "done")


def _images(scene: Scene, count: int) -> dict[int, Path]:
    """Frame index -> file of the images of a scene: the middle frames of `count` equal parts."""
    length = scene.end - scene.first
    indices = {scene.first + length * (2 * part + 1) // (2 * count): part + 1 for part in range(count)}
    folder = scene.path.parent / "images"
    return {frame: folder / f"{scene.path.stem}-{number}.png" for frame, number in indices.items()}


def _print(video: Path, scenes: list[Scene], fps: Fraction, report: Report) -> None:
    for scene in scenes:
        report.write(
            f"{video.name}: {float(scene.first / fps):9.3f} s to {float(scene.end / fps):9.3f} s, "
            f"{scene.end - scene.first:5d} frames -> {scene.path.name}"
        )
    report.notes["clips that would be cut"] += len(scenes)


def _write_table(folder: Path) -> None:
    """Writes `scenes.jsonl` with all clips in the folder, from the stored scenes of every video and every process."""
    with locked(folder / _TABLE):
        rows = []
        # From the records on disk and not from this run: the table also has the clips of earlier runs.
        for record in sorted(folder.rglob(f"{_SCENES_FOLDER}/*.json")):
            stored = json.loads(record.read_text(encoding="utf-8"))
            fps = Fraction(stored["fps"])
            for scene in _named(record.parent.parent / record.stem, stored["scenes"]):
                if scene.path.is_file():
                    rows.append(
                        {
                            "video": relative_name(scene.path, folder),
                            "source": stored["source"],
                            "start_s": round(float(scene.first / fps), 3),
                            "duration_s": round(float((scene.end - scene.first) / fps), 3),
                            "frames": scene.end - scene.first,
                            "fps": round(float(fps), 3),
                        }
                    )
        write_table(folder / _TABLE, rows)
