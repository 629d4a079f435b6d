"""A dataset that encodes clips and captions while training, for datasets too large to be stored encoded.

It reads the table that `process-dataset` reads and behaves like prepared data to the rest of training: shapes are known
from headers before training, `load` returns what a prepared sample holds, bit for bit, and random draws, batches and
resuming are the same. Encoded samples can be cached on disk up to a size.

A clip can turn out to be broken when it is decoded. Another one of the same shape then replaces it, with a warning: the
order of all others stays, and a run of several days does not end at one file.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch

from ltx_titan.codecs import load_audio_codec, load_video_codec, text_encoder_config, text_feature_widths
from ltx_titan.codecs.text_encoder import MAX_TOKENS
from ltx_titan.common.files import printable
from ltx_titan.config.sections import MediaSection
from ltx_titan.data import Sample, ShapeKey, fingerprint_of, shape_key_of
from ltx_titan.data.cache import READER_THREADS, SampleCache, read_index, write_index
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, VIDEO_CHANNELS, Fields, Kind, check_fields
from ltx_titan.encode.buckets import parse_buckets
from ltx_titan.encode.captions import with_trigger
from ltx_titan.encode.clips import Clip, ClipRules, plan_clip, read_header, read_pixels
from ltx_titan.encode.encoders import EncoderFiles, Encoders
from ltx_titan.encode.latents import audio_steps
from ltx_titan.media import MediaError, VideoInfo, read_audio
from ltx_titan.tables.samples import SampleRow, SampleTable, read_sample_table, table_folder
from ltx_titan.weights.metadata import read_metadata, scale_factors

logger = logging.getLogger(__name__)

T = TypeVar("T")

_KINDS: dict[str, Kind] = {"video_latents": "video", "audio_latents": "audio", "conditions": "text"}
# Rejected rows that a warning names.
_EXAMPLES = 3
# Version of the readers in media/ and encode/: samples cached with another show other pixels.
_READERS = 3
# After this many failures in a row the storage is at fault, not the clips.
_MAX_ATTEMPTS = 10


@dataclass(frozen=True)
class _UsableRow:
    """A row that can be used, and the shape that its clip is brought to."""

    row: SampleRow
    clip: Clip
    has_audio: bool


class MediaDataset:
    """The clips of a table, encoded when they are loaded."""

    def __init__(self, section: MediaSection, sources: Mapping[str, str], checkpoint_path: str | Path) -> None:
        """Reads the table and the headers of all files; loads no encoder.

        Args:
            section: the job's `[data.media]`.
            sources: folders that a prepared dataset would have, each with its key in a batch.
            checkpoint_path: file with the text projection, and with the VAEs unless the section names other files.

        Raises:
            ValueError: the table, a checkpoint or the text encoder cannot be used, or none of the clips.
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
        )
        assert files.text_encoder is not None
        table = read_sample_table(section.dataset_path, section.video_column, section.caption_column)
        config = read_metadata(files.checkpoint).config
        # On the meta device: every name and shape is checked, nothing is read.
        load_video_codec(files.video_path, "meta", part="encoder")
        if self._has_audio:
            load_audio_codec(files.audio_path, "meta", part="encoder")
        self._text_widths = text_feature_widths(config, text_encoder_config(files.text_encoder))
        # Of the file with the video VAE: the transformer's file need not describe it.
        self._scale_factors = scale_factors(read_metadata(files.video_path).config)
        buckets = parse_buckets(section.resolution_buckets or "", self._scale_factors, "data.media.resolution_buckets")
        self._rules = ClipRules(buckets, self._scale_factors)
        self._rows = self._find_rows(table)
        # From headers alone: buckets and batches of the whole dataset are planned before a clip is decoded.
        self._keys = [shape_key_of(self._outline(usable)) for usable in self._rows]
        # Rows of each shape, and the position of each row among them: a broken clip is replaced by the next.
        self._alike: dict[ShapeKey, list[int]] = defaultdict(list)
        self._positions = []
        for index, key in enumerate(self._keys):
            self._positions.append(len(self._alike[key]))
            self._alike[key].append(index)
        # Part of every cache key: another model, or the same name with other weights, must not hit old entries.
        self._model_stamps = {
            "video_latents": (_stamp(files.video_path), section.vae_tiling),
            "audio_latents": (_stamp(files.audio_path),),
            "conditions": (_stamp(files.checkpoint), _stamp(files.text_encoder)),
        }
        # Independent of the path of the table, as for prepared data.
        self.fingerprint = fingerprint_of(
            f"{usable.row.key}\0{usable.row.media.stat().st_size}\0{usable.clip.bucket}\0{self._caption(usable.row)}"
            for usable in self._rows
        )
        self._encoders = Encoders(files, section.offload_text_encoder)
        self._cache = SampleCache(section.cache_dir, section.cache_gib * 2**30) if section.cache_dir else None

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """Name of a sample in messages: its relative path in a prepared dataset."""
        return self._rows[index].row.key.as_posix()

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes of a sample; those of equal keys can share a batch."""
        return self._keys[index]

    def load(self, index: int) -> Sample:
        """Encodes one sample, or reads it from the cache: source -> field -> tensor or number, without a batch dim.

        Raises:
            ValueError: neither this clip nor the next ones of its shape can be read.
        """
        alike, position = self._alike[self._keys[index]], self._positions[index]
        attempts = min(len(alike), _MAX_ATTEMPTS)
        for attempt in range(attempts):
            # The next of its shape, not a random one: ranks and resumed runs choose the same.
            candidate = alike[(position + attempt) % len(alike)]
            try:
                return self._load(candidate)
            # Only errors of the clip's own files: one of the encoder (out of memory, a bug) would hit every clip.
            except MediaError as error:
                logger.warning("%s: skipped, another clip of its shape replaces it: %s", self.name(candidate), error)
        raise ValueError(
            f"{self._section.dataset_path}: {self.name(index)} and the next {attempts - 1} clips of its shape cannot "
            "be read; check that the storage is available."
        )

    def peek(self, index: int) -> Sample:
        """A sample as `load` will return it, with tensors on the meta device: tells which streams are present."""
        return self._outline(self._rows[index])

    @property
    def _has_audio(self) -> bool:
        return "audio_latents" in self.sources.values()

    def _load(self, index: int) -> Sample:
        sample = {key: self._fields(index, key) for key in self.sources.values()}
        # The batch was planned from headers; another shape would fail later, in `stack`, without a file name.
        if (found := shape_key_of(sample)) != self._keys[index]:
            changed = sorted({source for source, _, _ in set(found) ^ set(self._keys[index])})
            raise ValueError(
                f"{self._section.dataset_path}: {self.name(index)}: expected the shapes of when the run started, found "
                f"others in {changed}; files must not change during a run; start the run again."
            )
        return sample

    def _fields(self, index: int, key: str) -> Fields:
        usable = self._rows[index]
        cache = self._cache  # Once: another thread may disable it in the meantime.
        if cache is None:
            return check_fields(usable.row.media, self._encode(usable, key), _KINDS[key])
        entry = self._cache_key(usable, key)
        cached = cache.get(entry, _KINDS[key])
        if cached is not None:
            return cached
        fields = self._encode(usable, key)
        try:
            cache.put(entry, fields)
        except OSError as error:
            logger.warning(
                "%s: cannot be written (%s); continuing without a cache", self._section.cache_dir, error.strerror
            )
            # A full cache disk slows training down but does not end it.
            self._cache = None
        return check_fields(usable.row.media, fields, _KINDS[key])

    def _encode(self, usable: _UsableRow, key: str) -> Fields:
        """Reads and encodes one source of a sample; a MediaError means that the row's own files are at fault."""
        row, clip = usable.row, usable.clip
        match key:
            case "conditions":
                return self._encoders.text(self._caption(row))
            case "video_latents":
                pixels = _with_media_error(row.media, lambda: read_pixels(row.media, clip, self._rules, row.key))
                return self._encoders.video(pixels, float(clip.fps))
            case _:
                audio = None
                if usable.has_audio:
                    path = row.audio or row.media
                    audio = _with_media_error(path, lambda: read_audio(path))
                    if audio is None:
                        raise MediaError(path, "has no audio track")
                return self._encoders.audio(audio, clip.duration_s)

    def _caption(self, row: SampleRow) -> str:
        assert row.caption is not None
        return with_trigger(row.caption, self._section.lora_trigger)

    def _cache_key(self, usable: _UsableRow, key: str) -> str:
        """Hash of everything that the fields depend on."""
        row, clip = usable.row, usable.clip
        inputs: tuple[object, ...]
        if key == "conditions":
            inputs = (self._caption(row),)
        else:
            path = row.audio or row.media if key == "audio_latents" else row.media
            # Path, size and time instead of a hash of the content, which would read every video in full.
            version = _with_media_error(path, lambda: _stamp(path))
            inputs = (str(path.resolve()), version, str(clip.bucket), str(clip.fps), usable.has_audio)
        return hashlib.sha256(repr((_READERS, key, inputs, self._model_stamps[key])).encode()).hexdigest()

    def _find_rows(self, table: SampleTable) -> list[_UsableRow]:
        section = self._section
        assert section.dataset_path is not None, "required by the section"
        if not table.has_video:
            raise ValueError(
                f"{section.dataset_path}: has audio only, whose latents are small enough to be stored; prepare it with "
                'ltx-titan process-dataset and set data.source = "precomputed".'
            )
        rejected = list(table.rejected)
        headers = _read_headers(Path(section.dataset_path), [row.media for row in table.samples])
        usable = []
        for row in table.samples:
            try:
                usable.append(self._check_row(row, table, headers[row.media]))
            except MediaError as error:
                rejected.append((str(row.media), error.reason))
        if rejected:
            examples = "; ".join(f"{item}: {reason}" for item, reason in rejected[:_EXAMPLES])
            more = "; ..." if len(rejected) > _EXAMPLES else ""
            logger.warning("%s: %d rows are skipped: %s%s", section.dataset_path, len(rejected), examples, more)
        noted: dict[str, list[str]] = defaultdict(list)
        for one in usable:
            for note in one.clip.notes:
                noted[note].append(printable(one.row.media))
        for note, names in noted.items():
            more = ", ..." if len(names) > _EXAMPLES else ""
            examples = ", ".join(names[:_EXAMPLES]) + more
            logger.warning("%s: %d %s: %s", section.dataset_path, len(names), note, examples)
        if not usable:
            raise ValueError(f"{section.dataset_path}: expected clips that can be used, found none.")
        return usable

    def _check_row(self, row: SampleRow, table: SampleTable, header: VideoInfo | MediaError) -> _UsableRow:
        if isinstance(header, MediaError):
            raise header
        if row.caption is None:
            raise MediaError(row.media, "has no caption")
        if self._has_audio and table.has_audio and (row.audio is None or not row.audio.is_file()):
            raise MediaError(row.media, f"has no file in the column 'audio' ({row.audio})")
        clip = plan_clip(row.media, self._rules, header)
        return _UsableRow(row, clip, header.has_audio or row.audio is not None)

    def _outline(self, usable: _UsableRow) -> Sample:
        """A sample of the shapes that `load` will return, on the meta device."""
        clip = usable.clip
        size = clip.latent_size(self._scale_factors)
        steps = audio_steps(clip.duration_s)
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
            "audio_latents": audio if usable.has_audio else {**audio, "present": False},
            "conditions": {
                "video_prompt_embeds": torch.empty(MAX_TOKENS, video_width, device="meta"),
                "audio_prompt_embeds": torch.empty(MAX_TOKENS, audio_width, device="meta"),
                "prompt_attention_mask": torch.empty(MAX_TOKENS, device="meta"),
            },
        }
        return {key: outlines[key] for key in self.sources.values()}


def _with_media_error(path: Path, read: Callable[[], T]) -> T:
    """Calls `read`; an OSError becomes a MediaError, so that it is blamed on the clip and not on the encoder."""
    try:
        return read()
    except OSError as error:
        raise MediaError(path, str(error)) from error


def _read_headers(table: Path, paths: Sequence[Path]) -> dict[Path, VideoInfo | MediaError]:
    """Reads the header of each file, or the reason why it has none; indexed next to the table."""
    index_path = table_folder(table) / f".{table.name}.headers.json"
    # Probing every file of a large dataset takes far longer than reading one index.
    known = read_index(index_path, _header_from_json)

    def read(path: Path) -> tuple[tuple[str, str] | None, VideoInfo | MediaError]:
        try:
            entry = (str(path), _stamp(path))
            return entry, known.get(entry) or read_header(path)
        except MediaError as error:
            return None, error
        except FileNotFoundError:
            return None, MediaError(path, "no such file")
        except OSError as error:
            return None, MediaError(path, str(error))

    # Threads: opening files on network storage is mostly waiting.
    with ThreadPoolExecutor(max_workers=READER_THREADS) as pool:
        found = list(pool.map(read, paths))
    entries = {entry: header for entry, header in found if entry is not None and isinstance(header, VideoInfo)}
    # Only if something is new: ranks and jobs that share the table then do not rewrite the index at every start.
    if entries.keys() - known.keys():
        write_index(index_path, {entry: _header_to_json(header) for entry, header in entries.items()})
    return {path: header for path, (_, header) in zip(paths, found, strict=True)}


def _header_from_json(values: Mapping[str, Any]) -> VideoInfo:
    return VideoInfo(**{**values, "fps": Fraction(values["fps"])})


def _header_to_json(header: VideoInfo) -> dict[str, Any]:
    return {**asdict(header), "fps": str(header.fps)}


def _stamp(path: Path) -> str:
    """Version of a file by size and modification time; that of a folder is the version of its files."""
    if path.is_dir():
        return " ".join(f"{file.name} {_stamp(file)}" for file in sorted(path.iterdir()) if file.is_file())
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _optional(path: str | None) -> Path | None:
    return Path(path) if path is not None else None
