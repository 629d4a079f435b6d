"""Audio of audio and video files through PyAV: float waveforms, mixed down to stereo, cut to a duration.

In a video, time 0 of the audio is that of the first video frame that decodes, else that of the first sample. Both
readers use the same chunks: `read_audio` for a whole file, `iter_audio_parts` for audio that does not fit in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_titan.media.container import MediaError, audio_stream, first_frame_s, open_media

_CENTER_LEVEL = 0.707
# FFmpeg orders channels front left, front right, center, LFE, back left, back right, side left, side right. LFE is
# dropped, as in ITU-R BS.775; the weights of one output channel are normalized to sum 1.
_STEREO_WEIGHTS = {
    6: ((1, 0, _CENTER_LEVEL, 0, _CENTER_LEVEL, 0), (0, 1, _CENTER_LEVEL, 0, 0, _CENTER_LEVEL)),
    8: (
        (1, 0, _CENTER_LEVEL, 0, _CENTER_LEVEL, 0, _CENTER_LEVEL, 0),
        (0, 1, _CENTER_LEVEL, 0, 0, _CENTER_LEVEL, 0, _CENTER_LEVEL),
    ),
}


# Time stamps round to a millisecond or so, and those of live recordings jitter; a larger difference is a gap.
_GAP_S = Fraction(15, 1000)
_CLOCK_S = Fraction(1, 1000)


@dataclass(frozen=True)
class Audio:
    """A piece of audio.

    Attributes:
        waveform: float32 [channels, N], about [-1, 1].
        sample_rate: Hz.
    """

    waveform: Tensor
    sample_rate: int

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.waveform.shape[1] / self.sample_rate


def read_audio(path: str | Path) -> Audio | None:
    """Decodes the audio track of a file at its own sample rate, with all its channels; None without audio.

    A track without samples, as screen recorders write, is no audio. Every piece is placed by its time stamp: audio that
    starts before the first video frame is cut; a late start and gaps are silence. Where the sample rate changes, later
    pieces are converted to the first rate; where the number of channels changes, all are mixed to stereo.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    chunks = list(_iter_chunks(path))
    if not chunks:
        return None
    if len({chunk.samples.shape[0] for chunk in chunks}) > 1:
        chunks = [replace(chunk, samples=to_stereo(torch.from_numpy(chunk.samples)).numpy()) for chunk in chunks]
    end = max(1, max(chunk.end for chunk in chunks))
    return Audio(torch.from_numpy(_assemble(chunks, 0, end)), chunks[0].rate)


def iter_audio_parts(path: str | Path, spans: Sequence[tuple[float, float]]) -> Iterator[Audio | None]:
    """Decodes parts of an audio track in one pass, in stereo; yields None for each span of a file without audio.

    Holds no more than the current span in memory, since the audio of a feature film is gigabytes. Spans beyond the
    ends of the track are filled with silence. Time and pieces are those of `read_audio`.

    Args:
        path: the file.
        spans: (start, duration) of each part in seconds, in order of their starts.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    chunks = _iter_chunks(path)
    following = next(chunks, None)
    if following is None:
        yield from (None for _ in spans)
        return
    rate = following.rate
    held: list[_Chunk] = []
    for start_s, duration_s in spans:
        first = round(start_s * rate)
        last = first + round(duration_s * rate)
        while following is not None and following.start < last:
            held = [chunk for chunk in (*held, following) if chunk.end > first]
            following = next(chunks, None)
        held = [chunk for chunk in held if chunk.end > first]
        stereo = [replace(chunk, samples=to_stereo(torch.from_numpy(chunk.samples)).numpy()) for chunk in held]
        yield Audio(torch.from_numpy(_assemble(stereo, first, last)), rate)


@dataclass(frozen=True)
class AudioInfo:
    """Properties of an audio track.

    Attributes:
        channels: of its first samples.
        sample_rate: of its first samples, Hz.
        duration_s: seconds, by the header; by decoding if that states none.
    """

    channels: int
    sample_rate: int
    duration_s: float


def probe_audio(path: str | Path) -> AudioInfo | None:
    """Reads the properties of the audio track of a file; None without audio, as for a track without samples.

    Decodes the first samples: the header of HE-AAC states half of their rate.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    with open_media(path) as container:
        stream = audio_stream(container, path)
        if stream is None:
            return None
        first = next((frame for frame in container.decode(stream) if frame.samples), None)
        if first is None:
            return None
        channels, rate = first.layout.nb_channels, first.sample_rate
        duration_s = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
    if not duration_s:
        audio = read_audio(path)
        duration_s = audio.duration_s if audio is not None else 0.0
    return AudioInfo(channels, rate, duration_s)


def has_audio(path: str | Path) -> bool:
    """Whether a file has an audio track that holds samples; one that cannot be decoded counts, and reading it raises.

    Raises:
        MediaError: the file is not a readable media file.
    """
    with open_media(path) as container:
        try:
            stream = audio_stream(container, path)
            return stream is not None and any(frame.samples for frame in container.decode(stream))
        except (MediaError, av.error.FFmpegError):
            return True


def to_stereo(waveform: Tensor) -> Tensor:
    """Mixes a waveform [C, N] to two channels [2, N].

    Mono is duplicated. 5.1 and 7.1: front 1, center and surround 0.707, normalized to sum 1 in each channel. Any other
    number of channels: their mean, duplicated.
    """
    channels = waveform.shape[0]
    if channels == 2:
        return waveform
    if channels in _STEREO_WEIGHTS:
        weights = torch.tensor(_STEREO_WEIGHTS[channels], dtype=waveform.dtype)
        return (weights / weights.sum(1, keepdim=True)) @ waveform
    return waveform.mean(0, keepdim=True).expand(2, -1)


def to_duration(audio: Audio, duration_s: float) -> Audio:
    """Cuts audio to a duration from its start, or pads it with silence at its end."""
    samples = round(duration_s * audio.sample_rate)
    # A negative padding cuts.
    return Audio(F.pad(audio.waveform, (0, samples - audio.waveform.shape[1])), audio.sample_rate)


@dataclass(frozen=True)
class _Chunk:
    """Decoded samples [C, N] and the index of the first, counted from time 0 at the rate of the whole."""

    start: int
    samples: np.ndarray
    rate: int

    @property
    def end(self) -> int:
        return self.start + self.samples.shape[1]


def _iter_chunks(path: str | Path) -> Iterator[_Chunk]:
    """Decodes the audio track at the rate of its first samples, each chunk at its time; nothing without audio."""
    with open_media(path) as container:
        origin_s = first_frame_s(container, path)
    with open_media(path) as container:
        stream = audio_stream(container, path)
        if stream is None:
            return
        rate, run = 0, None
        for frame in container.decode(stream):
            if not frame.samples:
                continue
            # The rate of the header is not that of the samples: HE-AAC doubles it.
            rate = rate or frame.sample_rate
            time_s = None if frame.pts is None else frame.pts * frame.time_base
            if origin_s is None:
                origin_s = time_s or Fraction(0)
            if run is None or not run.continues_with(frame, time_s):
                if run is not None:
                    yield from run.convert(None)
                start_s = run.end_s if time_s is None and run is not None else (time_s or Fraction(0)) - origin_s
                # Shifts below a millisecond are rounding of the container's clock.
                run = _Run(frame, Fraction(0) if abs(start_s) < _CLOCK_S else start_s, origin_s, rate)
            yield from run.convert(frame)
        if run is not None:
            yield from run.convert(None)


class _Run:
    """Consecutive frames of one format, without a gap, that one resampler converts to float samples at a rate."""

    def __init__(self, frame: av.AudioFrame, start_s: Fraction, origin_s: Fraction, rate: int) -> None:
        self.end_s = start_s
        self._origin_s = origin_s
        self._format = _format(frame)
        self._rate = rate
        self._next = round(start_s * rate)
        self._resampler = av.AudioResampler(format="fltp", rate=rate)

    def continues_with(self, frame: av.AudioFrame, time_s: Fraction | None) -> bool:
        """Whether a frame has the same format and starts where the run ends."""
        is_next = time_s is None or abs(time_s - self._origin_s - self.end_s) <= _GAP_S
        return is_next and _format(frame) == self._format

    def convert(self, frame: av.AudioFrame | None) -> Iterator[_Chunk]:
        """Converts a frame; None ends the run."""
        if frame is not None:
            self.end_s += Fraction(frame.samples, frame.sample_rate)
        for converted in self._resampler.resample(frame):
            samples = converted.to_ndarray()
            yield _Chunk(self._next, samples, self._rate)
            self._next += samples.shape[1]


def _format(frame: av.AudioFrame) -> tuple[int, str, str]:
    return frame.sample_rate, frame.layout.name, frame.format.name


def _assemble(chunks: Sequence[_Chunk], first: int, last: int) -> np.ndarray:
    """Samples [C, last - first] of chunks with equal channels, silent where there are none."""
    channels = chunks[0].samples.shape[0] if chunks else 2
    whole = np.zeros((channels, last - first), np.float32)
    for chunk in chunks:
        low, high = max(chunk.start, first), min(chunk.end, last)
        if low < high:
            whole[:, low - first : high - first] = chunk.samples[:, low - chunk.start : high - chunk.start]
    return whole
