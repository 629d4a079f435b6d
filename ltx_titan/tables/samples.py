"""Dataset tables: one row per sample, in `.csv`, `.json` (a list of objects) or `.jsonl`, or a folder of clips.

Every command reads and writes tables through this module. Columns: `video` (or `media_path`), `caption`, `audio`,
`reference_video` (or `ref_media_path`), `reference_audio`, `video_mask`, `audio_mask`. Paths are relative to the
table's folder. A folder whose clips have a text file `NAME.txt` beside them is a table of `media_path` and `caption`.

A sample is stored under the path of its main media in every output folder, so two rows with one path would overwrite
each other; `read_sample_table` rejects the second before any work is done.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltx_titan.common.files import name_problem, printable
from ltx_titan.tables.files import (
    EXTRA_COLUMNS,
    MEDIA_COLUMNS,
    PATH_COLUMNS,
    TABLE_SUFFIXES,
    VIDEO_COLUMNS,
    Row,
    TableRows,
    is_table,
    not_text,
    read_rows,
    read_table,
    table_folder,
    write_table,
)

__all__ = [
    "PATH_COLUMNS",
    "TABLE_SUFFIXES",
    "Row",
    "SampleRow",
    "SampleTable",
    "TableRows",
    "is_table",
    "media_of_row",
    "moved_row",
    "read_rows",
    "read_sample_table",
    "read_table",
    "relative_name",
    "relative_sample_path",
    "split_window_key",
    "table_folder",
    "window_key",
    "write_table",
]

_WINDOW = re.compile(r"\.w(\d{6,})\.pt$")


@dataclass(frozen=True)
class SampleRow:
    """A usable row of a table, or one window of its clip.

    Attributes:
        row: number in the table, from 1.
        key: path of the outputs below each output folder, ending in `.pt`.
        video: video or still image, None in a dataset of audio only.
        audio: separate audio file, None without one.
        caption: the text; None if the row has none.
        extras: further files by column (`reference_video`, `reference_audio`, `video_mask`, `audio_mask`); only those
            that the row names.
        start: first frame, at the rate that the video is read at.
    """

    row: int
    key: Path
    video: Path | None
    audio: Path | None
    caption: str | None
    extras: Mapping[str, Path] = field(default_factory=dict)
    start: int = 0

    @property
    def media(self) -> Path:
        """The main file, which the sample is named after: the video, or the audio without one."""
        media = self.video or self.audio
        assert media is not None
        return media

    def subject(self, path: Path | str) -> str:
        """Name of one of the row's files in messages, with the window."""
        return f"{path} from frame {self.start}" if self.start else str(path)


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


def media_of_row(row: Mapping[str, Any], table: Path) -> Path | None:
    """The main file of a row: its video, or its audio without one; None for a row with neither."""
    value = next((row[column] for column in MEDIA_COLUMNS if row.get(column)), None)
    return None if value is None else table_folder(table) / str(value)


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
        base: folder that the paths in the table are relative to.
    """
    media, base = Path(os.path.abspath(media)), Path(os.path.abspath(base))
    relative = media.relative_to(base) if media.is_relative_to(base) else media.relative_to(media.anchor)
    return relative.with_suffix(".pt")


def window_key(key: Path, start: int) -> Path:
    """Path of the sample of a clip's window: that of the clip if it starts at frame 0, else with the first frame.

    `a.pt` sorts before `a.w000089.pt`, and six digits last for hours of video.
    """
    return key.with_name(f"{key.name.removesuffix('.pt')}.w{start:06d}.pt") if start else key


def split_window_key(key: str) -> tuple[str, int]:
    """Inverse of `window_key`: path of the clip's first sample, and the first frame of the window."""
    match = _WINDOW.search(key)
    return (f"{key[: match.start()]}.pt", int(match[1])) if match else (key, 0)


def read_sample_table(
    path: str | Path,
    video_column: str | None = None,
    caption_column: str | None = None,
    needs_captions: bool = True,
) -> SampleTable:
    """Reads a table and resolves its columns and paths.

    Args:
        path: the table, or a folder of clips with captions.
        video_column: name of the column of videos, if not `video` or `media_path`.
        caption_column: name of the column of captions, if not `caption`.
        needs_captions: whether a table without captions is an error.

    Raises:
        ValueError: the table cannot be read, or lacks the columns that are needed.
    """
    path = Path(path)
    found = read_rows(path)
    if not found.rows:
        raise ValueError(f"{path}: has no rows")
    # Over all rows: JSON rows may have columns that the first one lacks.
    columns = list(dict.fromkeys(column for _, row in found.rows for column in row))
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

    text_columns = [column for column in (video_column, audio_column, caption_column) if column is not None]
    base = table_folder(path)
    samples: dict[Path, SampleRow] = {}
    folders: set[Path] = set()
    rejected = list(found.rejected)
    for number, row in found.rows:
        problem = not_text(row, text_columns)
        if problem is not None:
            rejected.append((f"row {number}", problem))
            continue
        video = _resolve(base, row.get(video_column)) if video_column else None
        audio = _resolve(base, row.get(audio_column)) if audio_column else None
        # A table with a column of videos is never read as one of audio, not even in rows without a video.
        main = video if video_column else audio
        if main is None:
            rejected.append((f"row {number}", f"column {video_column or audio_column!r} is empty"))
            continue
        caption = row.get(caption_column) if caption_column else None
        if path.is_dir() and needs_captions and not caption:
            kind = "an empty" if caption == "" else "no"
            rejected.append((str(main), f"has {kind} text file {main.stem}.txt beside it; write its caption there"))
            continue
        files = {name: _resolve(base, row.get(column)) for name, column in extras.items()}
        try:
            key = relative_sample_path(main, base)
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
            caption=caption,
            extras={name: file for name, file in files.items() if file is not None},
        )
    return SampleTable(
        samples=tuple(samples.values()),
        rejected=tuple(rejected),
        has_video=video_column is not None,
        has_audio=audio_column is not None,
        extras=tuple(extras),
    )


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


def _resolve(base: Path, value: str | None) -> Path | None:
    # An absolute path replaces the folder, so both kinds may be mixed.
    return base / value if value else None
