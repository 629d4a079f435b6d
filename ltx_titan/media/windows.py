"""Cutting one clip into several short ones, which may overlap: a small data set from a single file."""

from fractions import Fraction
from pathlib import Path

from ltx_titan.media.audio import Audio, read_audio, to_duration, to_stereo
from ltx_titan.media.errors import MediaError
from ltx_titan.media.frames import to_uint8
from ltx_titan.media.video import probe_video, read_clip, write_video


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
    """Cut a video with its audio into windows `<folder>/<stem>_<first frame>.mp4`.

    Args:
        source: the video.
        folder: where the windows go.
        window: frames of each.
        count: how many.
        width: pixels of the windows; the frames are scaled to cover them and cut.
        height: likewise.

    Returns:
        The files, in order of time.

    Raises:
        MediaError: the video cannot be read or is shorter than a window.
    """
    info = probe_video(source)
    if info.frames < window:
        raise MediaError(source, f"has {info.frames} frames, a window needs {window}")
    pixels = to_uint8(read_clip(source, info.frames, width, height))
    audio = read_audio(source)
    paths = []
    for start in window_starts(info.frames, window, count):
        path = Path(folder) / f"{Path(source).stem}_{start:05d}.mp4"
        part = _part(audio, start / info.fps, window / info.fps)
        rate = part.sample_rate if part else None
        write_video(path, pixels[start : start + window], info.fps, part.waveform if part else None, rate)
        paths.append(path)
    return paths


def _part(audio: Audio | None, start_s: Fraction, duration_s: Fraction) -> Audio | None:
    if audio is None:
        return None
    rest = to_stereo(audio.waveform)[:, round(start_s * audio.sample_rate) :]
    return to_duration(Audio(rest, audio.sample_rate), float(duration_s))
