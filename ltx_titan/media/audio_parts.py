"""Audio of several stretches of one long file, decoded once and never held as a whole: a film's is gigabytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
import torch

from ltx_titan.media.audio import Audio, to_duration, to_stereo
from ltx_titan.media.errors import MediaError
from ltx_titan.media.video import open_media


def iter_audio_parts(path: str | Path, spans: Sequence[tuple[float, float]]) -> Iterator[Audio | None]:
    """Decode the audio of stretches of a video, in stereo; None for each where the file has no audio.

    Time 0 is that of the video's first frame, as in `read_audio`. What lies outside the audio track is silent.

    Args:
        path: the file.
        spans: (start, duration) of each in seconds, in order of their starts.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            yield from (None for _ in spans)
            return
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        video = container.streams.video[0] if container.streams.video else None
        origin_s = float(video.start_time * video.time_base) if video is not None and video.start_time else 0.0
        chunks = _chunks(container, stream, round(origin_s * rate), rate)
        held = _Held()
        for start_s, duration_s in spans:
            first = round(start_s * rate)
            last = first + round(duration_s * rate)
            held.drop_before(first)
            while held.end < last and (chunk := next(chunks, None)) is not None:
                held.add(*chunk)
                held.drop_before(first)
            part = held.take(first, last)
            if part is None:
                if not held.has_heard:
                    raise MediaError(path, "no audio can be decoded from its audio track")
                part = np.zeros((1, 1), np.float32)
            yield to_duration(Audio(to_stereo(torch.from_numpy(part)), rate), duration_s)


def _chunks(
    container: av.container.InputContainer, stream: av.AudioStream, origin: int, rate: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(first sample, samples [C, N]) of each decoded frame, in samples since the video's first frame."""
    to_float = av.AudioResampler(format="fltp")
    position = None
    for frame in container.decode(stream):
        if frame.pts is not None:
            stamped = round(float(frame.pts * frame.time_base) * rate) - origin
            # Container clocks round to a millisecond or so; only a real gap moves what follows.
            if position is None or abs(stamped - position) > rate // 20:
                position = stamped
        position = 0 if position is None else position
        for converted in to_float.resample(frame):
            samples = converted.to_ndarray()
            yield position, samples
            position += samples.shape[1]


class _Held:
    """The decoded samples that a later stretch may still need."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, np.ndarray]] = []
        self.end = -(2**62)
        self.has_heard = False

    def add(self, start: int, samples: np.ndarray) -> None:
        self._parts.append((start, samples))
        self.end = start + samples.shape[1]
        self.has_heard = True

    def drop_before(self, first: int) -> None:
        self._parts = [(start, samples) for start, samples in self._parts if start + samples.shape[1] > first]

    def take(self, first: int, last: int) -> np.ndarray | None:
        """Samples [C, last - first], silent where none were decoded; None where there are none at all."""
        parts = [
            (start, samples) for start, samples in self._parts if start < last and start + samples.shape[1] > first
        ]
        if not parts:
            return None
        taken = np.zeros((parts[0][1].shape[0], last - first), np.float32)
        for start, samples in parts:
            low, high = max(start, first), min(start + samples.shape[1], last)
            taken[:, low - first : high - first] = samples[:, low - start : high - start]
        return taken
