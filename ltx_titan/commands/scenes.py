"""Where a video's scenes begin and end, found with PySceneDetect's detectors.

The detectors are fed here, frame by frame from the decoder that also cuts, rather than by PySceneDetect's own reader:
so a frame number means the same frame in both, and progress can be shown.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from ltx_titan.media import MediaError, probe_video
from ltx_titan.media.video import open_media

DETECTORS = ("content", "adaptive", "threshold", "histogram")
_THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "threshold": 12.0, "histogram": 0.2}
# Detectors compare frames as a whole: more pixels cost time and change nothing.
_DETECTION_WIDTH = 256


@dataclass(frozen=True)
class Detection:
    """How scenes are found.

    Attributes:
        detector: content (cuts), adaptive (cuts, despite camera movement), threshold (fades), histogram (cuts).
        threshold: of the detector; None: its default.
        min_scene_length: shortest scene, as a time.
        luma_only: look at brightness only (content, adaptive).
        adaptive_window: frames at either side that a frame is compared with (adaptive).
        fade_bias: where in a fade the cut is, from -1 (fully dark) to 1 (threshold passed) (threshold).
        downscale: factor; None: to a width of about 256 pixels.
        frame_skip: frames left out after each one looked at; faster, and cuts may be off by as many.
        start: where in the video to begin, as a time.
        end: where to stop; None: at the end.
        max_scenes: how many to find.
    """

    detector: str = "content"
    threshold: float | None = None
    min_scene_length: str = "15"
    luma_only: bool = False
    adaptive_window: int = 2
    fade_bias: float = 0.0
    downscale: int | None = None
    frame_skip: int = 0
    start: str = "0"
    end: str | None = None
    max_scenes: int | None = None


def parse_time(text: str, fps: Fraction, option: str) -> int:
    """Frames that a time stands for: frames `123`, seconds `12.5s`, or `HH:MM:SS[.nnn]`.

    Raises:
        ValueError: text of another form.
    """
    text = text.strip()
    if re.fullmatch(r"\d+", text):
        return int(text)
    if match := re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)s", text):
        return round(float(match[1]) * fps)
    if match := re.fullmatch(r"(\d+):(\d{1,2}):(\d{1,2}(?:\.\d+)?)", text):
        return round((int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])) * fps)
    raise ValueError(f"{option}: {text!r} is no time; expected frames (123), seconds (12.5s) or HH:MM:SS[.nnn]")


def find_scenes(
    path: Path, detection: Detection, on_frame: Callable[[], None], stats_path: Path | None = None
) -> tuple[list[tuple[int, int]], int]:
    """Find scenes.

    Args:
        path: the video.
        detection: how.
        on_frame: called for every decoded frame.
        stats_path: where to write what the detector measured for each frame (.csv), to choose a threshold by.

    Returns:
        (first frame, frame after the last) of each scene in order, without gaps; and the number of frames decoded.

    Raises:
        MediaError: the video cannot be read.
        ValueError: an option does not fit.
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
    with open_media(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            if last is not None and index >= last:
                break
            count = index + 1
            on_frame()
            if index < first or (index - first) % (1 + detection.frame_skip):
                continue
            timecode = scenedetect.FrameTimecode(index, fps=info.fps)
            # Areas are averaged: swscale's choice of filter would let noise through.
            image = cv2.resize(frame.to_ndarray(format="bgr24"), size, interpolation=cv2.INTER_AREA)
            cuts += [cut.frame_num for cut in detector.process_frame(timecode, image)]
            if detection.max_scenes is not None and len(cuts) >= detection.max_scenes:
                break
    if timecode is None:
        raise MediaError(path, f"has no frame at --start {detection.start} ({count} frames can be decoded)")
    cuts += [cut.frame_num for cut in detector.post_process(timecode)]
    if stats is not None:
        stats.save_to_csv(str(stats_path))
    inner = sorted({cut for cut in cuts if first < cut < count})
    edges = [first, *inner, count]
    scenes = list(pairwise(edges))
    return scenes[: detection.max_scenes], count


def arrange(
    scenes: list[tuple[int, int]], shortest: int, longest: int | None, trim: int = 0
) -> tuple[list[tuple[int, int]], int]:
    """Scenes as they are cut: without short ones, and long ones in equal parts.

    Args:
        scenes: (first, frame after the last).
        shortest: frames; shorter ones are left out.
        longest: frames of a part; None: scenes stay whole.
        trim: frames taken off both ends of each scene, where transitions reach into it.

    Returns:
        The parts, and how many scenes were left out.
    """
    parts = []
    left_out = 0
    for first, end in scenes:
        first, end = first + trim, end - trim
        length = end - first
        if length < max(1, shortest):
            left_out += 1
            continue
        count = 1 if longest is None else -(-length // longest)
        edges = [first + length * part // count for part in range(count + 1)]
        parts += pairwise(edges)
    return parts, left_out


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
        raise ValueError(f'needs {error.name}: pip install "ltx-titan[tools]"') from error
    # Videos are spread over processes; threads of each on all cores would get in each other's way.
    cv2.setNumThreads(1)
    return scenedetect, cv2
