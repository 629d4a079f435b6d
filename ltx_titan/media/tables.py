"""Dataset tables: one row per sample, in `.csv`, `.json` (a list of objects) or `.jsonl`.

Every command reads and writes tables through this module. Columns: `video` (or `media_path`), `caption`, `audio`,
`reference_video` (or `ref_media_path`), `reference_audio`, `video_mask`, `audio_mask`. Paths are relative to the
table's folder.

A sample is stored under the path of its main media in every output folder, so two rows with one path would overwrite
each other; `read_sample_table` rejects the second before any work is done.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx_titan.common.files import name_problem, printable, write_text

TABLE_SUFFIXES = (".csv", ".json", ".jsonl")
VIDEO_COLUMNS = ("video", "media_path")
MEDIA_COLUMNS = (*VIDEO_COLUMNS, "audio")
EXTRA_COLUMNS = {
    "reference_video": ("reference_video", "ref_media_path"),
    "reference_audio": ("reference_audio",),
    "video_mask": ("video_mask",),
    "audio_mask": ("audio_mask",),
}
"""Column of a file that goes with the main one -> names that it may have."""
PATH_COLUMNS = (*MEDIA_COLUMNS, *(name for names in EXTRA_COLUMNS.values() for name in names))

Row = dict[str, Any]
"""A row as stored: column -> value."""


@dataclass(frozen=True)
class SampleRow:
    """A usable row of a table.

    Attributes:
        row: number in the table, from 1.
        key: path of the outputs below each output folder, ending in `.pt`.
        video: video or still image, None in a dataset of audio only.
        audio: separate audio file, None without one.
        caption: the text; None if the row has none.
        extras: further files by column (`reference_video`, `reference_audio`, `video_mask`, `audio_mask`); only those
            that the row names.
    """

    row: int
    key: Path
    video: Path | None
    audio: Path | None
    caption: str | None
    extras: Mapping[str, Path] = field(default_factory=dict)

    @property
    def media(self) -> Path:
        """The main file, which the sample is named after: the video, or the audio without one."""
        media = self.video or self.audio
        assert media is not None
        return media


@dataclass(frozen=True)
class SampleTable:
    """All rows of a table.

    Attributes:
        samples: usable rows.
        rejected: (item, reason) of rows that cannot be used.
        has_video: whether the table has a column of videos.
        has_audio: whether the table has a column of audio files.
        extras: columns of further files that the table has.
    """

    samples: tuple[SampleRow, ...]
    rejected: tuple[tuple[str, str], ...]
    has_video: bool
    has_audio: bool
    extras: tuple[str, ...] = ()


def is_table(path: Path) -> bool:
    """Whether a path is a dataset table, by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_table(path: Path) -> list[Row]:
    """Reads the rows of a table, all columns kept; a byte order mark is accepted.

    Raises:
        ValueError: the file is missing, is not UTF-8, or is not a table.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a table, one of {', '.join(TABLE_SUFFIXES)}")
    if not is_table(path):
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known, expected one of {', '.join(TABLE_SUFFIXES)}")
    try:
        # newline="": line breaks within quoted CSV fields stay as they are.
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                return [dict(row) for row in csv.DictReader(file)]
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}); save it in that encoding") from error
    except csv.Error as error:
        raise ValueError(f"{path}: not valid CSV: {error}") from error
    rows = _parse_json(path, text)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one per sample")
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table atomically in the format of its suffix. Rows may lack columns."""
    if path.suffix.lower() == ".csv":
        buffer = io.StringIO(newline="")
        # The union of all rows' columns, in order of appearance: writers may add a column to some rows only.
        writer = csv.DictWriter(buffer, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif path.suffix.lower() == ".json":
        # Captions in any script stay readable.
        text = json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)


def media_of_row(row: Mapping[str, Any], table: Path) -> Path | None:
    """The main file of a row: its video, or its audio without one; None for a row with neither."""
    value = next((row[column] for column in MEDIA_COLUMNS if row.get(column)), None)
    # An absolute path replaces the folder, so both kinds may be mixed.
    return None if value is None else table.parent / str(value)


def relative_name(path: Path, base: Path) -> str:
    """The name of a file in a table of folder `base`: relative if the file is below it, else the absolute path."""
    # Not `resolve`: a symbolic link into the folder is named as the user sees it.
    path, base = Path(os.path.abspath(path)), Path(os.path.abspath(base))
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def moved_row(row: Mapping[str, Any], old: Path, new: Path) -> Row:
    """A row of a table in folder `old` for a table in folder `new`: its paths are relative to the latter."""
    # Unchanged, so that a table that is written back keeps its paths as the user wrote them.
    if old.resolve() == new.resolve():
        return dict(row)
    return {
        column: relative_name(old / str(value), new) if column in PATH_COLUMNS and value else value
        for column, value in row.items()
    }


def relative_sample_path(media: str | Path, base: str | Path) -> Path:
    """Path of a sample below each source folder: that of its main media file below `base`, with the suffix `.pt`.

    Media outside `base` are mirrored with their absolute path, so that no two of them collide.

    Args:
        media: the video, or the audio without one.
        base: folder of the table.
    """
    media, base = Path(os.path.abspath(media)), Path(os.path.abspath(base))
    relative = media.relative_to(base) if media.is_relative_to(base) else media.relative_to(media.anchor)
    return relative.with_suffix(".pt")


def read_sample_table(
    path: str | Path,
    video_column: str | None = None,
    caption_column: str | None = None,
    needs_captions: bool = True,
) -> SampleTable:
    """Reads a table and resolves its columns and paths.

    Args:
        path: the table.
        video_column: name of the column of videos, if not `video` or `media_path`.
        caption_column: name of the column of captions, if not `caption`.
        needs_captions: whether a table without captions is an error.

    Raises:
        ValueError: the table cannot be read, or lacks the columns that are needed.
    """
    path = Path(path)
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path}: has no rows")
    # Over all rows: JSON rows may have columns that the first one lacks.
    columns = list(dict.fromkeys(column for row in rows for column in row))
    video_column = _choose_column(path, columns, video_column, VIDEO_COLUMNS, "--video-column")
    caption_column = _choose_column(path, columns, caption_column, ("caption",), "--caption-column")
    audio_column = "audio" if "audio" in columns else None
    if caption_column is None and needs_captions:
        raise ValueError(f"{path}: has no column 'caption' (columns: {columns}); name it with --caption-column")
    if video_column is None and audio_column is None:
        raise ValueError(f"{path}: has no column 'video', 'media_path' or 'audio' (columns: {columns})")
    extras = {}
    for name, known in EXTRA_COLUMNS.items():
        column = _choose_column(path, columns, None, known, "one name")
        if column is not None:
            extras[name] = column

    samples: dict[Path, SampleRow] = {}
    folders: set[Path] = set()
    rejected: list[tuple[str, str]] = []
    for number, row in enumerate(rows, start=1):
        if reason := _row_problem(row, caption_column):
            rejected.append((f"row {number}", reason))
            continue
        video = _resolve(path, row.get(video_column)) if video_column else None
        audio = _resolve(path, row.get(audio_column)) if audio_column else None
        # A table with a column of videos is never read as one of audio, not even in rows without a video.
        main = video if video_column else audio
        if main is None:
            rejected.append((f"row {number}", f"column {video_column or audio_column!r} is empty"))
            continue
        caption = row.get(caption_column) if caption_column else None
        files = {name: _resolve(path, row.get(column)) for name, column in extras.items()}
        try:
            key = relative_sample_path(main, path.parent)
            problem = name_problem(key)
            if key in folders or not samples.keys().isdisjoint(key.parents):
                problem = f"its output {key} and another row's would be a file and a folder of one name; rename one"
        except ValueError as error:
            problem = f"names no file ({error})"
        if problem is not None:
            rejected.append((f"row {number} ({printable(str(main)[:80])})", problem))
            continue
        if key in samples:
            reason = f"row {number} has the same output {key} as row {samples[key].row}; rename one"
            rejected.append((str(main), reason))
            continue
        folders.update(key.parents)
        samples[key] = SampleRow(
            row=number,
            key=key,
            video=video,
            audio=audio,
            caption=None if caption is None else str(caption),
            extras={name: file for name, file in files.items() if file is not None},
        )
    return SampleTable(
        samples=tuple(samples.values()),
        rejected=tuple(rejected),
        has_video=video_column is not None,
        has_audio=audio_column is not None,
        extras=tuple(extras),
    )


def _row_problem(row: Mapping[Any, Any], caption_column: str | None) -> str:
    """What is wrong with the cells of a row, whatever files they name; empty if nothing is."""
    # csv stores surplus cells under None: an unquoted comma would cut a caption short.
    if None in row:
        return "has more cells than the header; put texts with commas in quotes"
    for column, value in row.items():
        if column not in PATH_COLUMNS and column != caption_column:
            continue
        if value is not None and not isinstance(value, str):
            return f"{column}: expected text, found {type(value).__name__}; put it in quotes"
        if value and ("\0" in value or not _is_unicode(value)):
            return f"{column}: expected text, found a null byte or half a character; correct it"
        if value and column in PATH_COLUMNS and not Path(value).name:
            return f"{column}: expected a file, found {value!r}; correct it"
    return ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can hold
        return False
    return True


def _parse_json(path: Path, text: str) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from error
    rows = []
    # Not splitlines(): it also splits at U+0085, U+2028 and U+2029, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not valid JSON: {error}") from error
    return rows


def _choose_column(
    path: Path, columns: Sequence[str], wanted: str | None, known: Sequence[str], option: str
) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"{path}: has no column {wanted!r}, which {option} names (columns: {list(columns)})")
        return wanted
    found = [column for column in known if column in columns]
    # Choosing silently could train on the wrong file of each row.
    if len(found) > 1:
        raise ValueError(f"{path}: has the columns {found}, which mean the same; choose one with {option}")
    return found[0] if found else None


def _resolve(table: Path, value: Any) -> Path | None:
    return table.parent / str(value) if value else None
