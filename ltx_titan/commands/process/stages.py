"""The stages of preparation: for each column, what is read of a row, and how the functions of `encode` are applied."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from ltx_titan.codecs import AudioCodec, TextPrecision, VideoCodec
from ltx_titan.commands.process.loop import Output, PlannedOutput, Stage
from ltx_titan.commands.process.store import Store
from ltx_titan.common.ranks import own_device
from ltx_titan.data.layout import AUDIO_STEPS_PER_SECOND, Fields
from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.captions import TextModels, encode_caption, tokens_cut, with_trigger, without_prefix
from ltx_titan.encode.clips import (
    Clip,
    ClipRules,
    DecodedClip,
    decode_clip,
    has_other_shape,
    mask_has_other_rate,
    plan_clip,
    read_clip_mask,
)
from ltx_titan.encode.encoders import EncoderFiles, load_audio_encoder, load_text_models, load_video_encoder
from ltx_titan.encode.latents import (
    audio_bytes,
    audio_steps,
    encode_audio,
    encode_video,
    longest_duration,
    rate_notes,
    video_bytes,
)
from ltx_titan.encode.references import DecodedReference, ReferenceScale, decode_reference, plan_reference
from ltx_titan.media import Audio, MediaError, after_time, probe_audio, read_audio, read_audio_mask
from ltx_titan.media.container import check_file
from ltx_titan.tables.samples import SampleRow

_OTHER_SHAPE = "of another aspect ratio than their video, scaled and cropped on their own (make them of its shape)"


@dataclass(frozen=True)
class Targets:
    """Shapes of the clips that references, masks and separate audio belong to.

    Attributes:
        store: prepared data; stored latents decide, since they may be older than the options.
        rules: rules by which clips are brought to a shape.
    """

    store: Store
    rules: ClipRules

    def clip(self, row: SampleRow) -> Clip:
        """Shape of a row's clip: that of its latents, or the planned one if they are not stored yet."""
        if not self.store.has("latents", row.key):
            assert row.video is not None
            return plan_clip(row.video, self.rules)
        fields = self.store.read("latents", row.key)
        time, down, right = self.rules.scale_factors
        # From the stored latents: they may have been made with other buckets, and what is made now must fit them.
        frames, rows, columns = (int(fields[key]) for key in ("num_frames", "height", "width"))
        bucket = Bucket(columns * right, rows * down, (frames - 1) * time + 1)
        # The rate is stored as a float; the nearest simple fraction is the container's.
        return Clip(bucket, Fraction(float(fields["fps"])).limit_denominator(100_000))

    def audio_steps(self, row: SampleRow) -> int | None:
        """Latent steps of a row's audio; None if it is not stored."""
        if not self.store.has("audio_latents", row.key):
            return None
        return int(self.store.read("audio_latents", row.key)["num_time_steps"])


@dataclass(frozen=True)
class VideoStage(Stage[DecodedClip, tuple[VideoCodec, AudioCodec | None]]):
    """Videos and still images to `latents/`, and the audio of videos to `audio_latents/`."""

    rules: ClipRules
    files: EncoderFiles
    device: str
    with_audio: bool
    reference_layout: bool = False
    name: str = "videos"
    is_required: ClassVar[bool] = True

    @property
    def folders(self) -> tuple[str, ...]:
        return ("latents", "audio_latents") if self.with_audio else ("latents",)

    def sources(self, row: SampleRow) -> dict[str, Path]:
        return {"video": row.media}

    def subject(self, row: SampleRow) -> str:
        return row.subject(row.media)

    def plan(self, row: SampleRow) -> PlannedOutput:
        clip = plan_clip(row.media, self.rules)
        size = video_bytes(clip.latent_size(self.rules.scale_factors))
        if self.with_audio:
            size += audio_bytes(audio_steps(clip.duration_s))
        return PlannedOutput(str(clip), size, clip.notes)

    def load(self) -> tuple[VideoCodec, AudioCodec | None]:
        device = own_device(self.device)
        audio_codec = load_audio_encoder(self.files, device) if self.with_audio else None
        return load_video_encoder(self.files, device), audio_codec

    def read(self, row: SampleRow) -> DecodedClip:
        # Video and audio in one call, so that a file is opened once.
        return decode_clip(row.media, self.rules, row.key, self.with_audio, row.start)

    def encode(self, row: SampleRow, item: DecodedClip, encoder: tuple[VideoCodec, AudioCodec | None]) -> Output:
        video_codec, audio_codec = encoder
        clip, notes = item.clip, [*item.clip.notes]
        latents = encode_video(item.pixels, float(clip.fps), video_codec)
        if audio_codec is None:
            return Output({"latents": latents}, tuple(notes))
        if item.audio is None:
            notes.append("videos and images without audio")
            if self.reference_layout:
                # Its trainer does not know placeholders and would train on them as audio.
                return Output({"audio_latents": None, "latents": latents}, tuple(notes))
        # One frame of tolerance: audio tracks often end slightly before the video.
        elif item.audio.duration_s < clip.duration_s - 1 / clip.fps:
            outcome = "left short" if self.reference_layout else "filled up with silence"
            notes.append(f"audio shorter than their video, {outcome}")
        if item.audio is not None:
            notes += rate_notes(item.audio, audio_codec)
        audio = encode_audio(item.audio, clip.duration_s, audio_codec, self.reference_layout)
        # Audio first: latents without their audio would look finished to a run with --skip-audio.
        return Output({"audio_latents": audio, "latents": latents}, tuple(notes))


@dataclass(frozen=True)
class AudioStage(Stage[tuple[Audio, float], AudioCodec]):
    """A column of audio files to a folder of audio latents.

    With videos, an audio file is brought to the duration of its clip. Without videos the whole file is encoded, or the
    longest of the listed durations that it reaches, so that rows can share a batch.

    Attributes:
        targets: shapes of the clips; None in a dataset without videos.
        durations_s: durations to cut audio to in a dataset without videos; empty: as long as it is.
        is_padded: whether audio shorter than its clip is padded with silence; references are only cut.
    """

    files: EncoderFiles
    device: str
    targets: Targets | None
    durations_s: Sequence[float]
    reference_layout: bool = False
    name: str = "audio"
    folder: str = "audio_latents"
    is_padded: bool = True
    is_required: ClassVar[bool] = True

    @property
    def folders(self) -> tuple[str, ...]:
        return (self.folder,)

    def file(self, row: SampleRow) -> Path | None:
        """The row's file in the column of this stage."""
        return row.audio

    def applies_to(self, row: SampleRow) -> bool:
        return self.file(row) is not None

    def sources(self, row: SampleRow) -> dict[str, Path]:
        # The clip's duration decides; its file changes at least as often.
        clip = {"video": row.video} if row.video is not None else {}
        return {self.name: self._path(row), **clip}

    def subject(self, row: SampleRow) -> str:
        return row.subject(self._path(row))

    def plan(self, row: SampleRow) -> PlannedOutput:
        audio = probe_audio(self._path(row))
        if audio is None:
            raise MediaError(self._path(row), "has no audio track, or an empty one")
        seconds = self._duration_s(row, max(0.0, audio.duration_s - self._start_s(row)))
        return PlannedOutput(f"{seconds:.2f} s", audio_bytes(audio_steps(seconds)))

    def load(self) -> AudioCodec:
        return load_audio_encoder(self.files, own_device(self.device))

    def read(self, row: SampleRow) -> tuple[Audio, float]:
        audio = read_audio(self._path(row))
        if audio is None:
            raise MediaError(self._path(row), "has no audio track, or an empty one")
        start_s, whole_s = self._start_s(row), audio.duration_s
        audio = after_time(audio, start_s)
        if audio is None:
            reason = f"lasts {whole_s:.2f} s, the window of its clip starts at {float(start_s):.2f} s; use longer audio"
            raise MediaError(self._path(row), reason)
        return audio, self._duration_s(row, audio.duration_s)

    def encode(self, row: SampleRow, item: tuple[Audio, float], encoder: AudioCodec) -> Output:
        audio, duration_s = item
        notes = rate_notes(audio, encoder)
        # A tenth of a second, because tracks rarely end with their video.
        if audio.duration_s > duration_s + 0.1:
            notes.append("audio files longer than what is used of them, cut at the end")
        elif audio.duration_s < duration_s - 0.1:
            outcome = "left short" if self.reference_layout else "filled up with silence"
            notes.append(f"audio files shorter than their clip, {outcome}")
        fields = encode_audio(audio, duration_s, encoder, self.reference_layout)
        return Output({self.folder: fields}, tuple(notes))

    def _path(self, row: SampleRow) -> Path:
        path = self.file(row)
        assert path is not None
        return path

    def _start_s(self, row: SampleRow) -> Fraction:
        """Time of the first frame of a row's window."""
        if not row.start:
            return Fraction(0)
        assert self.targets is not None
        return row.start / self.targets.clip(row).fps

    def _duration_s(self, row: SampleRow, own_s: float) -> float:
        if self.targets is not None:
            clip_s = self.targets.clip(row).duration_s
            # A reference keeps its own length: padding would add silence as content.
            return clip_s if self.is_padded else min(own_s, clip_s)
        if not self.durations_s:
            return own_s
        duration_s = longest_duration(self.durations_s, own_s)
        if duration_s is None:
            shortest = f"the shortest of --audio-durations is {min(self.durations_s):g} s; add a shorter one"
            raise MediaError(self._path(row), f"lasts {own_s:.2f} s, {shortest}")
        return duration_s


@dataclass(frozen=True)
class ReferenceAudioStage(AudioStage):
    """The column `reference_audio` to `reference_audio_latents/`."""

    name: str = "reference audio"
    folder: str = "reference_audio_latents"
    is_padded: bool = False
    is_required: ClassVar[bool] = False

    def file(self, row: SampleRow) -> Path | None:
        return row.extras.get("reference_audio")


@dataclass(frozen=True)
class ReferenceVideoStage(Stage[DecodedReference, VideoCodec]):
    """The column `reference_video` to `reference_latents/`."""

    rules: ClipRules
    scale: ReferenceScale
    files: EncoderFiles
    device: str
    targets: Targets
    name: str = "references"
    folders: tuple[str, ...] = ("reference_latents",)

    def applies_to(self, row: SampleRow) -> bool:
        return "reference_video" in row.extras

    def sources(self, row: SampleRow) -> dict[str, Path]:
        return {"reference video": row.extras["reference_video"], "video": row.media}

    def subject(self, row: SampleRow) -> str:
        return row.subject(row.extras["reference_video"])

    def plan(self, row: SampleRow) -> PlannedOutput:
        path, target = row.extras["reference_video"], self.targets.clip(row)
        stored = plan_reference(path, target, self.rules, self.scale, row.start).stored
        return PlannedOutput(str(stored), video_bytes(stored.latent_size(self.rules.scale_factors)))

    def load(self) -> VideoCodec:
        return load_video_encoder(self.files, own_device(self.device))

    def read(self, row: SampleRow) -> DecodedReference:
        path, target = row.extras["reference_video"], self.targets.clip(row)
        return decode_reference(path, target, self.rules, self.scale, row.key, row.start)

    def encode(self, row: SampleRow, item: DecodedReference, encoder: VideoCodec) -> Output:
        fields = encode_video(item.pixels, float(item.clip.fps), encoder)
        notes = {
            "references of another frame rate than their video (--fps would make them equal)": item.has_other_rate,
            f"references {_OTHER_SHAPE}": has_other_shape(row.extras["reference_video"], row.media),
        }
        return Output({"reference_latents": fields}, tuple(note for note, applies in notes.items() if applies))


@dataclass(frozen=True)
class VideoMaskStage(Stage[Tensor, None]):
    """The column `video_mask` to `video_masks/`, one number per latent cell: 1 is conditioned, 0 is generated."""

    rules: ClipRules
    targets: Targets
    name: str = "video masks"
    folders: tuple[str, ...] = ("video_masks",)

    def applies_to(self, row: SampleRow) -> bool:
        return "video_mask" in row.extras

    def sources(self, row: SampleRow) -> dict[str, Path]:
        return {"video mask": row.extras["video_mask"], "video": row.media}

    def subject(self, row: SampleRow) -> str:
        return row.subject(row.extras["video_mask"])

    def plan(self, row: SampleRow) -> PlannedOutput:
        clip = self.targets.clip(row)
        # Existence alone: reading every mask would make a dry run as slow as the run.
        check_file(row.extras["video_mask"])
        size = prod(clip.latent_size(self.rules.scale_factors)) * torch.float32.itemsize
        return PlannedOutput(str(clip.bucket), size)

    def load(self) -> None:
        """Masks need no encoder."""

    def read(self, row: SampleRow) -> Tensor:
        path, target = row.extras["video_mask"], self.targets.clip(row)
        return read_clip_mask(path, row.media, target, self.rules, row.key, row.start)

    def encode(self, row: SampleRow, item: Tensor, encoder: None) -> Output:
        path, notes = row.extras["video_mask"], _coverage_notes(item)
        if mask_has_other_rate(path, row.media, self.targets.clip(row)):
            notes += ("masks of another frame rate than their video (by their times, or frame by frame if as many)",)
        if has_other_shape(path, row.media):
            notes += (f"masks {_OTHER_SHAPE}",)
        # float32, as the reference trainer stores masks.
        return Output({"video_masks": {"mask": item.to(torch.float32)}}, notes)


@dataclass(frozen=True)
class AudioMaskStage(Stage[Tensor, None]):
    """The column `audio_mask` to `audio_masks/`, one number per latent step."""

    targets: Targets
    name: str = "audio masks"
    folders: tuple[str, ...] = ("audio_masks",)

    def applies_to(self, row: SampleRow) -> bool:
        return "audio_mask" in row.extras

    def sources(self, row: SampleRow) -> dict[str, Path]:
        media = {"video": row.video, "audio": row.audio}
        return {"audio mask": row.extras["audio_mask"]} | {role: path for role, path in media.items() if path}

    def subject(self, row: SampleRow) -> str:
        return str(row.extras["audio_mask"])

    def plan(self, row: SampleRow) -> PlannedOutput:
        check_file(row.extras["audio_mask"])
        steps = self.targets.audio_steps(row)
        # In a dry run the audio may not be encoded yet.
        if steps is None:
            return PlannedOutput("as its audio", 0)
        return PlannedOutput(f"{steps} steps", steps * torch.float32.itemsize)

    def load(self) -> None:
        """Masks need no encoder."""

    def read(self, row: SampleRow) -> Tensor:
        steps = self.targets.audio_steps(row)
        if steps is None:
            raise ValueError("its sample has no audio in audio_latents/, which the mask would belong to")
        return read_audio_mask(row.extras["audio_mask"], steps, AUDIO_STEPS_PER_SECOND)

    def encode(self, row: SampleRow, item: Tensor, encoder: None) -> Output:
        return Output({"audio_masks": {"mask": item.to(torch.float32)}}, _coverage_notes(item))


def _coverage_notes(mask: Tensor) -> tuple[str, ...]:
    if not mask.any():
        return ("masks that are dark or silent in all of their clip",)
    return ("masks that are white or loud in all of their clip",) if mask.all() else ()


@dataclass(frozen=True)
class CaptionStage(Stage[str, TextModels]):
    """Captions to `conditions/`.

    Attributes:
        size_bytes: size of one output, for a dry run.
        trigger: word put in front of every caption.
        removes_prefixes: whether phrases such as "The video shows" are removed from captions.
        with_contexts: whether the outputs of the text connectors are stored.
    """

    files: EncoderFiles
    device: str
    precision: TextPrecision
    size_bytes: int
    trigger: str | None
    removes_prefixes: bool
    with_contexts: bool
    name: str = "captions"
    folders: tuple[str, ...] = ("conditions",)
    # The caption encoded last: windows of one clip have one.
    last: dict[str, Fields] = field(default_factory=dict, compare=False)

    def sources(self, row: SampleRow) -> dict[str, Path]:
        return {}

    def text(self, row: SampleRow) -> str | None:
        return row.caption

    def subject(self, row: SampleRow) -> str:
        return f"row {row.row} ({row.media})"

    def plan(self, row: SampleRow) -> PlannedOutput:
        # One label for all captions: outputs of one shape are counted together.
        return PlannedOutput("caption" if self.read(row) else "empty caption", self.size_bytes, self._notes(row))

    def load(self) -> TextModels:
        return load_text_models(self.files, own_device(self.device), self.precision, self.with_contexts)

    def read(self, row: SampleRow) -> str:
        if row.caption is None:
            raise ValueError("has no caption")
        # Before the trigger word is prepended, which would hide the phrase at the start.
        caption = without_prefix(row.caption) if self.removes_prefixes else row.caption
        return with_trigger(caption, self.trigger)

    def encode(self, row: SampleRow, item: str, encoder: TextModels) -> Output:
        notes = self._notes(row)
        if tokens_cut(item, encoder) > 0:
            notes += (f"captions longer than {encoder.encoder.max_tokens} tokens, cut at the end (shorten them)",)
        if item not in self.last:
            self.last.clear()
            self.last[item] = encode_caption(item, encoder)
        return Output({"conditions": self.last[item]}, notes)

    def _notes(self, row: SampleRow) -> tuple[str, ...]:
        caption = row.caption or ""
        is_empty = not (without_prefix(caption) if self.removes_prefixes else caption.strip())
        return ("empty captions (data.caption_dropout trains without captions on purpose)",) if is_empty else ()
