"""Audio of audio and video files through PyAV: float waveforms, mixed down to stereo, cut to a length."""

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_titan.common.files import atomic_write
from ltx_titan.media.errors import MediaError
from ltx_titan.media.video import open_media

_SIDE = 0.707
# FFmpeg orders channels front left, front right, centre, bass, back left, back right, side left, side right. Bass is
# left out; weights of one side are normalised to sum 1.
_STEREO_WEIGHTS = {
    6: ((1, 0, _SIDE, 0, _SIDE, 0), (0, 1, _SIDE, 0, 0, _SIDE)),
    8: ((1, 0, _SIDE, 0, _SIDE, 0, _SIDE, 0), (0, 1, _SIDE, 0, 0, _SIDE, 0, _SIDE)),
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
    """Decode the first audio track of a file at its own rate, with all its channels; None where there is none.

    In a video, time 0 is that of its first frame: audio that begins earlier is cut, later audio has silence in front.

    Raises:
        MediaError: the file is not a readable media file, or its audio cannot be decoded.
    """
    with open_media(path) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        to_float = av.AudioResampler(format="fltp")
        chunks: list[np.ndarray] = []
        start_s = 0.0
        for frame in container.decode(stream):
            if not chunks and frame.pts is not None:
                start_s = float(frame.pts * frame.time_base)
            chunks += [converted.to_ndarray() for converted in to_float.resample(frame)]
        if not chunks:
            raise MediaError(path, "no audio can be decoded from its audio track")
        rate = stream.codec_context.sample_rate
        video = container.streams.video[0] if container.streams.video else None
        if video is not None and video.start_time is not None:
            start_s -= float(video.start_time * video.time_base)
        waveform = torch.from_numpy(np.concatenate(chunks, axis=1))
    shift = round(start_s * rate)
    # One AAC frame is 1,024 samples; smaller shifts than a millisecond are rounding of the container's clock.
    if abs(shift) > rate // 1000:
        waveform = F.pad(waveform, (shift, 0))
    return Audio(waveform, rate)


def to_stereo(waveform: Tensor) -> Tensor:
    """Mix a waveform [C, N] to two channels [2, N].

    Mono is doubled. 5.1 and 7.1: front 1, centre and surround 0.707, normalised to sum 1 on each side. Any other number
    of channels: their mean, doubled.
    """
    channels = waveform.shape[0]
    if channels == 2:
        return waveform
    if channels in _STEREO_WEIGHTS:
        weights = torch.tensor(_STEREO_WEIGHTS[channels], dtype=waveform.dtype)
        return (weights / weights.sum(1, keepdim=True)) @ waveform
    return waveform.mean(0, keepdim=True).expand(2, -1)


def to_duration(audio: Audio, duration_s: float) -> Audio:
    """Cut audio to a length from its start, or fill it up with silence at its end."""
    samples = round(duration_s * audio.sample_rate)
    return Audio(F.pad(audio.waveform, (0, samples - audio.waveform.shape[1])), audio.sample_rate)


def write_wav(path: str | Path, audio: Audio) -> None:
    """Writes a 16-bit WAV file atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        encode_wav(file, audio)


def encode_wav(file: BinaryIO, audio: Audio) -> None:
    """Writes 16-bit WAV bytes to a file object that is open for writing, such as `io.BytesIO()`."""
    samples = (audio.waveform.detach().float().cpu().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(file, "wb") as writer:
        writer.setnchannels(samples.shape[0])
        writer.setsampwidth(2)
        writer.setframerate(audio.sample_rate)
        writer.writeframes(samples.T.contiguous().numpy().tobytes())
