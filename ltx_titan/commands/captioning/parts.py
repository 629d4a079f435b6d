"""Parts of a file that are sent to a captioning model: frames at even intervals, and the audio."""

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from ltx_titan.commands.captioning.text import AudioState, MediaKind
from ltx_titan.media import (
    Audio,
    MediaError,
    encode_wav,
    is_image,
    iter_frames,
    probe_video,
    read_audio,
    read_image,
    to_stereo,
)
from ltx_titan.tables.folders import AUDIO_SUFFIXES

# Sample rate of the audio encoders of multimodal models.
_SAMPLE_RATE = 16000


@dataclass(frozen=True)
class ClipParts:
    """A file as a captioning model receives it.

    Attributes:
        path: the file.
        kind: its media type.
        frames: (seconds from the start, frame) in order of time; empty for audio files.
        audio: mono at 16 kHz; None if no audio is sent.
        audio_state: whether audio is attached, absent or not sent.
    """

    path: Path
    kind: MediaKind
    frames: tuple[tuple[float, Image.Image], ...]
    audio: Audio | None
    audio_state: AudioState


def read_parts(path: Path, fps: float, max_frames: int, max_side: int, with_audio: bool) -> ClipParts:
    """Reads the parts of a file that are sent.

    Args:
        path: a video, an image or an audio file.
        fps: frames per second of video.
        max_frames: upper bound; longer videos get fewer frames per second.
        max_side: frames are reduced to this many pixels on their longer side.
        with_audio: whether audio is sent.

    Raises:
        MediaError: the file cannot be read, or is an audio file and audio is not sent.
    """
    if is_image(path):
        frame = _reduced(read_image(path)[0].numpy(), max_side)
        return ClipParts(path, "image", ((0.0, frame),), None, "absent")
    if path.suffix.lower() in AUDIO_SUFFIXES:
        audio = read_audio(path) if with_audio else None
        if audio is None:
            raise MediaError(path, "has no audio track" if with_audio else "is an audio file, and audio is not sent")
        return ClipParts(path, "audio", (), _to_mono(audio), "attached")
    info = probe_video(path)
    audio = read_audio(path) if with_audio and info.has_audio else None
    audio_state: AudioState = "absent"
    if audio is not None:
        audio_state = "attached"
    elif info.has_audio:
        audio_state = "not sent"
    duration_s = info.frames / info.fps
    count = max(1, min(info.frames, max_frames, math.ceil(duration_s * fps)))
    # The middle frames of equal parts, since first and last frames are often black.
    wanted = {info.frames * (2 * part + 1) // (2 * count) for part in range(count)}
    frames = tuple(
        (float(index / info.fps), _reduced(frame, max_side))
        # All frames are decoded, since seeking reaches key frames only.
        for index, frame in enumerate(iter_frames(path))
        if index in wanted
    )
    if not frames:
        raise MediaError(path, "no frame can be decoded")
    return ClipParts(path, "video", frames, None if audio is None else _to_mono(audio), audio_state)


def jpeg_url(frame: Image.Image) -> str:
    """A frame as a JPEG in a `data:` URL, as chat servers accept it."""
    buffer = io.BytesIO()
    # JPEG rather than PNG, which would make a request of 32 frames several times larger.
    frame.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def wav_base64(audio: Audio) -> str:
    """Audio as a 16-bit WAV file in base64."""
    buffer = io.BytesIO()
    encode_wav(buffer, audio)
    return base64.b64encode(buffer.getvalue()).decode()


def _reduced(frame: np.ndarray, max_side: int) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(frame))
    image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return image


def _to_mono(audio: Audio) -> Audio:
    # FFmpeg's resampler: ours needs the libraries of the audio VAE, which a client of a server does without.
    mixed = to_stereo(audio.waveform).mean(0, keepdim=True).contiguous().numpy()
    frame = av.AudioFrame.from_ndarray(mixed, format="fltp", layout="mono")
    frame.sample_rate = audio.sample_rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=_SAMPLE_RATE)
    # None flushes the samples that the filter holds back.
    chunks = [part.to_ndarray() for part in (*resampler.resample(frame), *resampler.resample(None))]
    return Audio(torch.from_numpy(np.concatenate(chunks, axis=1)), _SAMPLE_RATE)
