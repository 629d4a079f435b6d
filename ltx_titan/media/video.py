"""Video files through PyAV: frames as tensors, exact frame rates, and mp4 files with audio.

Frames are counted while decoding from the start rather than sought by time, so the first F frames are exactly those
whatever the container says. A frame rate is a fraction (24000/1001 stays that): positions of tokens are seconds.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from torch import Tensor

from ltx_titan.media.errors import MediaError
from ltx_titan.media.frames import CENTRE, fit_frames
from ltx_titan.media.writer import video_writer

# Containers round time stamps, in the coarsest case to milliseconds.
_TOLERANCE_S = Fraction(1, 500)


@dataclass(frozen=True)
class VideoInfo:
    """What can be known of a video without decoding it.

    Attributes:
        frames: how many it has, by its header; a damaged file may hold fewer.
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


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Open a media file for reading.

    Raises:
        MediaError: it is missing, empty, damaged or no media file; also for errors while the caller decodes.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")
    try:
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(path, f"not a readable media file, or truncated ({error.strerror})") from error


def probe_video(path: str | Path) -> VideoInfo:
    """Frame count, size and rate of a video.

    The count is the header's; without one, duration times rate; without that, the number of decoded frames.

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
        # Encoders pad to even sizes and phones store a rotation: only a decoded frame knows what is displayed.
        width, height = (first.height, first.width) if first.rotation % 180 else (first.width, first.height)
        return VideoInfo(frames, width, height, fps, bool(container.streams.audio))


def iter_frames(path: str | Path) -> Iterator[np.ndarray]:
    """Decode a video frame by frame: uint8 arrays [H, W, 3], upright.

    Raises:
        MediaError: the file is not a readable video, or ends in the middle of a frame.
    """
    return (pixels for _, pixels in _iter_timed(path))


def frames_at_rate(info: VideoInfo, fps: Fraction | None) -> int:
    """How many frames a video has at another rate; as many as it has where `fps` is None."""
    return info.frames if fps is None else math.ceil((info.frames / info.fps - _TOLERANCE_S) * fps)


def iter_fitted(
    path: str | Path, width: int, height: int, fps: Fraction | None = None, anchor: tuple[float, float] = CENTRE
) -> Iterator[Tensor]:
    """Decode a video and scale each frame to cover a size, cut to it: float32 [3, 1, height, width] in [-1, 1].

    Only one frame is held at its full size, so that a 4K source costs no more memory than the result.

    Args:
        path: the video.
        width: of the result, pixels.
        height: of the result, pixels.
        fps: give this many frames per second, each the one nearest in time, by the file's own time stamps (phones
            record at varying rates); None gives every frame.
        anchor: place of the cut, as in `fit_frames`.

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
    anchor: tuple[float, float] = CENTRE,
) -> Tensor:
    """Read consecutive frames, scaled to cover a size and cut to it.

    Args:
        path: the video.
        frames: how many frames.
        width: of the result, pixels.
        height: of the result, pixels.
        start: first frame.
        fps: rate to read at, None for the video's own; `frames` and `start` count at it.
        anchor: place of the cut, as in `fit_frames`; the centre by default.

    Returns:
        Pixels [3, frames, height, width] in [-1, 1], float32.

    Raises:
        MediaError: the file is not a readable video, or has fewer frames.
    """
    fitted = list(islice(iter_fitted(path, width, height, fps, anchor), start, start + frames))
    if len(fitted) < frames:
        raise MediaError(
            path, f"frames {start} to {start + frames} were asked for, {start + len(fitted)} can be decoded"
        )
    return torch.cat(fitted, dim=1)


def write_video(
    path: str | Path,
    frames: Tensor,
    fps: Fraction | float,
    audio: Tensor | None = None,
    sample_rate: int | None = None,
) -> None:
    """Write an mp4 (H.264 in yuv420p, AAC) that browsers and TensorBoard play; complete or not there at all.

    Args:
        path: the file; its folder is made.
        frames: uint8 [F, H, W, 3], even height and width.
        fps: frames per second; a fraction keeps rates such as 30000/1001 exact.
        audio: float waveform [1 or 2, N] in [-1, 1], or None for a silent file.
        sample_rate: of the waveform, Hz; needed with it.
    """
    assert frames.dtype == torch.uint8
    assert frames.ndim == 4
    height, width = frames.shape[1:3]
    with video_writer(path, width, height, fps, audio, sample_rate) as write:
        for pixels in frames.cpu().numpy():
            write(pixels)


def _iter_timed(path: str | Path) -> Iterator[tuple[Fraction | None, np.ndarray]]:
    """Upright frames with their time in seconds, None where the file has no time stamps."""
    with open_media(path) as container:
        for frame in container.decode(_video_stream(container, path)):
            pixels = frame.to_ndarray(format="rgb24")
            time_s = None if frame.pts is None else frame.pts * frame.time_base
            # `rotation` is counter-clockwise degrees that bring the frame upright.
            yield time_s, np.rot90(pixels, k=round(frame.rotation / 90) % 4) if frame.rotation else pixels


def _at_rate(
    frames: Iterable[tuple[Fraction | None, np.ndarray]], fps: Fraction, own_fps: Fraction
) -> Iterator[np.ndarray]:
    """The frame nearest to each of the times 0, 1 / fps, 2 / fps, ... after the first frame."""
    count = 0
    origin_s: Fraction | None = None
    previous: tuple[Fraction, np.ndarray] | None = None
    for index, (time_s, pixels) in enumerate(frames):
        time_s = index / own_fps if time_s is None else time_s
        origin_s = time_s if origin_s is None else origin_s
        time_s -= origin_s
        if previous is not None:
            while count / fps < (previous[0] + time_s) / 2:
                yield previous[1]
                count += 1
        previous = (time_s, pixels)
    if previous is not None:
        # The last frame is shown for as long as any other.
        while count / fps <= previous[0] + max(0, 1 / own_fps - _TOLERANCE_S):
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
