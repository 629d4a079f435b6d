"""Clips before preparation: size, frame rate, duration, audio and bucket of each file, and whether it is broken."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ltx_titan.commands.inspection.sheet import Entry
from ltx_titan.common.tensors import evenly_spaced
from ltx_titan.data.layout import AUDIO_STEPS_PER_SECOND
from ltx_titan.encode.buckets import MAX_ENLARGEMENT, Bucket, choose_bucket
from ltx_titan.encode.clips import ANIMATED_SUFFIXES
from ltx_titan.media import (
    Audio,
    MediaError,
    fit_frames,
    is_image,
    iter_frames,
    probe_audio,
    probe_video,
    read_audio,
    read_image,
    seek_frames,
    to_uint8,
)
from ltx_titan.media.image import image_has_alpha
from ltx_titan.tables.folders import AUDIO_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES, captions_beside, find_media
from ltx_titan.tables.samples import is_table, media_of_row, read_rows

_SHEET_FRAMES = 6
# Frames after this one are reached by seeking instead of decoding all frames before.
_SEEK_ABOVE = 600


@dataclass(frozen=True)
class RawClip:
    """One file.

    Attributes:
        path: the file.
        kind: video, image or audio.
        width: pixels; 0 for audio files.
        height: likewise.
        frames: 1 for images, 0 for audio files.
        fps: frames per second; 0 for images and audio files.
        duration_s: seconds; 0 for images.
        channels: channels of the audio track; 0 without one.
        sample_rate: sample rate of the audio track in Hz; 0 without one.
        caption: caption in the table, None without one.
        problem: reason why it cannot be used; None for usable files.
        bucket: its bucket; None if none fits, or without buckets.
        is_silent: whether its audio track is silent; None if it was not decoded.
        is_variable: whether its frame rate varies, so that it is resampled.
        is_interlaced: whether its frames hold two fields of different times.
        has_alpha: whether it has transparency, which is shown over white.
    """

    path: Path
    kind: str
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0
    duration_s: float = 0.0
    channels: int = 0
    sample_rate: int = 0
    caption: str | None = None
    problem: str | None = None
    bucket: Bucket | None = None
    is_silent: bool | None = None
    is_variable: bool = False
    is_interlaced: bool = False
    has_alpha: bool = False

    @property
    def video_tokens(self) -> int:
        """Tokens of the clip in its bucket."""
        if self.bucket is None:
            return 0
        return ((self.bucket.frames - 1) // 8 + 1) * (self.bucket.height // 32) * (self.bucket.width // 32)

    @property
    def audio_tokens(self) -> int:
        """Tokens of its audio for the duration of its bucket."""
        duration_s = self.duration_s
        if self.bucket is not None:
            # An image has no rate and lasts one second.
            duration_s = self.bucket.frames / (self.fps or 1.0)
        return round(AUDIO_STEPS_PER_SECOND * duration_s) if self.channels else 0

    @property
    def audio_format(self) -> str:
        """Channels and sample rate of the audio track."""
        if not self.channels:
            return "none"
        layout = {1: "mono", 2: "stereo"}.get(self.channels, f"{self.channels} channels")
        return f"{layout} {self.sample_rate / 1000:g} kHz"

    @property
    def facts(self) -> str:
        """Summary in one line; empty for a file that cannot be opened."""
        parts: list[str] = []
        if not (self.width or self.channels):
            return ""
        if self.kind != "audio":
            parts.append(f"{self.width}x{self.height}")
        if self.kind == "video":
            parts += [f"{self.frames} frames", f"{self.fps:.6g} fps"]
        if self.kind != "image":
            parts.append(f"{self.duration_s:.2f} s")
            parts.append(self.audio_format if self.channels else "no audio")
        if self.bucket is not None:
            parts.append(f"-> {self.bucket}, {self.video_tokens} + {self.audio_tokens} tokens")
        return "   ".join(parts)


def find_clips(source: Path) -> tuple[list[tuple[Path, str | None]], list[tuple[str, str]]]:
    """(file, caption) for the rows of a table or the files of a folder, whose captions are in text files beside them.

    Returns:
        The files, and (item, reason) of rows and text files that cannot be used.

    Raises:
        ValueError: there are no files.
    """
    if not is_table(source):
        files = find_media(source, VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES)
        captions, problems = captions_beside(source, files)
        return [(path, captions.get(path)) for path in files], problems if captions else []
    table = read_rows(source)
    clips, problems = [], list(table.rejected)
    for number, row in table.rows:
        path = media_of_row(row, source)
        if path is None:
            problems.append((f"row {number}", "names no file"))
        else:
            clips.append((path, row.get("caption")))
    return clips, problems


def probe_clips(
    clips: Sequence[tuple[Path, str | None]],
    buckets: Sequence[Bucket],
    deep: bool,
    num_workers: int,
    on_clip: Callable[[], None],
) -> list[RawClip]:
    """Probes every file, several in parallel; unreadable ones get a `problem`.

    Args:
        clips: (file, caption).
        buckets: buckets to choose from; empty: no bucket is chosen.
        deep: decode every frame and all audio, which finds damage behind an intact header.
        num_workers: files in parallel.
        on_clip: called after each file.
    """

    def probe(clip: tuple[Path, str | None]) -> RawClip:
        path, caption = clip
        try:
            return _probe(path, caption, buckets, deep)
        except (MediaError, OSError) as error:
            reason = error.reason if isinstance(error, MediaError) else str(error)
            return RawClip(path, _kind(path), caption=caption, problem=reason)
        finally:
            on_clip()

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(probe, clips))


def sheet_entry(clip: RawClip) -> Entry:
    """A clip on a contact sheet: as training sees it if it has a bucket, else from start to end."""
    warning = clip.problem
    frames: list[Image.Image] = []
    audio: Audio | None = None
    # A file whose end is damaged can still be shown.
    if clip.problem is None or clip.frames:
        try:
            frames = _sheet_frames(clip)
            audio = read_audio(clip.path) if clip.channels else None
        except (MediaError, OSError) as error:
            warning = error.reason if isinstance(error, MediaError) else str(error)
    if warning is None and clip.is_silent:
        warning = "its audio track is silent"
    if (
        warning is None
        and clip.bucket is not None
        and ((factor := clip.bucket.enlargement(clip.width, clip.height)) > MAX_ENLARGEMENT)
    ):
        warning = f"enlarged {factor:.1f} times for its bucket"
    if audio is not None and clip.fps:
        frames_shown = clip.frames if clip.bucket is None else clip.bucket.frames
        audio = Audio(audio.waveform[:, : round(frames_shown / clip.fps * audio.sample_rate)], audio.sample_rate)
    return Entry(clip.path.name, clip.facts, frames, audio, clip.caption, warning)


def warnings_of(clips: Sequence[RawClip], has_captions: bool) -> dict[str, list[str]]:
    """Probable mistakes, with the clips that they concern; with buckets also what the clips lose in theirs."""
    good = [clip for clip in clips if clip.problem is None]
    videos = [clip for clip in good if clip.kind == "video"]
    is_mixed = any(clip.channels for clip in videos)
    found: dict[str, list[str]] = defaultdict(list)
    for clip in good:
        notes = {
            "clips without a caption": has_captions and not (clip.caption or "").strip(),
            "videos without audio among others with audio": is_mixed and clip.kind == "video" and not clip.channels,
            "silent audio tracks": bool(clip.is_silent),
            "videos of variable frame rate, resampled by their time stamps": clip.is_variable,
            "animated images, of few colors and with varying times (convert them to video)": (
                clip.path.suffix.lower() in ANIMATED_SUFFIXES
            ),
            "interlaced videos, deinterlaced by FFmpeg's bwdif at one frame for two fields": clip.is_interlaced,
            "videos and images with transparency, shown over white": clip.has_alpha,
        }
        lost = clip.bucket.notes(clip.width, clip.height, clip.frames) if clip.bucket is not None else ()
        for note in (*(note for note, applies in notes.items() if applies), *lost):
            found[note].append(str(clip.path))
    return found


def unused_share(clips: Sequence[RawClip]) -> float:
    """Share of all video that is after the frames that buckets use: training reads the start of a clip only."""
    videos = [clip for clip in clips if clip.kind == "video" and clip.problem is None and clip.bucket is not None]
    total = sum(clip.duration_s for clip in videos)
    used = sum(clip.bucket.frames / clip.fps for clip in videos if clip.bucket is not None)
    return 1 - used / total if total else 0.0


def as_record(clip: RawClip) -> Mapping[str, Any]:
    """The clip as JSON."""
    return {
        **{name: getattr(clip, name) for name in RawClip.__dataclass_fields__ if name not in ("path", "bucket")},
        "path": str(clip.path),
        "bucket": None if clip.bucket is None else str(clip.bucket),
        "video_tokens": clip.video_tokens,
        "audio_tokens": clip.audio_tokens,
    }


def _probe(path: Path, caption: str | None, buckets: Sequence[Bucket], deep: bool) -> RawClip:
    kind = _kind(path)
    if kind == "image":
        _, height, width, _ = read_image(path).shape
        clip = RawClip(path, kind, width, height, 1, caption=caption, has_alpha=image_has_alpha(path))
        return with_bucket(clip, buckets)
    audio = probe_audio(path)
    channels, rate = (audio.channels, audio.sample_rate) if audio is not None else (0, 0)
    if kind == "audio":
        if audio is None:
            raise MediaError(path, "has no audio track")
        clip = RawClip(path, kind, duration_s=audio.duration_s, channels=channels, sample_rate=rate, caption=caption)
        return _with_silence(clip) if deep else clip
    info = probe_video(path)
    frames = info.frames
    problem = None
    if deep:
        frames = sum(1 for _ in iter_frames(path))
        if frames < info.frames:
            problem = f"its packets promise {info.frames} frames, {frames} can be decoded"
    clip = RawClip(
        path,
        kind,
        info.width,
        info.height,
        frames,
        float(info.fps),
        float(frames / info.fps),
        channels,
        rate,
        caption,
        problem,
        is_variable=info.is_variable,
        is_interlaced=info.is_interlaced,
        has_alpha=info.has_alpha,
    )
    return with_bucket(_with_silence(clip) if deep and channels else clip, buckets)


def _kind(path: Path) -> str:
    return "image" if is_image(path) else "audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"


def _with_silence(clip: RawClip) -> RawClip:
    audio = read_audio(clip.path)
    # Dithered 16-bit silence is below, the quietest recordings are above.
    silent = audio is None or bool(audio.waveform.abs().max() < 1e-3)
    return RawClip(**{**vars(clip), "is_silent": silent})


def with_bucket(clip: RawClip, buckets: Sequence[Bucket]) -> RawClip:
    """The clip with its bucket, or with the reason that it fits none; audio and unusable files are returned as is."""
    if not buckets or clip.problem is not None or clip.kind == "audio":
        return clip
    bucket = choose_bucket(buckets, clip.width, clip.height, clip.frames)
    problem = None
    if bucket is None:
        shortest = min(bucket.frames for bucket in buckets)
        problem = f"has {clip.frames} frame(s), the shortest bucket needs {shortest}"
    return RawClip(**{**vars(clip), "bucket": bucket, "problem": problem})


def _sheet_frames(clip: RawClip) -> list[Image.Image]:
    if clip.kind == "audio":
        return []
    if clip.kind == "image":
        return [_fitted(torch.as_tensor(read_image(clip.path)), clip.bucket)]
    count = clip.bucket.frames if clip.bucket is not None else clip.frames
    wanted = evenly_spaced(count, _SHEET_FRAMES)
    if wanted[-1] > _SEEK_ABOVE:
        frames = seek_frames(clip.path, [index / clip.fps for index in wanted])
    else:
        frames = (
            frame for index, frame in enumerate(islice(iter_frames(clip.path), wanted[-1] + 1)) if index in wanted
        )
    # A copy: frames of rotated videos have negative strides, which torch does not accept.
    return [_fitted(torch.from_numpy(frame.copy())[None], clip.bucket) for frame in frames]


def _fitted(frame: torch.Tensor, bucket: Bucket | None) -> Image.Image:
    """A frame [1, H, W, 3], cropped as for its bucket and reduced to the size on the sheet."""
    if bucket is not None:
        scale = min(1.0, 512 / max(bucket.width, bucket.height))
        width, height = round(bucket.width * scale), round(bucket.height * scale)
        frame = to_uint8(fit_frames(frame, width, height))
    image = Image.fromarray(frame[0].numpy())
    image.thumbnail((512, 512))
    return image
