"""A data set that encodes clips and captions while training, for sets too large to keep encoded.

It reads the table that `process-dataset` reads and looks like prepared data to everything behind it: shapes are known
from the headers of the files before training, `load` gives what a prepared sample would hold, to the bit, and random
draws, batches and resuming are the same. What is encoded can be kept on disk up to a size.

A clip can still turn out broken when it is decoded. Another one of the same shape then takes its place, with a warning:
the order of all others stays, and a run of days does not end at one file.
"""

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import torch

from ltx_titan.codecs import load_audio_codec, load_video_codec, text_encoder_config, text_feature_widths
from ltx_titan.codecs.text_encoder import MAX_TOKENS
from ltx_titan.config.sections import MediaSection
from ltx_titan.data import Sample, ShapeKey, shape_key_of
from ltx_titan.data.cache import SampleCache
from ltx_titan.data.layout import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    AUDIO_STEPS_PER_SECOND,
    VIDEO_CHANNELS,
    Fields,
    Kind,
    check_fields,
)
from ltx_titan.encode.buckets import Bucket, choose_bucket, parse_buckets
from ltx_titan.encode.captions import with_trigger
from ltx_titan.encode.encoders import EncoderFiles, Encoders
from ltx_titan.media import MediaError, fit_frames, is_image, probe_video, read_audio, read_clip, read_image
from ltx_titan.media.tables import SampleRow, read_sample_table
from ltx_titan.weights.metadata import read_metadata, scale_factors

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KINDS: dict[str, Kind] = {"video_latents": "video", "audio_latents": "audio", "conditions": "text"}
_EXAMPLES = 3
# Clips that may fail in a row before it is taken to be the storage.
_TRIES = 10
# A still image lasts one second, as `process-dataset` has it.
_IMAGE_FPS = "1"


@dataclass(frozen=True)
class _Header:
    """What the header of a video or image says; all that a plan needs to know of it."""

    width: int
    height: int
    frames: int
    fps: str
    has_audio: bool


@dataclass(frozen=True)
class _Clip:
    """A row that can be used, and the shape that its file is brought to."""

    row: SampleRow
    bucket: Bucket
    fps: Fraction
    has_audio: bool

    @property
    def duration_s(self) -> float:
        return float(self.bucket.frames / self.fps)


class MediaDataset:
    """The clips of a table, encoded when they are asked for."""

    def __init__(self, section: MediaSection, sources: Mapping[str, str], checkpoint_path: str | Path) -> None:
        """Reads the table and the headers of all files; loads no encoder.

        Args:
            section: the job's `[data.media]`.
            sources: folders that a prepared data set would have, each with its key in a batch.
            checkpoint_path: with the text projection, and the VAEs unless the section names other files.

        Raises:
            ValueError: the table, a checkpoint or the text encoder cannot be used, or no clip can.
        """
        assert section.dataset_path is not None
        assert section.text_encoder_path is not None
        self.sources = dict(sources)
        self._section = section
        files = EncoderFiles(
            checkpoint=Path(checkpoint_path),
            text_encoder=Path(section.text_encoder_path),
            video_vae=_optional(section.video_vae_path),
            audio_vae=_optional(section.audio_vae_path),
            vae_tiling=section.vae_tiling,
            offload_text_encoder=section.offload_text_encoder,
        )
        config = read_metadata(files.checkpoint).config
        video_vae, audio_vae = files.video_vae or files.checkpoint, files.audio_vae or files.checkpoint
        # On the meta device: every name and shape is checked, nothing is read.
        load_video_codec(video_vae, "meta", part="encoder")
        if self._has_audio:
            load_audio_codec(audio_vae, "meta", part="encoder")
        self._text_widths = text_feature_widths(config, text_encoder_config(files.text_encoder))
        self._scale_factors = scale_factors(read_metadata(video_vae).config)
        self._clips = self._find_clips()
        self._keys = [shape_key_of(self._outline(clip)) for clip in self._clips]
        self._alike: dict[ShapeKey, list[int]] = defaultdict(list)
        self._places = []
        for index, key in enumerate(self._keys):
            self._places.append(len(self._alike[key]))
            self._alike[key].append(index)
        self._stamps = {
            "video_latents": (_stamp(video_vae), section.vae_tiling),
            "audio_latents": (_stamp(audio_vae),),
            "conditions": (_stamp(files.checkpoint), _stamp(files.text_encoder)),
        }
        self._encoders = Encoders(files)
        self._cache = SampleCache(section.cache_dir, section.cache_gib * 2**30) if section.cache_dir else None
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self._clips)

    def name(self, index: int) -> str:
        """What messages call a sample: its place in a prepared data set."""
        return self._clips[index].row.key.as_posix()

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes that a batch of this sample and others must share."""
        return self._keys[index]

    def load(self, index: int) -> Sample:
        """Encodes one sample, or takes it from the cache: source -> field -> tensor or number, without a batch dim.

        Raises:
            ValueError: neither this clip nor the next ones of its shape can be read.
        """
        alike, place = self._alike[self._keys[index]], self._places[index]
        tries = min(len(alike), _TRIES)
        for step in range(tries):
            candidate = alike[(place + step) % len(alike)]
            try:
                return self._load(candidate)
            except MediaError as error:
                logger.warning(
                    "%s: left out, another clip of its shape takes its place: %s", self.name(candidate), error
                )
        raise ValueError(
            f"{self._section.dataset_path}: {self.name(index)} and the next {tries - 1} clips of its shape cannot be "
            "read; is the storage still there?"
        )

    @property
    def _has_audio(self) -> bool:
        return "audio_latents" in self.sources.values()

    def _load(self, index: int) -> Sample:
        sample = {key: self._fields(index, key) for key in self.sources.values()}
        if (found := shape_key_of(sample)) != self._keys[index]:
            changed = sorted({source for source, _, _ in set(found) ^ set(self._keys[index])})
            raise ValueError(
                f"{self._section.dataset_path}: {self.name(index)}: expected the shapes of when the run started, found "
                f"others in {changed}; files must not change during a run; start the run again."
            )
        return sample

    def _fields(self, index: int, key: str) -> Fields:
        clip = self._clips[index]
        cache = self._cache  # another thread may have given it up
        if cache is None:
            return check_fields(clip.row.media, self._encode(clip, key), _KINDS[key])
        entry = self._entry(clip, key)
        if (kept := cache.get(entry, _KINDS[key])) is not None:
            return kept
        fields = self._encode(clip, key)
        self._keep(cache, entry, fields)
        return check_fields(clip.row.media, fields, _KINDS[key])

    def _keep(self, cache: SampleCache, entry: str, fields: Fields) -> None:
        try:
            cache.put(entry, fields)
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s); going on without a cache", self._section.cache_dir, error.strerror
            )
            self._cache = None

    def _encode(self, clip: _Clip, key: str) -> Fields:
        """Reads and encodes; only what is wrong with the clip's own files is a MediaError."""
        path = clip.row.media
        match key:
            case "conditions":
                return self._encoders.text(self._caption(clip.row))
            case "video_latents":
                pixels = _reading(path, lambda: _read_pixels(path, clip.bucket))
                return self._encoders.video(pixels, float(clip.fps))
            case _:
                own = clip.row.audio or path
                audio = _reading(own, lambda: read_audio(own)) if clip.has_audio else None
                if clip.has_audio and audio is None:
                    raise MediaError(own, "has no audio track")
                return self._encoders.audio(audio, clip.duration_s)

    def _caption(self, row: SampleRow) -> str:
        assert row.caption is not None
        return with_trigger(row.caption, self._section.lora_trigger)

    def _entry(self, clip: _Clip, key: str) -> str:
        """Name in the cache: all that the fields depend on."""
        if key == "conditions":
            made_from = (self._caption(clip.row),)
        else:
            path = clip.row.audio or clip.row.media if key == "audio_latents" else clip.row.media
            made_from = (str(path.resolve()), _stamp(path), str(clip.bucket), str(clip.fps), clip.has_audio)
        return hashlib.sha256(repr((key, made_from, self._stamps[key])).encode()).hexdigest()

    def _find_clips(self) -> list[_Clip]:
        section = self._section
        table = read_sample_table(section.dataset_path, section.video_column, section.caption_column)
        if not table.has_video:
            raise ValueError(
                f"{section.dataset_path}: has audio only, whose latents are small enough to keep; prepare it with "
                'ltx-titan process-dataset and set data.source = "precomputed".'
            )
        buckets = parse_buckets(section.resolution_buckets or "", self._scale_factors)
        rejected = list(table.rejected)
        headers = _read_headers(Path(section.dataset_path), [row.media for row in table.samples])
        clips = []
        for row in table.samples:
            header = headers[row.media]
            try:
                if isinstance(header, str):
                    raise MediaError(row.media, header)
                if row.caption is None:
                    raise MediaError(row.media, "has no caption")
                if self._has_audio and table.has_audio and (row.audio is None or not row.audio.is_file()):
                    raise MediaError(row.media, f"has no file in the column 'audio' ({row.audio})")
                bucket = choose_bucket(buckets, header.width, header.height, header.frames)
                if bucket is None:
                    shortest = min(bucket.frames for bucket in buckets)
                    raise MediaError(row.media, f"has {header.frames} frame(s), the shortest bucket needs {shortest}")
            except MediaError as error:
                rejected.append((str(row.media), error.reason))
                continue
            clips.append(_Clip(row, bucket, Fraction(header.fps), header.has_audio or row.audio is not None))
        if rejected:
            examples = "; ".join(f"{item}: {reason}" for item, reason in rejected[:_EXAMPLES])
            more = "; ..." if len(rejected) > _EXAMPLES else ""
            logger.warning("%s: %d rows are left out: %s%s", section.dataset_path, len(rejected), examples, more)
        if not clips:
            raise ValueError(f"{section.dataset_path}: expected clips that can be used, found none.")
        return clips

    def _outline(self, clip: _Clip) -> Sample:
        """A sample as `load` will give it, without values."""
        time, down, right = self._scale_factors
        bucket = clip.bucket
        size = ((bucket.frames - 1) // time + 1, bucket.height // down, bucket.width // right)
        steps = max(1, round(clip.duration_s * AUDIO_STEPS_PER_SECOND))
        video_width, audio_width = self._text_widths
        audio: Fields = {
            "latents": torch.empty(AUDIO_CHANNELS, steps, AUDIO_BINS, device="meta"),
            "num_time_steps": steps,
            "frequency_bins": AUDIO_BINS,
            "duration": clip.duration_s,
        }
        outlines: dict[str, Fields] = {
            "video_latents": {
                "latents": torch.empty(VIDEO_CHANNELS, *size, device="meta"),
                **dict(zip(("num_frames", "height", "width"), size, strict=True)),
                "fps": float(clip.fps),
            },
            "audio_latents": audio if clip.has_audio else {**audio, "present": False},
            "conditions": {
                "video_prompt_embeds": torch.empty(MAX_TOKENS, video_width, device="meta"),
                "audio_prompt_embeds": torch.empty(MAX_TOKENS, audio_width, device="meta"),
                "prompt_attention_mask": torch.empty(MAX_TOKENS, device="meta"),
            },
        }
        return {key: outlines[key] for key in self.sources.values()}

    def _fingerprint(self) -> str:
        """Changes with the clips, their files' sizes, captions and shapes, not with the place of the folder."""
        digest = hashlib.sha256()
        for clip in self._clips:
            size = clip.row.media.stat().st_size
            digest.update(f"{clip.row.key}\0{size}\0{clip.bucket}\0{self._caption(clip.row)}\n".encode())
        return digest.hexdigest()[:32]


def _read_pixels(path: Path, bucket: Bucket) -> torch.Tensor:
    if is_image(path):
        return fit_frames(read_image(path), bucket.width, bucket.height)
    return read_clip(path, bucket.frames, bucket.width, bucket.height)


def _reading(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise MediaError(path, str(error)) from error


def _read_headers(table: Path, paths: list[Path]) -> dict[Path, _Header | str]:
    """Header of each file, or why it has none; remembered beside the table while files keep their size and time."""
    remembered = table.with_name(f".{table.name}.headers.json")
    try:
        known = {tuple(entry): _Header(*values) for entry, values in json.loads(remembered.read_text())}
    except (OSError, ValueError, TypeError):
        known = {}  # only a cache: without it the files are opened once more

    def read(path: Path) -> tuple[tuple[str, str] | None, _Header | str]:
        try:
            entry = (str(path), _stamp(path))
            return entry, known.get(entry) or _read_header(path)
        except MediaError as error:
            return None, error.reason
        except FileNotFoundError:
            return None, "no such file"
        except OSError as error:
            return None, str(error)

    # Opening files waits for the disk, so that more threads than cores help on network storage.
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(read, paths))
    rows = [(entry, tuple(vars(header).values())) for entry, header in found if entry is not None]
    if any(entry not in known for entry, _ in rows):
        temporary = remembered.with_name(f"{remembered.name}.tmp.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            temporary.write_text(json.dumps(rows))
            os.replace(temporary, remembered)
        except OSError as error:
            logger.info("%s: not written (%s); headers are read again next time", remembered, error.strerror)
    return {path: header for path, (_, header) in zip(paths, found, strict=True)}


def _read_header(path: Path) -> _Header:
    if is_image(path):
        image = read_image(path)
        return _Header(image.shape[2], image.shape[1], 1, _IMAGE_FPS, has_audio=False)
    info = probe_video(path)
    return _Header(info.width, info.height, info.frames, str(info.fps), info.has_audio)


def _stamp(path: Path) -> str:
    """What tells that a file has changed. A folder's is that of its files."""
    if path.is_dir():
        return " ".join(f"{file.name} {_stamp(file)}" for file in sorted(path.iterdir()) if file.is_file())
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _optional(path: str | None) -> Path | None:
    return Path(path) if path is not None else None
