"""Media files that commands find and images that they write.

Commands need no process group. Under torchrun each rank processes every N-th item, and when it is done writes the whole
table from the outputs that all ranks have on disk by then; the last one sees all of them.
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from ltx_titan.common.files import atomic_write, write_text

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"})
# Endings of reference files by kind. Datasets on disk use the British spelling.
REFERENCE_SUFFIXES = {"edges": "_edges", "gray": "_grey", "grey": "_grey", "blur": "_blur", "depth": "_depth"}
TABLE_SUFFIXES = (".csv", ".json", ".jsonl")
MEDIA_COLUMNS = ("video", "media_path", "audio")
PATH_COLUMNS = (
    *MEDIA_COLUMNS,
    "reference_video",
    "ref_media_path",
    "reference_audio",
    "video_mask",
    "audio_mask",
)

Item = TypeVar("Item")
Row = dict[str, Any]


def find_media(folder: Path, suffixes: frozenset[str], recursive: bool = True) -> list[Path]:
    """Media files of a folder with given suffixes, sorted by path.

    Hidden files and folders are skipped, and so are references (`a_edges.mp4`) of clips in the same folder (`a.mp4`).

    Raises:
        ValueError: the folder does not exist, or contains no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    found = [
        path
        for path in (folder.rglob("*") if recursive else folder.iterdir())
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        kinds = ", ".join(sorted(suffixes))
        below = "" if recursive else "; add --recursive to search its subfolders"
        raise ValueError(f"{folder}: contains no media files ({kinds}){below}")
    names = {path.with_suffix("") for path in found}
    return sorted(path for path in found if not any(clip in names for clip in _clips_of(path)))


def _clips_of(path: Path) -> list[Path]:
    """Paths without suffix of the clips that a file is a reference of, judging by its name."""
    endings = set(REFERENCE_SUFFIXES.values())
    return [path.with_name(path.stem.removesuffix(ending)) for ending in endings if path.stem.endswith(ending)]


def is_table(path: Path) -> bool:
    """Whether a path is a data set's table, by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES


def read_table(path: Path) -> list[Row]:
    """Rows of a .csv, .json (a list of objects) or .jsonl file, all columns kept.

    Raises:
        ValueError: there is no such file, or it is of another form.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a table, one of {', '.join(TABLE_SUFFIXES)}")
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix.lower() == ".csv":
        return [dict(row) for row in csv.DictReader(io.StringIO(text, newline=""))]
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one per sample")
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table in the form that its suffix says; complete or not at all. Rows may lack columns."""
    if path.suffix.lower() == ".csv":
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    elif path.suffix.lower() == ".json":
        text = json.dumps(list(rows), ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)


def write_image(path: Path, frame: np.ndarray) -> None:
    """Writes a frame uint8 [H, W, 3] as PNG, atomically; its folder is created."""
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")


def media_of_row(row: Mapping[str, Any], table: Path) -> Path | None:
    """The main file of a row: its video, or its audio where there is none; None for a row without either."""
    value = next((row[column] for column in MEDIA_COLUMNS if row.get(column)), None)
    return None if value is None else table.parent / str(value)


def relative_name(path: Path, base: Path) -> str:
    """How a table in `base` names a file: relative where the file lies below it, else the whole path."""
    path, base = Path(os.path.abspath(path)), Path(os.path.abspath(base))
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else path.as_posix()


def moved_row(row: Mapping[str, Any], old: Path, new: Path) -> Row:
    """A row for a table in another folder: its paths start from there."""
    if old.resolve() == new.resolve():
        return dict(row)
    return {
        column: relative_name(old / str(value), new) if column in PATH_COLUMNS and value else value
        for column, value in row.items()
    }
