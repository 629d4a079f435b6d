"""Reading video files through PyAV: headers, frames as tensors, and frames at another rate.

Frames are counted while decoding from the start instead of seeking by time, so the first F frames do not depend on the
container's index. A frame rate is a fraction (24000/1001 stays exact), because positions of tokens are in seconds.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from ltx_titan.media.container import MediaError, open_media
from ltx_titan.media.image import CENTER, fit_frames

# Containers round time stamps, in the coarsest case to milliseconds.
_TOLERANCE_S = Fraction(1, 500)


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video from its header and first frame.

    Attributes:
        frames: number of frames by the header; a damaged file may hold fewer.
        width: pixels, as displayed (after rotation).
        height: pixels, as displayed.
        fps: frames per second.
        has_audio: whether there is an audio track.
    """

    frames: int
    width: int
    height: int
    fps: Fraction
    has_audio: bool


def probe_video(path: str | Path) -> VideoInfo:
    """Reads frame count, size and rate of a video.

    The count is the header's; without one, duration times rate; without a duration, the number of decoded frames.

    Raises:
        MediaError: the file is not a readable video.
    """
    with open_media(path) as container:
        stream = _video_stream(container, path)
        fps = _frame_rate(stream, path)
        frames = stream.frames
        if not frames and stream.duration:
            frames = round(stream.duration * stream.time_base * fps)
        first = next(container.decode(stream), None)
        if first is None:
            raise MediaError(path, "no frame can be decoded")
        if not frames:
            frames = 1 + sum(1 for _ in container.decode(stream))
        # Encoders pad to even sizes and phones store a rotation: only a decoded frame has the displayed size.
        width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        return VideoInfo(frames, width, height, fps, bool(container.streams.audio))


def iter_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Decodes a video frame by frame: uint8 arrays [H, W, 3], rotated upright.

    Raises:
        MediaError: the file is not a readable video, or ends in the middle of a frame.
    """
    return (pixels for _, pixels in _iter_timed(path))


def frames_at_rate(info: VideoInfo, fps: Fraction | None) -> int:
    """Number of frames of a video read at another rate; its own number if `fps` is None."""
    if fps is None:
        return info.frames
    # Without the tolerance, a duration that was rounded up would count one frame too many.
    return math.ceil((info.frames / info.fps - _TOLERANCE_S) * fps)


def iter_fitted(
    path: str | Path, width: int, height: int, fps: Fraction | None = None, anchor: tuple[float, float] = CENTER
) -> Iterator[Tensor]:
    """Decodes a video; scales each frame to cover a size and crops it: float32 [3, 1, height, width] in [-1, 1].

    Only one frame is held at its full size, so a 4K source takes no more memory than the result.

    Args:
        path: the video.
        width: of the result, pixels.
        height: of the result, pixels.
        fps: rate to resample to: at each time the nearest frame by the file's own time stamps, since phones record at
            varying rates. None yields every frame.
        anchor: position of the crop, as in `fit_frames`.

    Raises:
        MediaError: the file is not a readable video.
    """
    frames = iter_frames(path) if fps is None else _at_rate(_iter_timed(path), fps, probe_video(path).fps)
    for frame in frames:
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
        MediaError: the file is not a readable video, or has fewer frames.
    """
    fitted = list(islice(iter_fitted(path, width, height, fps, anchor), start, start + frames))
    if len(fitted) < frames:
        raise MediaError(
            path, f"expected frames {start} to {start + frames}, only {start + len(fitted)} can be decoded"
        )
    return torch.cat(fitted, dim=1)


def _iter_timed(path: str | Path) -> Iterator[tuple[Fraction | None, np.ndarray]]:
    """Decodes (time stamp in seconds, upright frame); the time is None in files without time stamps."""
    with open_media(path) as container:
        for frame in container.decode(_video_stream(container, path)):
            pixels = frame.to_ndarray(format="rgb24")
            time_s = None if frame.pts is None else frame.pts * frame.time_base
            # `rotation` is counter-clockwise degrees that bring the frame upright.
            yield time_s, np.rot90(pixels, k=round(frame.rotation / 90) % 4) if frame.rotation else pixels


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


def _video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    if not container.streams.video:
        raise MediaError(path, "has no video track")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return stream


def _frame_rate(stream: av.VideoStream, path: str | Path) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError(path, "has no frame rate")
    return Fraction(rate)
