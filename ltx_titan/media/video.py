"""Reading video files through PyAV: headers, frames as displayed, at a constant rate.

A video is what a player shows: frame i is the frame on the screen i / fps seconds after the first one. In a file of
constant rate these are its own frames; a file of variable rate is resampled by its time stamps, so that motion keeps
its speed and audio stays with it. Counts come from the packets of the file and not from its header, which also counts
what an edit list hides or a cut has removed.

A frame rate is a fraction (24000/1001 stays exact), because positions of tokens are in seconds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from ltx_titan.media.audio import has_audio
from ltx_titan.media.color import ToRgb, has_alpha
from ltx_titan.media.container import MediaError, decode_video, open_media, video_stream
from ltx_titan.media.geometry import display_geometry, resized
from ltx_titan.media.image import CENTER, fit_frames
from ltx_titan.media.interlaced import progressive

# Containers round time stamps, in the coarsest case to milliseconds.
_TOLERANCE_S = Fraction(1, 500)
# Time stamps may deviate from a constant rate by this part of a frame.
_JITTER = Fraction(1, 4)
# A file that has most intervals of one length has dropped frames; otherwise its rate varies, and its mean is used.
_MOSTLY = 0.9
# Aspect ratios that differ by less are the same, rounded to whole pixels.
_SAME_ASPECT = 0.02
# Containers of broadcasts, whose clock may jump; FFmpeg's command takes a jump of 10 s for one.
_WITH_CLOCK = ("mpegts", "mpeg")
_LONGEST_GAP_S = 10
# Denominators of frame rates, such as 24000/1001.
_LARGEST_DENOMINATOR = 1001


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video or image.

    Attributes:
        frames: number of frames at `fps`, by the packets of the file; damaged ones may not decode.
        width: pixels, as displayed (cropped, with square pixels, rotated).
        height: pixels, as displayed.
        fps: frames per second at which the video is read; of a variable rate the usual or the mean one.
        has_audio: whether there is an audio track that holds audio.
        is_variable: whether the time stamps do not fit any constant rate.
        is_interlaced: whether frames hold two fields of different times.
        has_alpha: whether frames have transparency, which is composited over white.
    """

    frames: int
    width: int
    height: int
    fps: Fraction
    has_audio: bool
    is_variable: bool = False
    is_interlaced: bool = False
    has_alpha: bool = False


class TooFewFramesError(MediaError):
    """Fewer frames decode than were asked for; `frames` have been decoded from the start."""

    def __init__(self, path: str | Path, reason: str, frames: int) -> None:
        super().__init__(path, reason)
        self.frames = frames


def probe_video(path: str | Path) -> VideoInfo:
    """Reads frame count, size and rate of a video.

    Decodes one frame. The packets are counted by the index of an MP4 file, in other containers by reading the file.

    Raises:
        MediaError: the file is not a readable video.
    """
    path = Path(path)
    try:
        status = path.stat()
    except OSError:
        status = None
    return _probe(str(path), status and (status.st_size, status.st_mtime_ns))


def is_same_rate(one: float | Fraction, other: float | Fraction) -> bool:
    """Whether two frame rates (1/s) are equal up to the rounding of stored ones: 0.1 %."""
    return abs(float(one) / float(other) - 1) < 1e-3


def iter_frames(path: str | Path, fps: Fraction | None = None) -> Iterator[np.ndarray]:
    """Decodes a video frame by frame: uint8 arrays [H, W, 3] as displayed, at a constant rate.

    Args:
        path: the video.
        fps: rate to resample to: at each time the nearest frame by the time stamps. None: `VideoInfo.fps`, at which
            only videos of variable rate are resampled.

    Raises:
        MediaError: the file is not a readable video, or ends in the middle of a frame.
    """
    info = probe_video(path)
    if fps is None and not info.is_variable:
        return (pixels for _, pixels in _iter_timed(path))
    return _at_rate(_iter_timed(path), fps or info.fps, info.fps)


def seek_frames(path: str | Path, times_s: Iterable[float]) -> Iterator[np.ndarray]:
    """Displayed key frames at or before times in seconds, without decoding what is between: for an overview of a film.

    Raises:
        MediaError: the file is not a readable video.
    """
    with open_media(path) as container:
        stream = video_stream(container, path)
        to_rgb = ToRgb(path)
        for time_s in times_s:
            container.seek(math.floor(time_s / stream.time_base) + (stream.start_time or 0), stream=stream)
            frame = next(decode_video(container, stream), None)
            if frame is not None:
                yield display_geometry(path, stream, frame).apply(to_rgb(frame))


def frames_at_rate(info: VideoInfo, fps: Fraction | None) -> int:
    """Number of frames of a video read at another rate; its own number if `fps` is None."""
    if fps is None:
        return info.frames
    # Without the tolerance, a duration that was rounded up would count one frame too many.
    return math.ceil((info.frames / info.fps - _TOLERANCE_S) * fps)


def iter_fitted(
    path: str | Path,
    width: int,
    height: int,
    fps: Fraction | None = None,
    anchor: tuple[float, float] = CENTER,
    start: int = 0,
) -> Iterator[Tensor]:
    """Decodes a video; scales each frame to cover a size and crops it: float32 [3, 1, height, width] in [-1, 1].

    Only one frame is held at its full size, so a 4K source takes no more memory than the result.

    Args:
        path: the video.
        width: of the result, pixels.
        height: of the result, pixels.
        fps: rate to resample to, as in `iter_frames`.
        anchor: position of the crop, as in `fit_frames`.
        start: index of the first frame; earlier ones are decoded and not scaled.

    Raises:
        MediaError: the file is not a readable video.
    """
    for frame in islice(iter_frames(path, fps), start, None):
        yield fit_frames(torch.from_numpy(np.ascontiguousarray(frame))[None], width, height, anchor)


def read_clip(
    path: str | Path,
    frames: int,
    width: int,
    height: int,
    start: int = 0,
    fps: Fraction | None = None,
    anchor: tuple[float, float] = CENTER,
) -> Tensor:
    """Reads consecutive frames, scaled to cover a size and cropped to it.

    Args:
        path: the video.
        frames: number of frames.
        width: of the result, pixels.
        height: of the result, pixels.
        start: index of the first frame.
        fps: rate to read at, None for the video's own; `frames` and `start` count at it.
        anchor: position of the crop, as in `fit_frames`; centered by default.

    Returns:
        Pixels [3, frames, height, width] in [-1, 1], float32.

    Raises:
        TooFewFramesError: fewer frames can be decoded.
        MediaError: the file is not a readable video.
    """
    fitted = list(islice(iter_fitted(path, width, height, fps, anchor, start), frames))
    if len(fitted) < frames:
        found = start + len(fitted)
        raise TooFewFramesError(
            path, f"expected frames {start} to {start + frames}, only {found} can be decoded", frames=found
        )
    return torch.cat(fitted, dim=1)


@lru_cache(maxsize=4096)
def _probe(path: str, version: tuple[int, int] | None) -> VideoInfo:
    """Probes a version of a file, given by size and time of modification; reading asks again what planning asked."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        times = _packet_times(container, stream)
        header_fps = stream.average_rate or stream.guessed_rate
        _check_continuous(path, container, times)
    fps, is_variable = _rate(times, header_fps)
    if fps is None:
        raise MediaError(path, "has no frame rate")
    frames = len(times)
    if is_variable:
        known = [time for time in times if time is not None]
        span = max(known) - min(known) + 1 / fps
        frames = math.ceil((span - _TOLERANCE_S) * fps)
    with open_media(path) as container:
        stream = video_stream(container, path)
        first = next(decode_video(container, stream), None)
        if first is None:
            raise MediaError(path, "no frame can be decoded")
        _check_alpha_layer(stream, path, first)
        # Only a decoded frame has the size and the matrix that are displayed.
        pixels = display_geometry(path, stream, first).apply(ToRgb(path)(first))
    height, width = pixels.shape[:2]
    return VideoInfo(
        frames, width, height, fps, has_audio(path), is_variable, bool(first.interlaced_frame), has_alpha(first)
    )


def _to_first_size(path: str | Path, pixels: np.ndarray, size: tuple[int, int], time_s: Fraction | None) -> np.ndarray:
    """Scales a frame to the size of the first: conference recordings change their resolution, not what they show."""
    height, width = pixels.shape[:2]
    if abs(width / height * size[0] / size[1] - 1) > _SAME_ASPECT:
        at = "" if time_s is None else f" at {float(time_s):.3f} s"
        raise MediaError(
            path,
            f"changes its size from {size[1]}x{size[0]} to {width}x{height}{at}, expected one aspect ratio; cut it "
            "there",
        )
    return resized(pixels, *size)


def _check_alpha_layer(stream: av.VideoStream, path: str | Path, first: av.VideoFrame) -> None:
    """Refuses VP8 and VP9 with transparency in a second layer if PyAV was built without the decoder that reads it."""
    if stream.metadata.get("alpha_mode") == "1" and not has_alpha(first):
        name, decoder = Path(path), "libvpx" if stream.codec_context.name == "vp8" else "libvpx-vp9"
        raise MediaError(
            path,
            f"has transparency in a layer that this build of FFmpeg drops; keep it in another codec: ffmpeg "
            f"-c:v {decoder} -i {name.name} -c:v ffv1 {name.stem}_alpha.mkv",
        )


def _packet_times(container: InputContainer, stream: av.VideoStream) -> list[Fraction | None]:
    """Times in seconds of the frames that are shown; None for those without a time stamp."""
    base = stream.time_base
    index = stream.index_entries
    if "mp4" in container.format.name and stream.frames and len(index) == stream.frames:
        # The index of an MP4 file lists all frames, with their decoding times: equally spaced if the rate is constant.
        times = [entry.timestamp * base for entry in index if not entry.is_discard]
        if _rate(times, stream.average_rate)[1] is False:
            return list(times)
    return [
        None if packet.pts is None else packet.pts * base
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]


def _check_continuous(path: str, container: InputContainer, times: list[Fraction | None]) -> None:
    """Refuses broadcasts whose clock jumps or starts again, as in files that were appended to each other."""
    known = sorted(time for time in times if time is not None)
    if container.format.name not in _WITH_CLOCK or len(known) < 2:
        return
    gap_s = max(later - earlier for earlier, later in pairwise(known))
    if gap_s > _LONGEST_GAP_S or len(set(known)) < _MOSTLY * len(known):
        raise MediaError(
            path,
            f"its time stamps {f'jump by {float(gap_s):.0f} s' if gap_s > _LONGEST_GAP_S else 'start again'}, as in "
            f"recordings appended to each other; make them continuous: ffmpeg -i {Path(path).name} -c copy "
            f"{Path(path).stem}_joined.mkv",
        )


def _rate(times: list[Fraction | None], header_fps: Fraction | None) -> tuple[Fraction | None, bool]:
    """Frame rate of time stamps in any order, and whether it varies."""
    header_fps = Fraction(header_fps) if header_fps else None
    known = sorted(time for time in times if time is not None)
    if len(known) < 2 or len(known) < len(times) or known[0] == known[-1]:
        return header_fps, False
    mean = Fraction((len(known) - 1) / (known[-1] - known[0])).limit_denominator(_LARGEST_DENOMINATOR)
    for fps in (header_fps, mean):
        if fps and _fits(known, fps):
            return fps, False
    intervals = [later - earlier for earlier, later in pairwise(known) if later > earlier]
    usual = sorted(intervals)[len(intervals) // 2]
    alike = sum(abs(interval - usual) <= _JITTER * usual for interval in intervals)
    if alike < _MOSTLY * len(intervals):
        return mean, True
    # The header of a file with dropped frames may state the mean.
    if header_fps and abs(usual * header_fps - 1) <= _JITTER:
        return header_fps, True
    return (1 / usual).limit_denominator(_LARGEST_DENOMINATOR), True


def _fits(times: list[Fraction], fps: Fraction) -> bool:
    tolerance = max(_TOLERANCE_S, _JITTER / fps)
    return all(abs(time - times[0] - index / fps) <= tolerance for index, time in enumerate(times))


def _iter_timed(path: str | Path) -> Iterator[tuple[Fraction | None, np.ndarray]]:
    """Decodes (time stamp in seconds, displayed frame); the time is None in files without time stamps."""
    with open_media(path) as container:
        stream = video_stream(container, path)
        to_rgb, geometry, size, shown = ToRgb(path), None, None, None
        for frame in progressive(decode_video(container, stream)):
            if geometry is None or (frame.width, frame.height) != size:
                geometry, size = display_geometry(path, stream, frame), (frame.width, frame.height)
            time_s = None if frame.pts is None else frame.pts * frame.time_base
            pixels = geometry.apply(to_rgb(frame))
            if shown is None:
                shown = pixels.shape[:2]
            elif pixels.shape[:2] != shown:
                pixels = _to_first_size(path, pixels, shown, time_s)
            yield time_s, pixels


def _at_rate(
    frames: Iterable[tuple[Fraction | None, np.ndarray]], fps: Fraction, own_fps: Fraction
) -> Iterator[np.ndarray]:
    """Resamples to the frame nearest to each of the times 0, 1 / fps, 2 / fps, ... after the first frame."""
    count = 0  # frames yielded so far; the next one is for time count / fps
    origin_s: Fraction | None = None
    previous: tuple[Fraction, np.ndarray] | None = None
    for index, (time_s, pixels) in enumerate(frames):
        time_s = index / own_fps if time_s is None else time_s
        origin_s = time_s if origin_s is None else origin_s
        time_s -= origin_s
        if previous is not None:
            # Up to the middle between two frames the earlier one is the nearer.
            while count / fps < (previous[0] + time_s) / 2:
                yield previous[1]
                count += 1
        previous = (time_s, pixels)
    if previous is not None:
        # The last frame has no successor to end it: it is shown for one frame of the average rate.
        while count / fps <= previous[0] + max(Fraction(0), 1 / own_fps - _TOLERANCE_S):
            yield previous[1]
            count += 1
