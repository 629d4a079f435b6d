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

_LEVEL = 0.707  # -3 dB
# FFmpeg's name of a channel -> its weights in left and right. As in ITU-R BS.775, without LFE; a back center is a
# surround channel of both sides, a height channel one of its side.
_STEREO_WEIGHTS = {
    **dict.fromkeys(("FL", "DL"), (1.0, 0.0)),
    **dict.fromkeys(("FR", "DR"), (0.0, 1.0)),
    **dict.fromkeys(("FC", "TFC", "TC"), (_LEVEL, _LEVEL)),
    **dict.fromkeys(("BL", "SL", "FLC", "WL", "TFL", "TBL", "TSL"), (_LEVEL, 0.0)),
    **dict.fromkeys(("BR", "SR", "FRC", "WR", "TFR", "TBR", "TSR"), (0.0, _LEVEL)),
    **dict.fromkeys(("BC", "TBC"), (_LEVEL**2, _LEVEL**2)),
    # The omnidirectional channel of Ambisonics; the others are differences between directions.
    "AMBI0": (1.0, 1.0),
}
# Layouts of numbers of channels without one; other numbers are averaged.
_USUAL_CHANNELS = {6: ("FL", "FR", "FC", "LFE", "BL", "BR"), 8: ("FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR")}

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
    """Decodes the audio track of a file at its own sample rate, in mono or stereo; None without audio.

    More channels are mixed to stereo by their layout (see `to_stereo`).

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


def to_stereo(waveform: Tensor, layout: Sequence[str] = ()) -> Tensor:
    """Mixes a waveform [C, N] to two channels [2, N].

    Mono is duplicated. Of more channels each has the weight of its position, front 1, center and surround 0.707, back
    center 0.5, LFE 0, normalized to sum 1 in each output. Without a layout 6 and 8 channels are 5.1 and 7.1, and the
    mean of other numbers is duplicated.

    Args:
        waveform: the channels.
        layout: FFmpeg's names of the channels' positions, such as ("FL", "FR", "FC").
    """
    channels = waveform.shape[0]
    layout = layout or _USUAL_CHANNELS.get(channels, ())
    if channels == 1 or (channels == 2 and set(layout) <= {"FL", "FR"}):
        return waveform.expand(2, -1)
    # [C, 2]
    weights = torch.tensor([_STEREO_WEIGHTS.get(name, (0.0, 0.0)) for name in layout], dtype=waveform.dtype)
    # Also where a layout names none of a side's channels.
    if not layout or not weights.sum(0).all():
        return waveform.mean(0, keepdim=True).expand(2, -1)
    return (weights / weights.sum(0)).mT @ waveform


def to_duration(audio: Audio, duration_s: float) -> Audio:
    """Cuts audio to a duration from its start, or pads it with silence at its end."""
    samples = round(duration_s * audio.sample_rate)
    # A negative padding cuts.
    return Audio(F.pad(audio.waveform, (0, samples - audio.waveform.shape[1])), audio.sample_rate)


def after_time(audio: Audio, start_s: float | Fraction) -> Audio | None:
    """Audio from a time in seconds on; None if it ends before."""
    waveform = audio.waveform[:, round(start_s * audio.sample_rate) :]
    return Audio(waveform, audio.sample_rate) if waveform.shape[1] else None


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
        # A file may state no positions.
        self._layout = tuple(channel.name for channel in frame.layout.channels if channel.name != "NONE")
        # Interleaved: PyAV reads past the last of eight planes, which ends the process.
        self._resampler = av.AudioResampler(format="flt", rate=rate)

    def continues_with(self, frame: av.AudioFrame, time_s: Fraction | None) -> bool:
        """Whether a frame has the same format and starts where the run ends."""
        is_next = time_s is None or abs(time_s - self._origin_s - self.end_s) <= _GAP_S
        return is_next and _format(frame) == self._format

    def convert(self, frame: av.AudioFrame | None) -> Iterator[_Chunk]:
        """Converts a frame; None ends the run."""
        if frame is not None:
            self.end_s += Fraction(frame.samples, frame.sample_rate)
        for converted in self._resampler.resample(frame):
            samples = np.ascontiguousarray(converted.to_ndarray().reshape(-1, converted.layout.nb_channels).T)
            # Two channels need not be left and right: center and LFE, for example.
            if samples.shape[0] > 1:
                samples = to_stereo(torch.from_numpy(samples), self._layout).numpy()
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
