"""From sampled latents to pixels and audio, and to files to watch and hear.

A clip with frames becomes an mp4, with audio if there is any; a single frame a png; audio alone a wav.
"""

import os
from dataclasses import dataclass, replace
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
from ltx_titan.media import Audio, to_uint8, write_video, write_wav
from ltx_titan.validation.sampling import SampledLatents

# Tiles of the released pipelines: 768 pixels of a side, of which 64 are in the next tile too, and 81 frames, of which
# 24 are; in latent frames that is 11, and 7 from tile to tile.
_TILE_SIZE, _TILE_STRIDE = 768, 704
_TIME_TILES = (11, 7)


@dataclass(frozen=True)
class Decoders:
    """What turns latents into pixels and audio; None where no sample needs it."""

    video: VideoCodec | None
    audio: AudioCodec | None
    vocoder: Vocoder | None


@dataclass(frozen=True)
class DecodedSample:
    """Frames uint8 [F, H, W, 3] and audio of one sample; None where it has none."""

    frames: Tensor | None
    audio: Audio | None


def load_decoders(
    video_path: str | Path | None, audio_path: str | Path | None, device: str | torch.device, tiling: bool = True
) -> Decoders:
    """Loads the decoders: bfloat16 on a GPU, float32 on a CPU; those of audio always in float32.

    Args:
        video_path: file with the video VAE, None where no video is decoded.
        audio_path: file with the audio VAE and the vocoder, None where no audio is decoded.
        device: where they run.
        tiling: decode video in overlapping tiles.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    video = audio = vocoder = None
    if video_path is not None:
        video = load_video_codec(video_path, device, dtype, part="decoder")
        if tiling:
            video.vae.enable_tiling(
                tile_sample_min_height=_TILE_SIZE,
                tile_sample_min_width=_TILE_SIZE,
                tile_sample_stride_height=_TILE_STRIDE,
                tile_sample_stride_width=_TILE_STRIDE,
            )
            video = replace(video, time_tiles=_TIME_TILES)
    if audio_path is not None:
        audio = load_audio_codec(audio_path, device, part="decoder")
        vocoder = load_vocoder(audio_path, device)
    return Decoders(video, audio, vocoder)


def decode_sample(latents: SampledLatents, decoders: Decoders, seed: int = 0) -> DecodedSample:
    """Decodes both streams of one sample.

    Args:
        latents: what was sampled.
        decoders: of the streams that it has.
        seed: of the noise that decoders with timestep conditioning add.
    """
    frames = audio = None
    if latents.video is not None:
        assert decoders.video is not None, "a video needs a video decoder"
        generator = torch.Generator().manual_seed(seed)
        frames = to_uint8(decoders.video.decode(latents.video, generator)[0]).cpu()
    if latents.audio is not None:
        assert decoders.audio is not None, "audio needs an audio decoder"
        assert decoders.vocoder is not None, "audio needs a vocoder"
        waveform = decoders.vocoder(decoders.audio.decode(latents.audio))[0].cpu()
        audio = Audio(waveform, decoders.vocoder.sample_rate)
    return DecodedSample(frames, audio)


def put_beside(reference: Tensor, frames: Tensor, every: int = 1) -> Tensor:
    """A reference to the left of a result, in one picture.

    The reference is scaled to the result's height. Its frame 0 is shown once and each later one `every` times; a
    shorter one is stretched over the result's length, a missing rest repeats its last frame.

    Args:
        reference: uint8 [R, h, w, 3].
        frames: uint8 [F, H, W, 3].
        every: temporal factor of the reference.

    Returns:
        uint8 [F, H, w', 3] with an even width.
    """
    count, height = frames.shape[:2]
    if every > 1:
        index = [0, *(1 + place // every for place in range(count - 1))]
        index = [min(place, reference.shape[0] - 1) for place in index]
    elif reference.shape[0] < count:
        index = torch.linspace(0, reference.shape[0] - 1, count).round().long().tolist()
    else:
        index = list(range(count))
    left = reference[index]
    if left.shape[1] != height:
        width = max(2, round(left.shape[2] * height / left.shape[1] / 2) * 2)
        scaled = F.interpolate(left.permute(0, 3, 1, 2).float(), (height, width), mode="bicubic", antialias=True)
        left = scaled.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return torch.cat([left, frames], dim=2)


def write_sample(folder: str | Path, name: str, decoded: DecodedSample, fps: float) -> Path:
    """Writes a sample as `<name>.mp4`, `.png` or `.wav` and returns the file; complete or not there at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frames, audio = decoded.frames, decoded.audio
    if frames is None:
        assert audio is not None, "a sample without any stream"
        path = folder / f"{name}.wav"
        write_wav(path, audio)
    elif frames.shape[0] == 1:
        path = folder / f"{name}.png"
        temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
        Image.fromarray(frames[0].numpy()).save(temporary, format="PNG")
        temporary.rename(path)
    else:
        path = folder / f"{name}.mp4"
        rate = Fraction(fps).limit_denominator(100_000)
        write_video(
            path, frames, rate, None if audio is None else audio.waveform, None if audio is None else audio.sample_rate
        )
    return path
