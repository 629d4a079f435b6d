"""Writing media files: mp4 frame by frame, WAV, and short clips cut from a longer one.

All files are written atomically.
"""

import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
from torch import Tensor

from ltx_titan.common.files import atomic_write
from ltx_titan.media.audio import Audio, read_audio, to_duration, to_stereo
from ltx_titan.media.container import MediaError
from ltx_titan.media.image import to_uint8
from ltx_titan.media.video import probe_video, read_clip


@contextmanager
def video_writer(
    path: str | Path,
    width: int,
    height: int,
    fps: Fraction | float,
    audio: Tensor | None = None,
    sample_rate: int | None = None,
    crf: int = 18,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Opens an mp4 (H.264 in yuv420p, AAC) that browsers and TensorBoard play, and that is written frame by frame.

    A clip of any length takes the memory of one frame.

    Args:
        path: the file; its folder is made.
        width: pixels, even.
        height: pixels, even.
        fps: frames per second; a fraction keeps rates such as 30000/1001 exact.
        audio: float waveform [1 or 2, N] in [-1, 1], or None for a silent file.
        sample_rate: of the waveform, Hz; needed with it.
        crf: quality of H.264, 0 (lossless) to 51; 18 is visually close to the source.

    Yields:
        A function that takes the next frame, uint8 [height, width, 3].

    Raises:
        MediaError: the width or height is odd, which yuv420p cannot store.
    """
    if height % 2 or width % 2:
        raise MediaError(path, f"frames of {width}x{height} cannot be written as H.264, width and height must be even")
    with (
        atomic_write(path) as temporary,
        # The format is named, because the temporary file's suffix is not .mp4. `faststart` puts the index first, so
        # that browsers play the file while it loads.
        av.open(str(temporary), "w", format="mp4", options={"movflags": "faststart"}) as container,
    ):
        # A float such as 23.976 would become a fraction with a huge denominator, which mp4's time base cannot hold.
        rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(100_000)
        video = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio_stream = None
        if audio is not None:
            assert sample_rate is not None
            assert audio.shape[0] in (1, 2)
            layout = "stereo" if audio.shape[0] == 2 else "mono"
            audio_stream = container.add_stream("aac", rate=sample_rate, layout=layout)

        def write_frame(pixels: np.ndarray) -> None:
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))

        yield write_frame
        # Without a frame, `encode` flushes those that the encoder still holds.
        container.mux(video.encode())
        if audio is not None and audio_stream is not None:
            # Last and in one call: the track is passed in full, while frames arrive one by one.
            samples = np.ascontiguousarray(audio.detach().float().clamp(-1, 1).cpu().numpy())
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
            frame.sample_rate, frame.time_base, frame.pts = sample_rate, Fraction(1, sample_rate), 0
            container.mux(audio_stream.encode(frame))
            container.mux(audio_stream.encode())


def write_video(
    path: str | Path,
    frames: Tensor,
    fps: Fraction | float,
    audio: Tensor | None = None,
    sample_rate: int | None = None,
) -> None:
    """Writes all frames of a clip with `video_writer`.

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
    with video_writer(path, width, height, fps, audio, sample_rate) as write_frame:
        for pixels in frames.cpu().numpy():
            write_frame(pixels)


def write_wav(path: str | Path, audio: Audio) -> None:
    """Writes a 16-bit WAV file; its folder is made."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        encode_wav(file, audio)


def encode_wav(file: BinaryIO, audio: Audio) -> None:
    """Writes 16-bit WAV bytes to a file object that is open for writing, such as `io.BytesIO()`."""
    # 32767 for both signs: 32768 would overflow at +1.
    samples = (audio.waveform.detach().float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(file, "wb") as writer:
        writer.setnchannels(samples.shape[0])
        writer.setsampwidth(2)
        writer.setframerate(audio.sample_rate)
        # [channels, N] -> [N, channels]: WAV interleaves the channels.
        writer.writeframes(samples.T.contiguous().numpy().tobytes())


def window_starts(frames: int, window: int, count: int) -> list[int]:
    """First frames of `count` windows of `window` frames, spread evenly over a clip of `frames` frames.

    Raises:
        ValueError: the clip is shorter than a window.
    """
    if frames < window:
        raise ValueError(f"a clip of {frames} frames cannot be cut into windows of {window}")
    last = frames - window
    return [last * i // max(1, count - 1) for i in range(count)]


def cut_windows(source: str | Path, folder: str | Path, window: int, count: int, width: int, height: int) -> list[Path]:
    """Cuts a video with its audio into windows, which may overlap: `<folder>/<stem>_<first frame>.mp4`.

    Args:
        source: the video.
        folder: folder of the windows.
        window: frames of each.
        count: how many.
        width: pixels of the windows; the frames are scaled to cover them and cropped.
        height: likewise.

    Returns:
        The files, in order of time.

    Raises:
        MediaError: the video cannot be read or is shorter than a window.
    """
    info = probe_video(source)
    if info.frames < window:
        raise MediaError(source, f"has {info.frames} frames, a window needs {window}")
    # Decoded once for all windows, which may overlap.
    pixels = to_uint8(read_clip(source, info.frames, width, height))
    audio = read_audio(source)
    paths = []
    for start in window_starts(info.frames, window, count):
        path = Path(folder) / f"{Path(source).stem}_{start:05d}.mp4"
        frames = pixels[start : start + window]
        if audio is None:
            write_video(path, frames, info.fps)
        else:
            # `info.fps` is a fraction: late windows stay in time with their audio.
            rest = to_stereo(audio.waveform)[:, round(start / info.fps * audio.sample_rate) :]
            # Audio tracks often end before the video; the last window is then padded with silence.
            part = to_duration(Audio(rest, audio.sample_rate), float(window / info.fps))
            write_video(path, frames, info.fps, part.waveform, part.sample_rate)
        paths.append(path)
    return paths
