"""Scene boundaries of a video, from the detectors of PySceneDetect.

The detectors receive frames from the decoder that also cuts, and not from PySceneDetect's own reader: an index refers
to the same frame in both, and progress can be shown.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from ltx_titan.common.options import Flag, Maybe, alias, placeholder
from ltx_titan.media import MediaError, iter_frames, probe_video

_THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "threshold": 12.0, "histogram": 0.2}
# Detectors compare whole frames: more pixels take longer and do not change the result.
_DETECTION_WIDTH = 256


@dataclass(frozen=True)
class Detection:
    """Settings of scene detection."""

    detector: Literal["content", "adaptive", "threshold", "histogram"] = "content"
    """Detector of cuts: content (hard cuts), adaptive (hard cuts despite fast camera movement), threshold (fades to
    black) or histogram (hard cuts by brightness)."""

    threshold: Maybe[float] = None
    """Threshold of the detector; lower values find more scenes. Defaults: content 27, adaptive 3, threshold 12,
    histogram 0.2."""

    min_scene_length: Annotated[str, placeholder("TIME")] = "15"
    """Length of the shortest scene."""

    luma_only: Flag = False
    """Compare brightness only (content, adaptive)."""

    adaptive_window: int = 2
    """Frames on either side that a frame is compared with (adaptive)."""

    fade_bias: float = 0.0
    """Position of the cut in a fade, from -1 (darkest frame) to 1 (threshold crossed) (threshold)."""

    downscale: Maybe[int] = None
    """Factor by which frames are reduced for detection. Default: to a width of about 256 pixels."""

    frame_skip: int = 0
    """Frames to skip after each one: faster, and cuts may be off by as many frames."""

    start: Annotated[str, alias("--skip-start"), placeholder("TIME")] = "0"
    """Start of the part to split."""

    end: Annotated[Maybe[str], alias("--duration", "-d"), placeholder("TIME")] = None
    """End of the part to split, counted from the start of the video."""

    max_scenes: Maybe[int] = None
    """Number of scenes after which detection stops."""


def parse_time(text: str, fps: Fraction, option: str) -> int:
    """Converts a time to frames: `123` (frames), `12.5s` (seconds) or `HH:MM:SS[.nnn]`.

    Raises:
        ValueError: the text has another form.
    """
    text = text.strip()
    if re.fullmatch(r"\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)s", text):
        return round(float(match[1]) * fps)
    if match := re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2}(?:\.\d+)?)", text):
        return round((int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])) * fps)
    raise ValueError(f"{option}: {text!r} is not a time; expected frames (123), seconds (12.5s) or HH:MM:SS[.nnn]")


def find_scenes(
    path: Path, detection: Detection, on_frame: Callable[[], None], stats_path: Path | None = None
) -> tuple[list[tuple[int, int]], int]:
    """Finds the scenes of a video.

    Args:
        path: the video.
        detection: settings of the detector.
        on_frame: called for every decoded frame.
        stats_path: file (.csv) for the detector's value of each frame, to choose a threshold by.

    Returns:
        (first frame, frame after the last) of each scene in order, without gaps; and the number of decoded frames.

    Raises:
        MediaError: the video cannot be read.
        ValueError: a time has another form.
    """
    scenedetect, cv2 = _libraries()
    info = probe_video(path)
    first = parse_time(detection.start, info.fps, "--start")
    last = None if detection.end is None else parse_time(detection.end, info.fps, "--end")
    detector = _detector(detection, info.fps, scenedetect)
    stats = None
    if stats_path is not None:
        stats = detector.stats_manager = scenedetect.StatsManager()
        stats.register_metrics(detector.get_metrics())
    factor = detection.downscale or max(1, round(info.width / _DETECTION_WIDTH))
    size = (max(1, info.width // factor), max(1, info.height // factor))
    cuts: list[int] = []
    count = 0
    timecode = None
    # The frames that are cut later: of variable rate, an index of the decoder would be another time.
    for index, frame in enumerate(iter_frames(path)):
        if last is not None and index >= last:
            break
        count = index + 1
        on_frame()
        if index < first or (index - first) % (1 + detection.frame_skip):
            continue
        timecode = scenedetect.FrameTimecode(index, fps=info.fps)
        # Averages areas, so that noise does not pass. The detectors expect BGR.
        image = cv2.resize(np.ascontiguousarray(frame[..., ::-1]), size, interpolation=cv2.INTER_AREA)
        cuts += [cut.frame_num for cut in detector.process_frame(timecode, image)]
        if detection.max_scenes is not None and len(cuts) >= detection.max_scenes:
            break
    if timecode is None:
        raise MediaError(path, f"has no frame at --start {detection.start} ({count} frames can be decoded)")
    # Some cuts are reported only at the end, such as that of a last fade to black.
    cuts += [cut.frame_num for cut in detector.post_process(timecode)]
    if stats is not None:
        stats.save_to_csv(str(stats_path))
    # Not at either end, which would make an empty scene.
    inner = sorted({cut for cut in cuts if first < cut < count})
    edges = [first, *inner, count]
    scenes = list(pairwise(edges))
    return scenes[: detection.max_scenes], count


def arrange(
    scenes: list[tuple[int, int]], shortest: int, longest: int | None, trim: int = 0
) -> tuple[list[tuple[int, int]], int]:
    """Drops short scenes and cuts long ones into equal parts.

    Args:
        scenes: (first frame, frame after the last).
        shortest: minimal length in frames.
        longest: maximal length of a part in frames; None keeps scenes whole.
        trim: frames removed from both ends of each scene, which transitions can reach into.

    Returns:
        The parts, and the number of skipped scenes.
    """
    parts: list[tuple[int, int]] = []
    skipped = 0
    for first, end in scenes:
        first, end = first + trim, end - trim
        length = end - first
        if length < max(1, shortest):
            skipped += 1
            continue
        # Equal parts rather than parts of the full length and a short rest, which would fit no bucket.
        count = 1 if longest is None else -(-length // longest)
        edges = [first + length * part // count for part in range(count + 1)]
        parts += pairwise(edges)
    return parts, skipped


def _detector(detection: Detection, fps: Fraction, scenedetect: Any) -> Any:
    shortest = parse_time(detection.min_scene_length, fps, "--min-scene-length")
    threshold = _THRESHOLDS[detection.detector] if detection.threshold is None else detection.threshold
    if detection.detector == "content":
        return scenedetect.ContentDetector(threshold, shortest, luma_only=detection.luma_only)
    if detection.detector == "adaptive":
        return scenedetect.AdaptiveDetector(
            threshold, shortest, window_width=detection.adaptive_window, luma_only=detection.luma_only
        )
    if detection.detector == "threshold":
        return scenedetect.ThresholdDetector(int(threshold), shortest, fade_bias=detection.fade_bias)
    return scenedetect.HistogramDetector(threshold, min_scene_len=shortest)


def _libraries() -> tuple[Any, Any]:
    try:
        import cv2
        import scenedetect
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is not installed: pip install "ltx-titan[tools]"') from error
    # Videos are distributed over processes, so the threads of each would compete for the same cores.
    cv2.setNumThreads(1)
    return scenedetect, cv2
