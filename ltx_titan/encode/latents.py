"""Encoding of pixels and audio to the fields of `latents/` and `audio_latents/`.

Audio of a clip is cut, or padded with silence, to the clip's F / fps seconds, and its latents to the
round(25 * F / fps) steps that sampling would generate for such a clip. So all clips of one bucket and rate have one
audio shape and can share a batch.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ltx_titan.codecs import AudioCodec, VideoCodec
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, AUDIO_STEPS_PER_SECOND, VIDEO_CHANNELS, Fields
from ltx_titan.media import Audio, to_duration, to_stereo


def encode_video(pixels: Tensor, fps: float, codec: VideoCodec) -> Fields:
    """Encodes a clip.

    Args:
        pixels: [3, F, H, W] in [-1, 1].
        fps: frames per second of these frames.
        codec: with an encoder.

    Returns:
        `latents` [128, F', H', W'] in bfloat16, their sizes, and the rate.
    """
    # bfloat16, as the reference trainer stores video latents, in half the size of float32.
    latents = codec.encode(pixels[None])[0].to(torch.bfloat16).cpu()
    frames, height, width = latents.shape[1:]
    return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": fps}


def encode_audio(audio: Audio | None, duration_s: float, codec: AudioCodec, keeps_length: bool = False) -> Fields:
    """Encodes the audio of a clip, or marks that there is none, which is not the same as silence.

    Args:
        audio: cut or padded with silence to the duration; None without audio. The zeros stored for it are a
            placeholder of the right size with `present = False`: in joint training they have no loss and are not
            attended to, and the sample's video is still used.
        duration_s: seconds.
        codec: with an encoder.
        keeps_length: as the reference trainer: audio is cut but not padded, and all steps of the encoder are kept.

    Returns:
        `latents` [8, round(25 * seconds), 16] in float32, their sizes, and the duration.
    """
    if keeps_length and audio is not None:
        duration_s = min(duration_s, audio.duration_s)
    steps, bins = codec.steps_for(duration_s), codec.mean.shape[2]
    fields: Fields = {"num_time_steps": steps, "frequency_bins": bins, "duration": duration_s}
    if audio is None:
        return {"latents": torch.zeros(codec.mean.shape[0], steps, bins), **fields, "present": False}
    # The encoder needs at least one spectrogram frame; a single video frame may be shorter.
    shortest_s = codec.mel.filter_length / codec.mel.sample_rate
    audio = to_duration(audio, max(duration_s, shortest_s))
    latents = codec.encode(to_stereo(audio.waveform)[None], audio.sample_rate)[0].cpu()
    # Centered STFT frames make the encoder return at least as many steps, often one more.
    assert latents.shape[1] >= steps
    if keeps_length:
        return {"latents": latents.contiguous(), **fields, "num_time_steps": latents.shape[1]}
    # A slice would keep the storage of the longer tensor, which `torch.save` writes in full.
    return {"latents": latents[:, :steps].contiguous(), **fields}


def audio_steps(duration_s: float) -> int:
    """Latent steps of audio of a duration, as `AudioCodec.steps_for` counts them, without a codec."""
    return max(1, round(AUDIO_STEPS_PER_SECOND * duration_s))


def rate_notes(audio: Audio, codec: AudioCodec) -> list[str]:
    """Losses that resampling to the rate of the audio VAE cannot restore, as plural phrases to be counted."""
    rate = codec.mel.sample_rate
    if audio.sample_rate >= rate:
        return []
    return [f"audio of less than {rate / 1000:g} kHz, resampled to it without the missing high frequencies"]


def longest_duration(durations_s: Sequence[float], own_s: float) -> float | None:
    """The longest of the durations that audio of `own_s` seconds reaches; None if it reaches none of them."""
    return max((duration for duration in durations_s if duration <= own_s), default=None)


def video_bytes(latent_size: tuple[int, int, int]) -> int:
    """Approximate size on disk of the video latents of a sample."""
    return VIDEO_CHANNELS * prod(latent_size) * torch.bfloat16.itemsize


def audio_bytes(steps: int) -> int:
    """Approximate size on disk of the audio latents of a sample."""
    return AUDIO_CHANNELS * AUDIO_BINS * steps * torch.float32.itemsize
