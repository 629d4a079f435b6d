"""Audio of audio and video files through PyAV: float waveforms, mixed down to stereo, cut to a duration.

In a video, time 0 of the audio is that of the first video frame, in both readers: `read_audio` for a whole file,
`iter_audio_parts` for parts of a file whose audio does not fit in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.container import InputContainer
from torch import Tensor

from ltx_titan.media.container import MediaError, open_media, video_start_s

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
    """Decodes the first audio track of a file at its own sample rate, with all its channels; None without a track.

    In a video, audio that starts before the first frame is cut, audio that starts later is padded with silence.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        chunks: list[np.ndarray] = []
        start_s = 0.0
        for time_s, samples in _decode(container, stream):
            if not chunks and time_s is not None:
                start_s = time_s
            chunks.append(samples)
        if not chunks:
            raise MediaError(path, "no audio can be decoded from its audio track")
        # Known for certain only after decoding: HE-AAC doubles the rate of its header.
        rate = stream.codec_context.sample_rate
        start_s -= float(video_start_s(container))
        waveform = torch.from_numpy(np.concatenate(chunks, axis=1))
    shift = round(start_s * rate)
    # One AAC frame is 1,024 samples; shifts below a millisecond are rounding of the container's clock.
    if abs(shift) > rate // 1000:
        waveform = F.pad(waveform, (shift, 0))
    return Audio(waveform, rate)


def iter_audio_parts(path: str | Path, spans: Sequence[tuple[float, float]]) -> Iterator[Audio | None]:
    """Decodes parts of an audio track in one pass, in stereo; yields None for each span of a file without audio.

    Holds no more than the current span in memory, since the audio of a feature film is gigabytes. Spans beyond the
    ends of the track are filled with silence.

    Args:
        path: the file.
        spans: (start, duration) of each part in seconds, in order of their starts.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            yield from (None for _ in spans)
            return
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        chunks = _locate(container, stream, round(float(video_start_s(container)) * rate), rate)
        window = _Window()
        for start_s, duration_s in spans:
            first = round(start_s * rate)
            last = first + round(duration_s * rate)
            window.drop_before(first)
            while window.end < last and (chunk := next(chunks, None)) is not None:
                window.add(*chunk)
                window.drop_before(first)
            part = window.cut(first, last)
            if part is None:
                if window.is_empty_track:
                    raise MediaError(path, "no audio can be decoded from its audio track")
                part = np.zeros((1, 1), np.float32)
            yield to_duration(Audio(to_stereo(torch.from_numpy(part)), rate), duration_s)


def probe_duration_s(path: str | Path) -> float:
    """Reads the duration of an audio track from its header; decodes it if the header has none.

    Raises:
        MediaError: the file is not a readable media file, or has no audio track.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            raise MediaError(path, "has no audio track")
        stream = container.streams.audio[0]
        if stream.duration is not None and stream.time_base is not None:
            return float(stream.duration * stream.time_base)
    audio = read_audio(path)
    assert audio is not None
    return audio.duration_s


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


def _decode(container: InputContainer, stream: av.AudioStream) -> Iterator[tuple[float | None, np.ndarray]]:
    """Decoded frames: (time stamp in seconds or None, float32 samples [C, N])."""
    to_float = av.AudioResampler(format="fltp")
    for frame in container.decode(stream):
        time_s = None if frame.pts is None else float(frame.pts * frame.time_base)
        for converted in to_float.resample(frame):
            yield time_s, converted.to_ndarray()


def _locate(
    container: InputContainer, stream: av.AudioStream, origin: int, rate: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Decoded frames: (index of the first sample counted from `origin`, samples [C, N])."""
    position = None
    for time_s, samples in _decode(container, stream):
        if time_s is not None:
            stamped = round(time_s * rate) - origin
            # Container clocks round to a millisecond or so; only a real gap moves what follows.
            if position is None or abs(stamped - position) > rate // 20:
                position = stamped
        position = 0 if position is None else position
        yield position, samples
        position += samples.shape[1]


class _Window:
    """The decoded samples that the current or a later span may need."""

    def __init__(self) -> None:
        self._chunks: list[tuple[int, np.ndarray]] = []
        self.end = -(2**62)
        self.is_empty_track = True

    def add(self, start: int, samples: np.ndarray) -> None:
        self._chunks.append((start, samples))
        self.end = start + samples.shape[1]
        self.is_empty_track = False

    def drop_before(self, first: int) -> None:
        self._chunks = [(start, samples) for start, samples in self._chunks if start + samples.shape[1] > first]

    def cut(self, first: int, last: int) -> np.ndarray | None:
        """Samples [C, last - first], silent where none were decoded; None if no chunk overlaps."""
        chunks = [
            (start, samples) for start, samples in self._chunks if start < last and start + samples.shape[1] > first
        ]
        if not chunks:
            return None
        part = np.zeros((chunks[0][1].shape[0], last - first), np.float32)
        for start, samples in chunks:
            low, high = max(start, first), min(start + samples.shape[1], last)
            part[:, low - first : high - first] = samples[:, low - start : high - start]
        return part
