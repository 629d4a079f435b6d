"""Stage: videos and still images to `latents/`, and their audio to `audio_latents/`.

A clip gives its first F frames, where F comes from the bucket that suits it; its frame rate is kept unless another is
asked for. Its audio is cut, or filled up with silence, to F / fps seconds, and its latents to the round(25 * F / fps)
steps that sampling would make for such a clip, so that all clips of one bucket and rate have one audio shape.
"""

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ltx_titan.codecs import AudioCodec, VideoCodec
from ltx_titan.commands.process.stage import Output, Plan, Stage
from ltx_titan.commands.report import Report
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, AUDIO_STEPS_PER_SECOND, VIDEO_CHANNELS, Value
from ltx_titan.encode.audio import absent_audio_fields, audio_fields
from ltx_titan.encode.clips import Clip, ClipRules, plan_clip, read_pixels
from ltx_titan.media import Audio, is_image, read_audio
from ltx_titan.media.tables import SampleRow


def video_stage(
    rules: ClipRules,
    report: Report,
    load_video: Callable[[], VideoCodec],
    load_audio: Callable[[], AudioCodec] | None,
) -> Stage:
    """The stage that encodes videos and images.

    Args:
        rules: how clips are brought to a shape.
        report: told what is out of the ordinary.
        load_video: loads a video codec with an encoder.
        load_audio: loads an audio codec with an encoder; None leaves the audio of videos alone.
    """

    def plan(sample: SampleRow) -> Plan:
        clip = plan_clip(_video(sample), rules)
        steps = max(1, round(AUDIO_STEPS_PER_SECOND * clip.duration_s)) if load_audio else 0
        size = latent_bytes(clip, rules) + audio_bytes(steps)
        return Plan(str(clip), size)

    def read(sample: SampleRow) -> tuple[Clip, Tensor, Audio | None]:
        path = _video(sample)
        clip = plan_clip(path, rules)
        pixels = read_pixels(path, clip, rules, sample.key)
        audio = read_audio(path) if load_audio and not is_image(path) else None
        return clip, pixels, audio

    def load() -> Callable[[SampleRow, tuple[Clip, Tensor, Audio | None]], Output]:
        video_codec, audio_codec = load_video(), load_audio() if load_audio else None

        def encode(sample: SampleRow, item: tuple[Clip, Tensor, Audio | None]) -> Output:
            clip, pixels, audio = item
            if clip.repeats_frames:
                report.notes["videos slower than the frame rate asked for, whose frames were repeated"] += 1
            latents = latent_fields(pixels, float(clip.fps), video_codec)
            if audio_codec is None:
                return {"latents": latents}
            # Audio first: latents without their audio would look finished to a run with --skip-audio.
            return {"audio_latents": _audio(clip, audio, audio_codec, report), "latents": latents}

        return encode

    folders = ("latents", "audio_latents") if load_audio else ("latents",)
    return Stage("videos", folders, lambda sample: str(sample.media), plan, read, load)


def latent_fields(pixels: Tensor, fps: float, codec: VideoCodec) -> dict[str, Value]:
    """Fields of a video sample.

    Args:
        pixels: [3, F, H, W] in [-1, 1].
        fps: frames per second of these frames.
        codec: with an encoder.
    """
    latents = codec.encode(pixels[None])[0].to(torch.bfloat16).cpu()
    frames, height, width = latents.shape[1:]
    return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": fps}


def latent_bytes(clip: Clip, rules: ClipRules) -> int:
    """Size of a video sample on disk, about."""
    return VIDEO_CHANNELS * prod(clip.latent_size(rules.scale_factors)) * 2


def audio_bytes(steps: int) -> int:
    """Size of an audio sample on disk, about."""
    return AUDIO_CHANNELS * AUDIO_BINS * steps * 4


def _video(sample: SampleRow) -> Path:
    assert sample.video is not None
    return sample.video


def _audio(clip: Clip, audio: Audio | None, codec: AudioCodec, report: Report) -> dict[str, Value]:
    if audio is None:
        report.notes["videos and images without audio"] += 1
        return absent_audio_fields(clip.duration_s, codec)
    if audio.duration_s < clip.duration_s - 1 / clip.fps:
        report.notes["audio shorter than their video, filled up with silence"] += 1
    return audio_fields(audio, clip.duration_s, codec)
