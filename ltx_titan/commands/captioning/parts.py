"""What a captioning model gets of a file: some frames, evenly over time, and the sound."""

import base64
import io
import math
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import av
import numpy as np
import torch
from PIL import Image

from ltx_titan.commands.captioning.text import Heard
from ltx_titan.commands.files import AUDIO_SUFFIXES
from ltx_titan.media import Audio, MediaError, is_image, iter_frames, probe_video, read_audio, read_image, to_stereo

# What the audio encoders of multimodal models work at.
_SOUND_RATE = 16000


@dataclass(frozen=True)
class ClipParts:
    """A file as a model gets it.

    Attributes:
        path: the file.
        kind: what it is.
        frames: (seconds from the start, picture) in order of time; none for a sound.
        sound: mono at 16 kHz; None where it is not sent.
        heard: what the model is told of the sound.
    """

    path: Path
    kind: Literal["video", "image", "sound"]
    frames: tuple[tuple[float, Image.Image], ...]
    sound: Audio | None
    heard: Heard


def read_parts(path: Path, fps: float, max_frames: int, max_side: int, with_sound: bool) -> ClipParts:
    """Read what is sent of a file.

    Args:
        path: a video, an image or a sound.
        fps: pictures for each second of video.
        max_frames: at most; longer videos get fewer for each second.
        max_side: pictures are made smaller to this many pixels on their longer side.
        with_sound: whether the model can hear.

    Raises:
        MediaError: the file cannot be read, or is a sound for a model that cannot hear.
    """
    if is_image(path):
        return ClipParts(path, "image", ((0.0, _picture(read_image(path)[0].numpy(), max_side)),), None, "silence")
    if path.suffix.lower() in AUDIO_SUFFIXES:
        sound = read_audio(path) if with_sound else None
        if sound is None:
            raise MediaError(path, "has no sound track" if with_sound else "is a sound, and sound is not sent")
        return ClipParts(path, "sound", (), _mono(sound), "sound")
    info = probe_video(path)
    sound = read_audio(path) if with_sound and info.has_audio else None
    heard: Heard = "sound" if sound is not None else "unknown" if info.has_audio else "silence"
    duration_s = info.frames / info.fps
    count = max(1, min(info.frames, max_frames, math.ceil(duration_s * fps)))
    # The middles of equal parts: first and last frames are often black.
    wanted = {info.frames * (2 * part + 1) // (2 * count) for part in range(count)}
    frames = tuple(
        (float(index / info.fps), _picture(frame, max_side))
        for index, frame in enumerate(iter_frames(path))
        if index in wanted
    )
    if not frames:
        raise MediaError(path, "no frame can be decoded")
    return ClipParts(path, "video", frames, None if sound is None else _mono(sound), heard)


def jpeg_url(picture: Image.Image) -> str:
    """A picture as a `data:` address, as chat servers take it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def wav_base64(sound: Audio) -> str:
    """A sound as a 16-bit WAV file, in base64."""
    buffer = io.BytesIO()
    samples = (sound.waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(sound.sample_rate)
        file.writeframes(samples.T.contiguous().numpy().tobytes())
    return base64.b64encode(buffer.getvalue()).decode()


def _picture(frame: np.ndarray, max_side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(frame))
    picture.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    return picture


def _mono(sound: Audio) -> Audio:
    # FFmpeg's resampler: ours comes with the audio VAE's libraries, which a captioner behind a server needs none of.
    mixed = to_stereo(sound.waveform).mean(0, keepdim=True).contiguous().numpy()
    frame = av.AudioFrame.from_ndarray(mixed, format="fltp", layout="mono")
    frame.sample_rate = sound.sample_rate
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=_SOUND_RATE)
    chunks = [part.to_ndarray() for part in (*resampler.resample(frame), *resampler.resample(None))]
    return Audio(torch.from_numpy(np.concatenate(chunks, axis=1)), _SOUND_RATE)
