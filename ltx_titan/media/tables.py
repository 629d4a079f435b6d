"""The metadata file of a data set: one row per sample, columns decide what is done with it.

`.csv`, `.json` (a list of objects) and `.jsonl` are read. Columns: `video` (or `media_path`), `caption`, `audio`,
`reference_video` (or `ref_media_path`), `reference_audio`, `video_mask`, `audio_mask`. Paths are relative to the
metadata file's folder. A sample is stored under the path of its main media in every output folder, so two rows with
one path would overwrite each other; they are told apart here, before any work is done.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx_titan.data import relative_sample_path

_SUFFIXES = (".csv", ".json", ".jsonl")
_VIDEO_COLUMNS = ("video", "media_path")
_REFERENCE_COLUMNS = ("reference_video", "ref_media_path")
# Column of a file that goes with the main one -> names it may have.
_EXTRAS = {
    "reference_video": _REFERENCE_COLUMNS,
    "reference_audio": ("reference_audio",),
    "video_mask": ("video_mask",),
    "audio_mask": ("audio_mask",),
}


@dataclass(frozen=True)
class Sample:
    """One row.

    Attributes:
        row: number in the file, from 1.
        key: path of the outputs below each output folder, ending in `.pt`.
        video: video or still image, None in a data set of audio only.
        audio: separate audio file, None where there is none.
        caption: the text; None where the row has none.
        extras: further files by column (`reference_video`, `reference_audio`, `video_mask`, `audio_mask`), those that
            the row names.
    """

    row: int
    key: Path
    video: Path | None
    audio: Path | None
    caption: str | None
    extras: Mapping[str, Path] = field(default_factory=dict)

    @property
    def media(self) -> Path:
        """The file the sample is named after."""
        media = self.video or self.audio
        assert media is not None
        return media


@dataclass(frozen=True)
class Dataset:
    """The rows of a metadata file.

    Attributes:
        samples: usable rows.
        rejected: (what, why) of rows that cannot be used.
        has_video: whether there is a column of videos.
        has_audio: whether there is a column of audio.
        extras: columns of further files that there are.
    """

    samples: tuple[Sample, ...]
    rejected: tuple[tuple[str, str], ...]
    has_video: bool
    has_audio: bool
    extras: tuple[str, ...] = ()


def read_dataset(
    path: str | Path,
    video_column: str | None = None,
    caption_column: str | None = None,
    needs_captions: bool = True,
) -> Dataset:
    """Read a metadata file.

    Args:
        path: the file.
        video_column: name of the column of videos, if not `video` or `media_path`.
        caption_column: name of the column of captions, if not `caption`.
        needs_captions: whether a file without captions is of no use.

    Raises:
        ValueError: the file cannot be read, or its columns say nothing to do.
    """
    path = Path(path)
    rows = _read_rows(path)
    if not rows:
        raise ValueError(f"{path}: has no rows")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    video_column = _choose(path, columns, video_column, _VIDEO_COLUMNS, "--video-column")
    caption_column = _choose(path, columns, caption_column, ("caption",), "--caption-column")
    audio_column = "audio" if "audio" in columns else None
    if caption_column is None and needs_captions:
        raise ValueError(f"{path}: has no column 'caption' (columns: {columns}); name it with --caption-column")
    if video_column is None and audio_column is None:
        raise ValueError(f"{path}: has no column 'video', 'media_path' or 'audio' (columns: {columns})")

    extras = {
        name: column
        for name, names in _EXTRAS.items()
        if (column := _choose(path, columns, None, names, "one name")) is not None
    }

    samples: list[Sample] = []
    rejected: list[tuple[str, str]] = []
    seen: dict[Path, Sample] = {}
    for number, row in enumerate(rows, start=1):
        video, audio = (_path(path, row.get(column)) if column else None for column in (video_column, audio_column))
        main = video if video_column else audio
        if main is None:
            rejected.append((f"row {number}", f"column {video_column or audio_column!r} is empty"))
            continue
        caption = row.get(caption_column) if caption_column else None
        key = relative_sample_path(main, path.parent)
        files = {name: _path(path, row.get(column)) for name, column in extras.items()}
        sample = Sample(
            number,
            key,
            video,
            audio,
            None if caption is None else str(caption),
            {name: file for name, file in files.items() if file is not None},
        )
        if key in seen:
            rejected.append((str(main), f"row {number} has the same output {key} as row {seen[key].row}; rename one"))
            continue
        seen[key] = sample
        samples.append(sample)
    return Dataset(tuple(samples), tuple(rejected), video_column is not None, audio_column is not None, tuple(extras))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the data set's metadata, one of {', '.join(_SUFFIXES)}")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known, expected one of {', '.join(_SUFFIXES)}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".csv":
        return [dict(row) for row in csv.DictReader(text.splitlines(keepends=True))]
    try:
        if path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one per sample")
    return rows


def _choose(path: Path, columns: Sequence[str], wanted: str | None, known: Sequence[str], option: str) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path}: has no column {wanted!r}, which {option} names (columns: {list(columns)})")
        return wanted
    found = [column for column in known if column in columns]
    if len(found) > 1:
        raise ValueError(f"{path}: has the columns {found}, which mean the same; choose one with {option}")
    return found[0] if found else None


def _path(metadata: Path, value: Any) -> Path | None:
    return metadata.parent / str(value) if value else None
