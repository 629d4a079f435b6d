"""What raw clips are: sizes, rates, lengths and audio of each file, the bucket it goes to, and which are broken."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ltx_titan.commands.files import AUDIO_SUFFIXES, VIDEO_SUFFIXES, find_media, is_table, media_of_row, read_table
from ltx_titan.commands.inspection.sheet import Entry
from ltx_titan.data.layout import AUDIO_STEPS_PER_SECOND
from ltx_titan.encode.buckets import Bucket, choose_bucket
from ltx_titan.media import (
    IMAGE_SUFFIXES,
    Audio,
    MediaError,
    fit_frames,
    is_image,
    iter_frames,
    probe_video,
    read_audio,
    read_image,
    to_uint8,
)
from ltx_titan.media.video import open_media

_SHEET_FRAMES = 6
# Longer videos are not decoded through for a few pictures, but sought in.
_SEEK_ABOVE = 600
_FAR_SHORT = 1.5


@dataclass(frozen=True)
class RawClip:
    """One file.

    Attributes:
        path: the file.
        kind: video, image or audio.
        width: pixels, 0 for an audio.
        height: likewise.
        frames: 1 for an image, 0 for an audio.
        fps: frames per second, 0 for images and audio.
        duration_s: seconds; 0 for an image.
        channels: of the audio track; 0: none.
        sample_rate: of the audio track, Hz; 0: none.
        caption: from the table, None without one.
        problem: why it cannot be used; None: it can.
        bucket: where it goes, None where no bucket fits or none are given.
        is_silent: whether its audio track holds silence; None: not listened to.
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

    @property
    def video_tokens(self) -> int:
        """Tokens of the clip in its bucket."""
        if self.bucket is None:
            return 0
        return ((self.bucket.frames - 1) // 8 + 1) * (self.bucket.height // 32) * (self.bucket.width // 32)

    @property
    def audio_tokens(self) -> int:
        """Tokens of its audio for the length of its bucket."""
        duration_s = self.duration_s
        if self.bucket is not None:
            duration_s = self.bucket.frames / (self.fps or 1.0)
        return round(AUDIO_STEPS_PER_SECOND * duration_s) if self.channels else 0

    @property
    def facts(self) -> str:
        """In one line; nothing for a file that cannot be opened."""
        parts: list[str] = []
        if not (self.width or self.channels):
            return ""
        if self.kind != "audio":
            parts.append(f"{self.width}x{self.height}")
        if self.kind == "video":
            parts += [f"{self.frames} frames", f"{self.fps:.6g} fps"]
        if self.kind != "image":
            parts.append(f"{self.duration_s:.2f} s")
            parts.append(f"{_channels(self.channels)} {self.sample_rate / 1000:g} kHz" if self.channels else "no audio")
        if self.bucket is not None:
            parts.append(f"-> {self.bucket}, {self.video_tokens} + {self.audio_tokens} tokens")
        return "   ".join(parts)


def find_clips(source: Path) -> list[tuple[Path, str | None]]:
    """(file, caption) of a folder's files or of a table's rows.

    Raises:
        ValueError: there are none.
    """
    if is_table(source):
        rows = read_table(source)
        found = [(media_of_row(row, source), row.get("caption")) for row in rows]
        return [(path, caption) for path, caption in found if path is not None]
    return [(path, None) for path in find_media(source, VIDEO_SUFFIXES | IMAGE_SUFFIXES | AUDIO_SUFFIXES)]


def probe_clips(
    clips: Sequence[tuple[Path, str | None]],
    buckets: Sequence[Bucket],
    deep: bool,
    num_workers: int,
    on_clip: Callable[[], None],
) -> list[RawClip]:
    """Look at every file, several at once; what cannot be read has its `problem`.

    Args:
        clips: (file, caption).
        buckets: to choose from; none: no choice is made.
        deep: decode every frame and all audio, which finds files that are damaged behind their header.
        num_workers: files at once.
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
    """A clip on a contact sheet: as training will see it where there is a bucket, else from start to end."""
    warning = clip.problem
    frames: list[Image.Image] = []
    audio: Audio | None = None
    if clip.problem is None or clip.frames:
        try:
            frames = _pictures(clip)
            audio = read_audio(clip.path) if clip.channels else None
        except (MediaError, OSError) as error:
            warning = error.reason if isinstance(error, MediaError) else str(error)
    if warning is None and clip.is_silent:
        warning = "its audio track is silent"
    if warning is None and clip.bucket is not None and (factor := _enlargement(clip)) > _FAR_SHORT:
        warning = f"is enlarged {factor:.1f} times for its bucket"
    if audio is not None and clip.fps:
        frames_shown = clip.frames if clip.bucket is None else clip.bucket.frames
        audio = Audio(audio.waveform[:, : round(frames_shown / clip.fps * audio.sample_rate)], audio.sample_rate)
    return Entry(clip.path.name, clip.facts, frames, audio, clip.caption, warning)


def warnings_of(clips: Sequence[RawClip], has_buckets: bool, is_table: bool) -> dict[str, int]:
    """What is likely not meant, with how many clips it concerns."""
    good = [clip for clip in clips if clip.problem is None]
    counts = {
        "clips without a caption": sum(is_table and not clip.caption for clip in good),
        "videos without audio beside others with it": 0,
        "audio tracks that are silent": sum(bool(clip.is_silent) for clip in good),
        f"clips enlarged more than {_FAR_SHORT:g} times for their bucket": sum(
            clip.bucket is not None and _enlargement(clip) > _FAR_SHORT for clip in good
        ),
    }
    videos = [clip for clip in good if clip.kind == "video"]
    without = sum(not clip.channels for clip in videos)
    if 0 < without < len(videos):
        counts["videos without audio beside others with it"] = without
    unused = sum(clip.duration_s - clip.bucket.frames / clip.fps for clip in videos if clip.bucket)
    total = sum(clip.duration_s for clip in videos)
    if has_buckets and total and unused / total > 0.5:
        counts["percent of all video that lies behind the frames a bucket takes (cut into shorter clips)"] = round(
            100 * unused / total
        )
    return {text: count for text, count in counts.items() if count}


def as_record(clip: RawClip) -> Mapping[str, Any]:
    """A clip for a JSON file."""
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
        return _placed(RawClip(path, kind, width, height, 1, caption=caption), buckets)
    channels, rate, duration_s = _probe_audio(path)
    if kind == "audio":
        if not channels:
            raise MediaError(path, "has no audio track")
        clip = RawClip(path, kind, duration_s=duration_s, channels=channels, sample_rate=rate, caption=caption)
        return _listened(clip) if deep else clip
    info = probe_video(path)
    frames = info.frames
    problem = None
    if deep:
        frames = sum(1 for _ in iter_frames(path))
        if frames < info.frames:
            problem = f"its header says {info.frames} frames, {frames} can be decoded"
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
    )
    return _placed(_listened(clip) if deep and channels else clip, buckets)


def _kind(path: Path) -> str:
    return "image" if is_image(path) else "audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"


def _probe_audio(path: Path) -> tuple[int, int, float]:
    """Channels, sample rate and seconds of a file's audio track; zeros without one."""
    with open_media(path) as container:
        if not container.streams.audio:
            return 0, 0, 0.0
        stream = container.streams.audio[0]
        duration = stream.duration * stream.time_base if stream.duration else (container.duration or 0) / 1_000_000
        return stream.codec_context.channels, stream.codec_context.sample_rate, float(duration)


def _listened(clip: RawClip) -> RawClip:
    audio = read_audio(clip.path)
    # 16-bit silence with dither stays below; the quietest recordings do not.
    silent = audio is None or bool(audio.waveform.abs().max() < 1e-3)
    return RawClip(**{**vars(clip), "is_silent": silent})


def _placed(clip: RawClip, buckets: Sequence[Bucket]) -> RawClip:
    if not buckets or clip.problem is not None:
        return clip
    bucket = choose_bucket(buckets, clip.width, clip.height, clip.frames)
    problem = None
    if bucket is None:
        shortest = min(bucket.frames for bucket in buckets)
        problem = f"has {clip.frames} frame(s), the shortest bucket needs {shortest}"
    return RawClip(**{**vars(clip), "bucket": bucket, "problem": problem})


def _channels(count: int) -> str:
    return {1: "mono", 2: "stereo"}.get(count, f"{count} channels")


def _enlargement(clip: RawClip) -> float:
    assert clip.bucket is not None
    return max(clip.bucket.width / clip.width, clip.bucket.height / clip.height)


def _pictures(clip: RawClip) -> list[Image.Image]:
    if clip.kind == "audio":
        return []
    if clip.kind == "image":
        return [_fitted(torch.as_tensor(read_image(clip.path)), clip.bucket)]
    frames = clip.bucket.frames if clip.bucket is not None else clip.frames
    count = min(_SHEET_FRAMES, frames)
    wanted = sorted({round((frames - 1) * place / max(1, count - 1)) for place in range(count)})
    if wanted[-1] > _SEEK_ABOVE:
        return _sought(clip, wanted)
    pictures = []
    for index, frame in enumerate(iter_frames(clip.path)):
        if index in wanted:
            pictures.append(_fitted(torch.from_numpy(frame.copy())[None], clip.bucket))
        if index == wanted[-1]:
            break
    return pictures


def _sought(clip: RawClip, wanted: Sequence[int]) -> list[Image.Image]:
    """Pictures near the wanted frames: from the key frame before each."""
    pictures = []
    with open_media(clip.path) as container:
        stream = container.streams.video[0]
        for index in wanted:
            offset = math.floor(index / clip.fps / stream.time_base) + (stream.start_time or 0)
            container.seek(offset, stream=stream)
            frame = next(container.decode(stream), None)
            if frame is not None:
                pictures.append(_fitted(torch.from_numpy(frame.to_ndarray(format="rgb24"))[None], clip.bucket))
    return pictures


def _fitted(frame: torch.Tensor, bucket: Bucket | None) -> Image.Image:
    """A frame [1, H, W, 3], cut as its bucket will; small, since a sheet shows it small."""
    if bucket is not None:
        scale = min(1.0, 512 / max(bucket.width, bucket.height))
        width, height = round(bucket.width * scale), round(bucket.height * scale)
        frame = to_uint8(fit_frames(frame, width, height))
    picture = Image.fromarray(frame[0].numpy())
    picture.thumbnail((512, 512))
    return picture
