"""Encodes the media files of a sample's conditions into the initial tokens of its streams.

Runs once, before training, and only for the samples of this rank's group; the encoders are then freed. Clips are read
from their start, scaled to cover the sample's size and center-cropped, as training data is.
"""

import logging
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ltx_titan.codecs import AudioCodec, VideoCodec
from ltx_titan.conditioning import (
    Batch,
    FlexibleStrategy,
    StreamTokens,
    audio_steps,
    conditioned_tokens,
    latent_grid,
    video_grid,
)
from ltx_titan.conditioning.conditioned import reference_factors, span_bounds
from ltx_titan.config.streams import Reference, Span, SpatialCrop
from ltx_titan.config.validation import (
    AudioToVideo,
    SampleCondition,
    SampleFirstFrame,
    SampleKeyframe,
    SampleMask,
    SamplePrefix,
    SampleReference,
    SampleSpatialCrop,
    SampleSuffix,
    ValidationSample,
    VideoToAudio,
)
from ltx_titan.data.layout import DEFAULT_FPS
from ltx_titan.media import (
    Audio,
    MediaError,
    fit_frames,
    is_image,
    is_same_rate,
    iter_frames,
    probe_video,
    read_audio,
    read_audio_mask,
    read_image,
    read_video_mask,
    to_duration,
    to_stereo,
    to_uint8,
)
from ltx_titan.validation.start import (
    audio_start,
    condition_frames,
    condition_where,
    dataset_starts,
    freeze,
    video_start,
    with_audio_reference,
    with_video_reference,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipShape:
    """Size of a sample: pixels, pixel frames and frames per second."""

    width: int
    height: int
    frames: int
    fps: float

    @property
    def duration_s(self) -> float:
        """Seconds."""
        return self.frames / self.fps

    def scaled_down(self, scale: float) -> "ClipShape":
        """The shape with `scale` times fewer rows and columns, a whole number of each."""
        return ClipShape(int(self.width / scale), int(self.height / scale), self.frames, self.fps)


@dataclass(frozen=True)
class Encoders:
    """Encoders from media to latents; None if no condition needs one.

    Attributes:
        video: video VAE with its encoder.
        audio: audio VAE with its encoder.
        scale_factors: compression factors of the video codec (time, height, width).
        marks_first_frame: whether the model has an embedding for tokens of a single pixel frame.
    """

    video: VideoCodec | None
    audio: AudioCodec | None
    scale_factors: tuple[int, int, int]
    marks_first_frame: bool = False


@dataclass(frozen=True)
class EncodedSample:
    """Initial tokens of both streams, None for an absent one, and frames to show next to the result.

    Attributes:
        video: tokens of the video stream.
        audio: tokens of the audio stream.
        reference_frames: frames of the video reference to show next to the result, uint8 [F, H, W, 3], or None.
        reference_temporal_scale: frames of the result per frame of the reference, after the first.
        reference_latents: latents of a reference that is decoded to be shown, instead of `reference_frames`
            [1, C, F, H, W], or None.
    """

    video: StreamTokens | None
    audio: StreamTokens | None
    reference_frames: Tensor | None = None
    reference_temporal_scale: int = 1
    reference_latents: Tensor | None = None


def needed_encoders(samples: tuple[ValidationSample, ...]) -> tuple[bool, bool]:
    """Whether any condition is on video, and whether any is on audio."""
    streams = {condition.stream for sample in samples for condition in sample.conditions}
    return "video" in streams, "audio" in streams


def encode_sample(
    sample: ValidationSample, shape: ClipShape, streams: tuple[str, ...], encoders: Encoders
) -> EncodedSample:
    """Encodes the conditions of a sample.

    Args:
        sample: its conditions.
        shape: its size.
        streams: those it has, generated or frozen.
        encoders: for the streams with conditions.

    Raises:
        MediaError: a file cannot be read, or is too short; with its name.
    """
    starts: dict[str, StreamTokens] = {}
    if "video" in streams:
        grid = video_grid(shape.frames, shape.height, shape.width, encoders.scale_factors)
        starts["video"] = video_start(
            grid, shape.fps, encoders.scale_factors, marks_first_frame=encoders.marks_first_frame
        )
    if "audio" in streams:
        # At least one step: a single frame at 60 fps lasts less than half a latent step.
        starts["audio"] = audio_start(max(1, audio_steps(shape.duration_s)))
    reference_frames, temporal_scale = None, 1
    # References last: their factors and positions follow from the whole target.
    for condition in sorted(sample.conditions, key=lambda condition: condition.type == "reference"):
        if condition.stream == "audio":
            starts["audio"] = _with_audio(starts["audio"], condition, shape, encoders.audio)
            continue
        starts["video"], pixels = _with_video(starts["video"], condition, shape, encoders)
        if isinstance(condition, SampleReference) and condition.include_in_output:
            reference_frames, temporal_scale = to_uint8(pixels), condition.temporal_scale_factor
    return EncodedSample(starts.get("video"), starts.get("audio"), reference_frames, temporal_scale)


def scaled_down(sample: ValidationSample, scale: float) -> ValidationSample:
    """The sample with its regions in the pixels of a clip that is `scale` times smaller."""
    conditions = []
    for condition in sample.conditions:
        if isinstance(condition, SampleSpatialCrop):
            region = tuple(round(edge / scale) for edge in condition.spatial_region)
            condition = condition.model_copy(update={"spatial_region": region})
        conditions.append(condition)
    return sample.model_copy(update={"conditions": tuple(conditions)})


def _with_video(
    start: StreamTokens, condition: SampleCondition, shape: ClipShape, encoders: Encoders
) -> tuple[StreamTokens, Tensor]:
    """Adds one condition, and returns its pixels [3, F, H, W] as well."""
    codec = encoders.video
    assert codec is not None, f"{condition.type} needs a video encoder"
    _warn_of_rate(condition, shape)
    time, down, right = encoders.scale_factors
    match condition:
        case SampleFirstFrame(image_or_video=path) | SampleKeyframe(image_or_video=path):
            at, length = condition.at, condition.length
            # The codec encodes frame 0 of a clip alone, and every later latent frame from its past: one frame, as
            # little as there can be.
            has_past = span_bounds(Span(at, length), start.target.grid.frames)[0] > 0
            count = 1 + time * (length - 1 + has_past)
            pixels = _read_frames(path, count, shape.width, shape.height)
            if is_image(path):
                pixels = pixels.expand(-1, count, -1, -1)
            _must_have(path, pixels, count)
            return condition_frames(start, _encode(codec, pixels)[:, :, -length:], at=at), pixels
        case SamplePrefix(video=str(path), num_frames=count):
            pixels = _read_frames(path, count or shape.frames, shape.width, shape.height)
            _must_have(path, pixels, count or 1)
            # A file that is shorter than the sample may have any length; the codec needs 1 + a multiple of `time`.
            pixels = pixels[:, : (pixels.shape[1] - 1) // time * time + 1]
            return condition_frames(start, _encode(codec, pixels)), pixels
        case SampleSuffix(video=str(path), num_frames=count):
            # Encode the whole clip: the codec is causal, so the suffix must have its past in it, as in a training clip.
            pixels = _read_frames(path, shape.frames, shape.width, shape.height)
            pixels = pixels[:, : (pixels.shape[1] - 1) // time * time + 1]
            latents = _encode(codec, pixels)
            if count is not None:
                # One more than the suffix: frame 0, which the codec encodes alone.
                _must_have(path, pixels, count + 1)
                # The last latent frames: a suffix does not contain frame 0, so `time` pixel frames each.
                latents = latents[:, :, -(count // time) :]
            return condition_frames(start, latents, at="last"), pixels
        case SampleSpatialCrop(video=path, spatial_region=region):
            pixels = _read_whole(path, shape)
            crop = SpatialCrop(type="spatial_crop", spatial_region=region)
            mask = conditioned_tokens(crop, start.target.grid, encoders.scale_factors)
            return condition_where(start, _encode(codec, pixels), mask), pixels
        case SampleMask(video=str(path), mask=mask_path):
            pixels = _read_whole(path, shape)
            mask = read_video_mask(mask_path, shape.frames, shape.width, shape.height, encoders.scale_factors)
            return condition_where(start, _encode(codec, pixels), mask), pixels
        case VideoToAudio(video=path):
            pixels = _read_whole(path, shape)
            return freeze(start, _encode(codec, pixels)), pixels
    assert isinstance(condition, SampleReference) and condition.video is not None
    space, every = condition.downscale_factor, condition.temporal_scale_factor
    pixels = _read_frames(condition.video, shape.frames, shape.width // space, shape.height // space)
    # Frame 0, then 1, 1 + every, ...: each latent frame of the reference then covers whole ones of the target.
    pixels = torch.cat([pixels[:, :1], pixels[:, 1::every]], dim=1)
    pixels = pixels[:, : (pixels.shape[1] - 1) // time * time + 1]
    latents = _encode(codec, pixels)
    return with_video_reference(start, latents, shape.fps / every, encoders.scale_factors), pixels


def _with_audio(
    start: StreamTokens, condition: SampleCondition, shape: ClipShape, codec: AudioCodec | None
) -> StreamTokens:
    assert codec is not None, f"{condition.type} needs an audio encoder"
    assert not isinstance(condition, SampleFirstFrame | SampleKeyframe | SampleSpatialCrop | VideoToAudio), (
        "conditions of the video"
    )
    assert condition.audio is not None
    audio = _read_audio(condition.audio)
    longest_s = min(audio.duration_s, shape.duration_s)
    match condition:
        case SamplePrefix(duration=wanted_s):
            return condition_frames(start, _encode_audio(codec, audio, min(wanted_s or longest_s, longest_s)))
        case SampleSuffix(duration=wanted_s):
            length_s = min(wanted_s or longest_s, longest_s)
            first = audio.waveform.shape[1] - round(length_s * audio.sample_rate)
            end = Audio(audio.waveform[:, first:], audio.sample_rate)
            return condition_frames(start, _encode_audio(codec, end, length_s), at="last")
        case SampleMask(mask=mask_path):
            # Within one latent step: containers round durations, and the rest is padded.
            if audio.duration_s < shape.duration_s - 1 / codec.steps_per_second:
                raise MediaError(
                    condition.audio,
                    f"lasts {audio.duration_s:.2f} s, the sample {shape.duration_s:.2f} s; use a longer one",
                )
            latents = _encode_audio(codec, audio, shape.duration_s)
            return condition_where(
                start, latents, read_audio_mask(mask_path, start.target.grid.frames, codec.steps_per_second)
            )
        case AudioToVideo():
            latents = _encode_audio(codec, audio, longest_s)
            # The file's own length, as in the reference trainer: a frozen stream need not last as long as the video.
            return freeze(audio_start(latents.shape[2]), latents)
    assert isinstance(condition, SampleReference)
    return with_audio_reference(start, _encode_audio(codec, audio, longest_s))


def encode_dataset_sample(strategy: FlexibleStrategy, batch: Batch) -> tuple[EncodedSample, ClipShape]:
    """Conditions a prepared sample as in training, with every condition; nothing is left to encode.

    Args:
        strategy: of the job.
        batch: one sample on the host, with text contexts.

    Returns:
        Its streams, and its size.

    Raises:
        ValueError: the sample does not fit the job.
    """
    starts = dataset_starts(strategy, batch)
    shape, shown, temporal = ClipShape(0, 0, 1, DEFAULT_FPS), None, 1
    if strategy.video is not None:
        time, vertical, horizontal = strategy.scale_factors
        grid = starts["video"].target.grid
        fps = batch["video_latents"].get("fps")
        shape = ClipShape(
            grid.width * horizontal,
            grid.height * vertical,
            (grid.frames - 1) * time + 1,
            DEFAULT_FPS if fps is None else float(fps[0]),
        )
        for condition in strategy.video.conditions:
            if isinstance(condition, Reference):
                shown = batch[condition.latents_dir]["latents"].float()
                _, temporal = reference_factors(grid, latent_grid(shown))
                break  # one fits next to the result
    return EncodedSample(starts.get("video"), starts.get("audio"), None, temporal, shown), shape


def _encode(codec: VideoCodec, pixels: Tensor) -> Tensor:
    # To the host at once: starts are kept until the end of the job.
    return codec.encode(pixels[None]).float().cpu()


def _encode_audio(codec: AudioCodec, audio: Audio, duration_s: float) -> Tensor:
    """Encodes the first `duration_s` seconds to latents [1, 8, round(25 * seconds), 16], as in training data."""
    shortest_s = codec.mel.filter_length / codec.mel.sample_rate
    # The encoder needs at least one spectrogram frame; the steps beyond the duration are cut below.
    audio = to_duration(audio, max(duration_s, shortest_s))
    latents = codec.encode(to_stereo(audio.waveform)[None], audio.sample_rate)
    return latents[:, :, : codec.steps_for(duration_s)].cpu()


def _read_frames(path: str, count: int, width: int, height: int) -> Tensor:
    """Reads at least one and at most `count` frames from the start: pixels [3, F, H, W] in [-1, 1]."""
    if is_image(path):
        return fit_frames(read_image(path), width, height)
    frames = [
        fit_frames(torch.from_numpy(np.ascontiguousarray(frame))[None], width, height)
        # Fitted one by one: a long 4K clip in full size would take gigabytes.
        for frame in islice(iter_frames(path), count)
    ]
    if not frames:
        raise MediaError(path, "no frame can be decoded")
    return torch.cat(frames, dim=1)


def _read_whole(path: str, shape: ClipShape) -> Tensor:
    pixels = _read_frames(path, shape.frames, shape.width, shape.height)
    _must_have(path, pixels, shape.frames)
    return pixels


def _warn_of_rate(condition: SampleCondition, shape: ClipShape) -> None:
    """Warns of a video whose frames are shown at another rate than its own, so that its motion changes its speed."""
    path = getattr(condition, "image_or_video", None) or getattr(condition, "video", None)
    if path is None or is_image(path) or isinstance(condition, SampleFirstFrame):
        return
    if not is_same_rate(fps := probe_video(path).fps, shape.fps):
        logger.warning(
            "validation: %s has %.5g frames per second, of which the sample shows %.5g: its motion is %.3g times as "
            "fast; convert it, or set validation.frame_rate",
            path,
            float(fps),
            shape.fps,
            shape.fps / float(fps),
        )


def _must_have(path: str, pixels: Tensor, count: int) -> None:
    if pixels.shape[1] < count:
        raise MediaError(path, f"has {pixels.shape[1]} frames, {count} are needed; use a longer one or fewer frames")


def _read_audio(path: str) -> Audio:
    audio = read_audio(path)
    if audio is None:
        raise MediaError(Path(path), "has no audio track")
    return audio
