"""Stage: videos and still images to `latents/`, and their sound to `audio_latents/`.

A clip gives its first F frames, where F comes from the bucket that suits it; its frame rate is kept, not changed. Its
sound is cut, or filled up with silence, to F / fps seconds, and its latents to the round(25 * F / fps) steps that
sampling would make for such a clip, so that all clips of one bucket and rate have one audio shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltx_titan.codecs import AudioCodec, VideoCodec
from ltx_titan.data import write_sample
from ltx_titan.data.layout import Value
from ltx_titan.media import (
    MediaError,
    Sound,
    fit_frames,
    is_image,
    probe_video,
    read_clip,
    read_image,
    read_sound,
    to_duration,
    to_stereo,
)
from ltx_titan.preprocess.buckets import Bucket, choose_bucket
from ltx_titan.preprocess.report import Report
from ltx_titan.preprocess.rows import Sample
from ltx_titan.preprocess.store import is_whole

# A still image lasts one second on the time axis of the positions, as in published data sets.
_IMAGE_FPS = 1.0


@dataclass(frozen=True)
class _Clip:
    pixels: torch.Tensor
    fps: float


def video_is_done(sample: Sample, output: Path, with_sound: bool) -> bool:
    """Whether the latents of a sample are there and, if wanted, those of its sound."""
    folders = ("latents", "audio_latents") if with_sound else ("latents",)
    return all(is_whole(output / folder / sample.key) for folder in folders)


def process_videos(
    samples: Sequence[Sample],
    output: Path,
    video_codec: VideoCodec,
    audio_codec: AudioCodec | None,
    buckets: Sequence[Bucket],
    report: Report,
) -> list[Sample]:
    """Encode videos and images.

    Args:
        samples: with a video or image each.
        output: root of the prepared data.
        video_codec: with an encoder.
        audio_codec: with an encoder, or None to leave the sound of videos alone.
        buckets: shapes to choose from.
        report: told about every sample.

    Returns:
        The samples that worked.
    """
    usable = []
    with report.progress("videos", len(samples)) as bar:
        for sample in samples:
            try:
                _process(sample, output, video_codec, audio_codec, buckets, report)
            except (MediaError, OSError) as error:
                report.fail("videos", str(sample.media), error.reason if isinstance(error, MediaError) else str(error))
            else:
                report.add("videos", "done")
                usable.append(sample)
            bar.advance()
    return usable


def _process(
    sample: Sample,
    output: Path,
    video_codec: VideoCodec,
    audio_codec: AudioCodec | None,
    buckets: Sequence[Bucket],
    report: Report,
) -> None:
    assert sample.video is not None
    clip = _read(sample.video, buckets)
    # Sound first: latents without their sound would look finished to a run with --skip-audio.
    if audio_codec is not None:
        duration_s = clip.pixels.shape[1] / clip.fps
        sound = None if is_image(sample.video) else read_sound(sample.video)
        if sound is None:
            report.notes["videos and images without sound"] += 1
            audio = absent_audio_fields(duration_s, audio_codec)
        else:
            if sound.duration_s < duration_s - 1 / clip.fps:
                report.notes["sounds shorter than their video, filled up with silence"] += 1
            audio = audio_fields(sound, duration_s, audio_codec)
        write_sample(output / "audio_latents" / sample.key, audio)
    write_sample(output / "latents" / sample.key, latent_fields(clip.pixels, clip.fps, video_codec))


def latent_fields(pixels: torch.Tensor, fps: float, codec: VideoCodec) -> dict[str, Value]:
    """Fields of a video sample.

    Args:
        pixels: [3, F, H, W] in [-1, 1].
        fps: frames per second of these frames.
        codec: with an encoder.
    """
    latents = codec.encode(pixels[None])[0].to(torch.bfloat16).cpu()
    frames, height, width = latents.shape[1:]
    return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": fps}


def audio_fields(sound: Sound, duration_s: float, codec: AudioCodec) -> dict[str, Value]:
    """Fields of an audio sample.

    Args:
        sound: cut, or filled up with silence, to the duration.
        duration_s: seconds.
        codec: with an encoder.

    Returns:
        `latents` [8, round(25 * seconds), 16] in float32, their sizes, and the duration.
    """
    # One spectrogram frame is the least that can be encoded; a single video frame may be shorter.
    shortest_s = codec.mel.filter_length / codec.mel.sample_rate
    sound = to_duration(sound, max(duration_s, shortest_s))
    latents = codec.encode(to_stereo(sound.waveform)[None], sound.sample_rate)[0].cpu()
    steps = codec.steps_for(duration_s)
    # Centred frames make the encoder return at least as many steps, often one more.
    assert latents.shape[1] >= steps
    return {
        "latents": latents[:, :steps].contiguous(),
        "num_time_steps": steps,
        "frequency_bins": latents.shape[2],
        "duration": duration_s,
    }


def absent_audio_fields(duration_s: float, codec: AudioCodec) -> dict[str, Value]:
    """Fields that say that a sample has no sound, as opposed to silence.

    The zeros are a stand-in of the right size, marked `present = False`: in training on video and sound together they
    have no loss and nothing attends to them, and the sample's video is not lost to it.
    """
    steps, channels, bins = codec.steps_for(duration_s), codec.mean.shape[0], codec.mean.shape[2]
    return {
        "latents": torch.zeros(channels, steps, bins),
        "num_time_steps": steps,
        "frequency_bins": bins,
        "duration": duration_s,
        "present": False,
    }


def _read(path: Path, buckets: Sequence[Bucket]) -> _Clip:
    """Read an image or the first frames of a video at the size of its bucket."""
    if is_image(path):
        image = read_image(path)
        bucket = _bucket(path, buckets, width=image.shape[2], height=image.shape[1], frames=1)
        return _Clip(fit_frames(image, bucket.width, bucket.height), _IMAGE_FPS)
    info = probe_video(path)
    bucket = _bucket(path, buckets, info.width, info.height, info.frames)
    return _Clip(read_clip(path, bucket.frames, bucket.width, bucket.height), float(info.fps))


def _bucket(path: Path, buckets: Sequence[Bucket], width: int, height: int, frames: int) -> Bucket:
    bucket = choose_bucket(buckets, width, height, frames)
    if bucket is None:
        shortest = min(bucket.frames for bucket in buckets)
        remedy = "add a bucket of 1 frame for still images" if frames == 1 else "add a shorter bucket"
        raise MediaError(path, f"has {frames} frame(s), the shortest bucket needs {shortest}; {remedy}")
    return bucket
