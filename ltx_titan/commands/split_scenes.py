"""`ltx-titan split-scenes`: long videos into clips of one scene each.

Clips are encoded anew rather than copied: a copy can begin at key frames only, and brings frames of the scene before.
What was found is noted beside the clips, so that a run that was stopped goes on cutting without looking again.
"""

import argparse
import json
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ltx_titan.commands.files import VIDEO_SUFFIXES, find_media, relative_name, write_image, write_table
from ltx_titan.commands.report import Report
from ltx_titan.commands.scenes import DETECTORS, Detection, arrange, find_scenes, parse_time
from ltx_titan.common.files import locked, write_text
from ltx_titan.common.ranks import own_share
from ltx_titan.media import MediaError, iter_frames, probe_video, video_writer
from ltx_titan.media.audio_parts import iter_audio_parts

_NOTES = ".scenes"
_TABLE = "scenes.jsonl"
_STAGE = "split"


@dataclass(frozen=True)
class SplitOptions:
    """What `split_scenes` is told; the command line has the same names.

    Attributes:
        video: a video, or a folder of them.
        output_dir: where clips go.
        detection: how scenes are found.
        filter_shorter_than: scenes below are left out, as a time.
        max_length: longer scenes are cut into equal parts, as a time; None: they stay whole.
        trim: frames taken off both ends of each scene.
        crf: quality of H.264.
        save_images: pictures to write of each clip.
        stats: whether to write what the detector measured for each frame.
        recursive: look into subfolders.
        overwrite: look and cut again; clips of an earlier run are deleted first.
        dry_run: only say what would be cut.
    """

    video: Path
    output_dir: Path
    detection: Detection = field(default_factory=Detection)
    filter_shorter_than: str = "0"
    max_length: str | None = None
    trim: int = 0
    crf: int = 16
    save_images: int = 0
    stats: bool = False
    recursive: bool = False
    overwrite: bool = False
    dry_run: bool = False

    def fingerprint(self) -> dict[str, Any]:
        """What decides where the cuts are and what a clip holds."""
        names = ("filter_shorter_than", "max_length", "trim", "crf")
        return {**asdict(self.detection), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Scene:
    """One clip to be cut: its file, its first frame and the frame after its last."""

    path: Path
    first: int
    end: int


def split_scenes(options: SplitOptions, console: Console | None = None) -> Report:
    """Cut videos into scenes; videos that cannot be read are named in the report and left out.

    Raises:
        ValueError: there are no videos, or an option is of no use.
    """
    report = Report(console or Console())
    videos, base = _videos(options)
    if not options.dry_run:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    for place, video in enumerate(own := own_share(videos), start=1):
        label = video.name if len(own) == 1 else f"{place}/{len(own)} {video.name}"
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
        _write_table(options.output_dir)
    return report


def _videos(options: SplitOptions) -> tuple[list[Path], Path]:
    """The videos, and the folder whose structure the clips' folder repeats."""
    if options.video.is_file():
        return [options.video], options.video.parent
    videos = find_media(options.video, VIDEO_SUFFIXES, options.recursive)
    # A second run must not split what the first one has cut.
    videos = [video for video in videos if not video.resolve().is_relative_to(options.output_dir.resolve())]
    if not videos:
        raise ValueError(f"{options.video}: all of its videos lie in the output folder {options.output_dir}")
    names: dict[Path, Path] = {}
    for video in videos:
        if (other := names.setdefault(video.with_suffix(""), video)) != video:
            raise ValueError(f"{video}: its clips would have the names of those of {other.name}; rename one")
    return videos, options.video


def _scenes(
    video: Path, target: Path, options: SplitOptions, label: str, report: Report
) -> tuple[list[Scene], Fraction]:
    """Scenes of a video: as noted by an earlier run, or found now and noted."""
    note = target.parent / _NOTES / f"{target.name}.json"
    status = video.stat() if video.is_file() else None
    source = {"source": str(video), "size": status and status.st_size, "mtime_ns": status and status.st_mtime_ns}
    if note.is_file():
        noted = json.loads(note.read_text(encoding="utf-8"))
        same = all(noted[key] == value for key, value in {**source, "options": options.fingerprint()}.items())
        if same and not options.overwrite:
            return _named(target, noted["scenes"]), Fraction(noted["fps"])
        if not options.overwrite:
            raise MediaError(
                video, f"was split differently before (see {note}); give another folder, or --overwrite to do it again"
            )
        if not options.dry_run:
            note.unlink()
            for scene in _named(target, noted["scenes"]):
                scene.path.unlink(missing_ok=True)
    info = probe_video(video)
    stats_path = target.with_name(f"{target.name}.stats.csv") if options.stats and not options.dry_run else None
    if stats_path is not None:
        stats_path.parent.mkdir(parents=True, exist_ok=True)
    with report.progress(f"{label}: looking", info.frames) as bar:
        found, frames = find_scenes(video, options.detection, bar.advance, stats_path)
    shortest = parse_time(options.filter_shorter_than, info.fps, "--filter-shorter-than")
    longest = None if options.max_length is None else parse_time(options.max_length, info.fps, "--max-length")
    parts, left_out = arrange(found, shortest, longest, options.trim)
    if left_out:
        report.notes["scenes left out because they are short"] += left_out
    if not options.dry_run:
        content = {**source, "options": options.fingerprint(), "fps": str(info.fps), "frames": frames, "scenes": parts}
        write_text(note, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return _named(target, parts), info.fps


def _named(target: Path, parts: list[tuple[int, int]]) -> list[Scene]:
    digits = max(3, len(str(len(parts))))
    return [
        Scene(target.with_name(f"{target.name}-scene-{number:0{digits}d}.mp4"), first, end)
        for number, (first, end) in enumerate(parts, start=1)
    ]


def _cut(video: Path, scenes: list[Scene], fps: Fraction, options: SplitOptions, label: str, report: Report) -> None:
    """Cut what is not there yet, in one pass over the video."""
    todo = []
    for scene in scenes:
        if scene.path.is_file():
            report.add(_STAGE, "skipped")
        else:
            todo.append(scene)
    if not todo:
        return
    audios = iter_audio_parts(video, [(float(s.first / fps), float((s.end - s.first) / fps)) for s in todo])
    info = probe_video(video)
    width, height = info.width // 2 * 2, info.height // 2 * 2
    frames = enumerate(iter_frames(video))
    position = 0
    with report.progress(f"{label}: cutting", sum(scene.end - scene.first for scene in todo)) as bar:
        for scene in todo:
            part = next(audios)
            if part is None:
                report.notes["clips without audio"] += 1
            audio = (None, None) if part is None else (part.waveform, part.sample_rate)
            pictures = _pictures(scene, options.save_images)
            with video_writer(scene.path, width, height, fps, *audio, crf=options.crf) as write:
                for index, frame in islice(frames, scene.first - position, scene.end - position):
                    frame = np.ascontiguousarray(frame[:height, :width])
                    write(frame)
                    if index in pictures:
                        write_image(pictures[index], frame)
                    bar.advance()
            position = scene.end
            report.add(_STAGE, "done")


def _pictures(scene: Scene, count: int) -> dict[int, Path]:
    """Frame -> file of the pictures of a scene: the middles of as many equal parts."""
    length = scene.end - scene.first
    places = {scene.first + length * (2 * part + 1) // (2 * count): part + 1 for part in range(count)}
    folder = scene.path.parent / "images"
    return {frame: folder / f"{scene.path.stem}-{number}.png" for frame, number in places.items()}


def _print(video: Path, scenes: list[Scene], fps: Fraction, report: Report) -> None:
    for scene in scenes:
        report.console.print(
            f"{video.name}: {float(scene.first / fps):9.3f} s to {float(scene.end / fps):9.3f} s, "
            f"{scene.end - scene.first:5d} frames -> {scene.path.name}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    report.notes["clips that would be cut"] += len(scenes)


def _write_table(folder: Path) -> None:
    """`scenes.jsonl`: all clips in the folder, from the notes of every video and every process."""
    with locked(folder / _TABLE):
        rows = []
        for note in sorted(folder.rglob(f"{_NOTES}/*.json")):
            noted = json.loads(note.read_text(encoding="utf-8"))
            fps = Fraction(noted["fps"])
            for scene in _named(note.parent.parent / note.stem, noted["scenes"]):
                if scene.path.is_file():
                    rows.append(
                        {
                            "video": relative_name(scene.path, folder),
                            "source": noted["source"],
                            "start_s": round(float(scene.first / fps), 3),
                            "duration_s": round(float((scene.end - scene.first) / fps), 3),
                            "frames": scene.end - scene.first,
                            "fps": round(float(fps), 3),
                        }
                    )
        write_table(folder / _TABLE, rows)


DESCRIPTION = """\
Cut long videos into clips of one scene each, with their audio: <name>-scene-001.mp4, -002, ... and a table of them,
scenes.jsonl, which 'ltx-titan caption' takes next.

Detectors: content (hard cuts), adaptive (hard cuts despite fast camera movement), threshold (fades to black),
histogram (hard cuts by brightness). Look first with --dry-run; --stats writes what the detector measured for each
frame, to choose --threshold by. Training takes the first frames of each clip: cut long scenes with --max-length.

Times are frames (123), seconds (12.5s) or HH:MM:SS[.nnn]. What is cut already is kept; videos that cannot be read are
named at the end.

examples:
  ltx-titan split-scenes film.mkv clips/ --dry-run
  ltx-titan split-scenes film.mkv clips/ --filter-shorter-than 2s --max-length 5s --trim 2
  ltx-titan split-scenes raw/ clips/ --recursive --detector adaptive
  torchrun --nproc-per-node 8 -m ltx_titan.cli split-scenes raw/ clips/      # eight videos at a time
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan split-scenes`."""
    parser.add_argument("video", type=Path, metavar="VIDEO", help="a video, or a folder of videos")
    parser.add_argument("output_dir", type=Path, metavar="OUT", help="folder for the clips; made if it does not exist")
    find = parser.add_argument_group("finding scenes")
    find.add_argument("--detector", choices=DETECTORS, default="content", help="default: content")
    find.add_argument(
        "--threshold",
        type=float,
        help="of the detector: lower finds more. Defaults: content 27, adaptive 3, threshold 12, histogram 0.2",
    )
    find.add_argument("--min-scene-length", default="15", metavar="TIME", help="shortest scene (default: 15 frames)")
    find.add_argument("--luma-only", action="store_true", help="look at brightness only (content, adaptive)")
    find.add_argument("--adaptive-window", type=int, default=2, help="frames at either side to compare with (adaptive)")
    find.add_argument(
        "--fade-bias", type=float, default=0.0, help="where in a fade to cut, from -1 (dark) to 1 (threshold)"
    )
    find.add_argument("--downscale", type=int, help="look at frames smaller by this factor (default: to 256 px)")
    find.add_argument("--frame-skip", type=int, default=0, help="frames left out after each one: faster, less exact")
    find.add_argument("--start", "--skip-start", default="0", metavar="TIME", help="begin here")
    find.add_argument("--end", "--duration", "-d", metavar="TIME", help="stop here, counted from the video's start")
    find.add_argument("--max-scenes", type=int, help="find this many scenes")
    cut = parser.add_argument_group("cutting")
    cut.add_argument("--filter-shorter-than", default="0", metavar="TIME", help="leave out shorter scenes")
    cut.add_argument("--max-length", metavar="TIME", help="cut longer scenes into equal parts")
    cut.add_argument("--trim", type=int, default=0, metavar="FRAMES", help="take this much off both ends of a scene")
    cut.add_argument("--crf", type=int, default=16, help="quality of H.264, lower is better and larger (default: 16)")
    cut.add_argument("--save-images", type=int, default=0, metavar="N", help="write N pictures of each clip to images/")
    cut.add_argument("--stats", action="store_true", help="write <name>.stats.csv, what the detector measured")
    parser.add_argument("--recursive", "-r", action="store_true", help="look into subfolders of VIDEO")
    parser.add_argument("--overwrite", action="store_true", help="look and cut again; deletes the clips of before")
    parser.add_argument("--dry-run", action="store_true", help="list the clips that would be cut, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan split-scenes`; the exit status is 1 only where nothing at all could be cut."""
    detection = Detection(**{name: getattr(arguments, name) for name in Detection.__dataclass_fields__})
    own = set(SplitOptions.__dataclass_fields__) - {"detection"}
    options = SplitOptions(detection=detection, **{name: getattr(arguments, name) for name in own})
    report = split_scenes(options)
    report.print("split-scenes")
    if not options.dry_run:
        report.console.print(f"clips: {options.output_dir / _TABLE}", highlight=False, soft_wrap=True)
    return 0 if report.succeeded() or (options.dry_run and not report.failures) else 1
