"""Decodes sampled latents to frames and audio, and writes them to files.

A clip with frames becomes an mp4, with its audio if it has any; a single frame a png; audio alone a wav.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ltx_titan.codecs import (
    AudioCodec,
    VideoCodec,
    Vocoder,
    load_audio_codec,
    load_video_codec,
    load_vocoder,
)
from ltx_titan.common.files import atomic_write
from ltx_titan.media import Audio, to_uint8, write_video, write_wav
from ltx_titan.validation.room import TILES, fitting_tiles, memory_left, with_tiles
from ltx_titan.validation.sampling import SampledLatents


@dataclass(frozen=True)
class Decoders:
    """Decoders of latents; None if no sample needs them."""

    video: VideoCodec | None
    audio: AudioCodec | None
    vocoder: Vocoder | None


@dataclass(frozen=True)
class DecodedSample:
    """Frames uint8 [F, H, W, 3] and audio of one sample; None for an absent stream."""

    frames: Tensor | None
    audio: Audio | None


def codec_dtype(device: str | torch.device) -> torch.dtype:
    """Dtype of video codecs: CPUs compute faster in float32; on a GPU bfloat16, as in preparation."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_decoders(
    video_path: str | Path | None,
    audio_path: str | Path | None,
    device: str | torch.device,
    tiling: bool = True,
    shapes: Sequence[torch.Size] = (),
) -> Decoders:
    """Loads the decoders: bfloat16 on a GPU, float32 on a CPU; the audio decoders always in float32.

    Args:
        video_path: file with the video VAE; None loads no video decoder.
        audio_path: file with the audio VAE and the vocoder; None loads no audio decoder.
        device: device of the decoders.
        tiling: decode video in overlapping tiles.
        shapes: of the video latents that will be decoded; tiles are then chosen for the memory that is left.
    """
    video = audio = vocoder = None
    if video_path is not None:
        video = load_video_codec(video_path, device, codec_dtype(device), part="decoder")
        if tiling:
            video = with_tiles(video, fitting_tiles(video, shapes, memory_left(device)) if shapes else TILES[0])
    if audio_path is not None:
        audio = load_audio_codec(audio_path, device, part="decoder")
        vocoder = load_vocoder(audio_path, device)
    return Decoders(video, audio, vocoder)


def decode_sample(latents: SampledLatents, decoders: Decoders, seed: int = 0) -> DecodedSample:
    """Decodes both streams of one sample.

    Args:
        latents: sampled latents.
        decoders: decoders of the sample's streams.
        seed: seed of the noise that decoders with timestep conditioning add.
    """
    frames = audio = None
    if latents.video is not None:
        assert decoders.video is not None, "a video needs a video decoder"
        # On the CPU, so that every device decodes the same clip.
        generator = torch.Generator().manual_seed(seed)
        frames = to_uint8(decoders.video.decode(latents.video, generator)[0]).cpu()
    if latents.audio is not None:
        assert decoders.audio is not None, "audio needs an audio decoder"
        assert decoders.vocoder is not None, "audio needs a vocoder"
        waveform = decoders.vocoder(decoders.audio.decode(latents.audio))[0].cpu()
        audio = Audio(waveform, decoders.vocoder.sample_rate)
    return DecodedSample(frames, audio)


def side_by_side(reference: Tensor, frames: Tensor, every: int = 1) -> Tensor:
    """Concatenates a reference and a result horizontally, frame by frame.

    The reference is resized to the result's height. With `every` > 1 its frame 0 is shown once and each later frame
    `every` times, and the last one is repeated at the end; otherwise a shorter reference is stretched over the result.

    Args:
        reference: uint8 [R, h, w, 3].
        frames: uint8 [F, H, W, 3].
        every: ratio between the frame rates of result and reference.

    Returns:
        uint8 [F, H, w', 3] with an even width.
    """
    count, height = frames.shape[:2]
    if every > 1:
        # Frame 0 is a latent frame of its own in a causal codec and was not subsampled.
        index = [0, *(1 + later // every for later in range(count - 1))]
        index = [min(frame, reference.shape[0] - 1) for frame in index]
    elif reference.shape[0] < count:
        index = torch.linspace(0, reference.shape[0] - 1, count).round().long().tolist()
    else:
        index = list(range(count))
    left = reference[index]
    if left.shape[1] != height:
        # Video encoders with 4:2:0 chroma need an even width.
        width = max(2, round(left.shape[2] * height / left.shape[1] / 2) * 2)
        # [F, H, W, 3] -> [F, 3, H, W] and back: torch resizes the last dims. Bicubic overshoots, hence the clamp.
        scaled = F.interpolate(left.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True)
        left = scaled.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return torch.cat([left, frames], dim=2)


def write_sample(folder: str | Path, name: str, decoded: DecodedSample, fps: float) -> Path:
    """Writes a sample atomically as `<name>.mp4`, `.png` or `.wav` and returns the path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frames, audio = decoded.frames, decoded.audio
    if frames is None:
        assert audio is not None, "a sample without any stream"
        path = folder / f"{name}.wav"
        write_wav(path, audio)
    elif frames.shape[0] == 1:
        path = folder / f"{name}.png"
        with atomic_write(path) as temporary:
            Image.fromarray(frames[0].numpy()).save(temporary, format="PNG")
    else:
        path = folder / f"{name}.mp4"
        # Containers store the frame rate as a small fraction, such as 30000/1001.
        rate = Fraction(fps).limit_denominator(100_000)
        waveform, sample_rate = (None, None) if audio is None else (audio.waveform, audio.sample_rate)
        write_video(path, frames, rate, waveform, sample_rate)
    return path
