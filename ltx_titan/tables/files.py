"""Files of dataset tables as rows and back: `.csv`, `.json` (a list of objects) and `.jsonl`.

A row whose meaning is in doubt is rejected alone, with its line, what was expected, and a remedy: an unquoted comma
must not cut a caption, an open quote not swallow the rows after it, and a number or list not become its Python text.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ltx_titan.common.files import json_text, write_text
from ltx_titan.tables.folders import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    captions_beside,
    find_media,
    read_text,
)

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
_TEXT_COLUMNS = (*PATH_COLUMNS, "caption")
_MEDIA_SUFFIXES = VIDEO_SUFFIXES | AUDIO_SUFFIXES | IMAGE_SUFFIXES
# Rejected rows that an error names.
_EXAMPLES = 3

Row = dict[str, Any]
"""A row as stored: column -> value."""


@dataclass(frozen=True)
class TableRows:
    """Rows of a table.

    Attributes:
        rows: (number from 1, row), all columns kept; of a folder also files without a caption.
        rejected: (item, reason) of those that cannot be read.
    """

    rows: tuple[tuple[int, Row], ...]
    rejected: tuple[tuple[str, str], ...] = ()


def is_table(path: Path) -> bool:
    """Whether a path is a file of a dataset table, by its suffix."""
    return path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()


def table_folder(path: Path) -> Path:
    """Folder that the paths in a table are relative to; of a folder of clips the folder itself."""
    return path if path.is_dir() else path.parent


def read_rows(path: Path) -> TableRows:
    """Reads the rows of a table, or of a folder of clips with a text file `NAME.txt` beside each.

    UTF-8 with or without a byte-order mark, or UTF-16 and UTF-32 with one. The cells of a `.csv` are separated by
    commas, or by semicolons or tabs if its header has no comma.

    Raises:
        ValueError: the file is missing, has another encoding, or is not a table.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: no such file; expected a table, one of {', '.join(TABLE_SUFFIXES)}, or a folder of clips"
        )
    if not is_table(path):
        raise ValueError(f"{path}: suffix {path.suffix!r} is not known, expected one of {', '.join(TABLE_SUFFIXES)}")
    text = read_text(path)
    found = _parse_csv(path, text) if path.suffix.lower() == ".csv" else _parse_json(path, text)
    rows: list[tuple[int, Row]] = []
    rejected: list[tuple[str, str]] = []
    for number, (item, row) in enumerate(found, start=1):
        if isinstance(row, str):
            rejected.append((f"row {number}{item}", row))
        elif problem := _problem(row):
            rejected.append((f"row {number}{item}", problem))
        else:
            rows.append((number, row))
    if rejected and not rows:
        raise ValueError(f"{path}: has no row that can be used; {_named(rejected)}")
    return TableRows(tuple(rows), tuple(rejected))


def read_table(path: Path) -> list[Row]:
    """Reads all rows of a table that is to be written back, so none may be skipped.

    Raises:
        ValueError: the table or one of its rows cannot be read.
    """
    found = read_rows(path)
    if found.rejected:
        raise ValueError(
            f"{path}: {len(found.rejected)} rows cannot be read and would be lost in the table that is written; "
            f"correct them first; {_named(found.rejected)}"
        )
    return [row for _, row in found.rows]


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
        text = json_text(list(rows), indent=2) + "\n"
    else:
        text = "".join(json_text(row) + "\n" for row in rows)
    write_text(path, text)


def not_text(row: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """The reason why a row cannot be used if one of its columns holds something other than text; None if none does."""
    for column in columns:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            found = json.dumps(value, ensure_ascii=False)[:60]
            return f"column {column!r}: expected text, found {_kind(value)} ({found}); write it in double quotes"
    return None


def _object(value: Any) -> Row | str:
    """A parsed JSON value if it is a row, or the reason why it is none."""
    if isinstance(value, dict):
        return value
    return f'expected an object such as {{"video": ..., "caption": ...}}, found {_kind(value)}'


def _problem(row: Row) -> str | None:
    """The reason why a parsed row cannot be used, or None."""
    twice = dict[Any, Any](row).get(None)
    if twice is not None:
        return f"has the key {twice!r} twice; delete one"
    for column, value in row.items():
        if isinstance(value, str) and "\0" in value:
            return f"column {column!r} contains a NUL byte; the file is damaged there, write the cell again"
        if isinstance(value, str) and not _is_text(value, is_path=column in PATH_COLUMNS):
            return (
                f"column {column!r} contains half of a surrogate pair (\\ud800 to \\udfff); write the character whole"
            )
        if value and isinstance(value, str) and column in PATH_COLUMNS and not Path(value).name:
            return f"column {column!r}: expected a file, found {value!r}; correct it"
    return not_text(row, _TEXT_COLUMNS)


def _is_text(value: str, is_path: bool) -> bool:
    """Whether a text can be encoded; Python's names of files hold bytes that are no UTF-8 as lone surrogates."""
    try:
        value.encode("utf-8", "surrogateescape" if is_path else "strict")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {bool: "true or false", list: "a list", dict: "an object", str: "text", type(None): "null"}
    return names.get(type(value), "a number")


def _named(rejected: Sequence[tuple[str, str]]) -> str:
    more = "; ..." if len(rejected) > _EXAMPLES else ""
    return "; ".join(f"{item}: {reason}" for item, reason in rejected[:_EXAMPLES]) + more


# A parsed row with the suffix of its name in messages; a row that cannot be parsed is the reason.
_Parsed = Iterator[tuple[str, Row | str]]


def _parse_csv(path: Path, text: str) -> _Parsed:
    # Splits like the csv module: only at \n, \r and \r\n.
    lines = io.StringIO(text, newline="").readlines()
    first = next((index for index, line in enumerate(lines) if line.strip()), None)
    if first is None:
        return
    header = lines[first]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")
    # Python's reader takes the space of `a.mp4, "A cat, asleep"` for text, and the quote with it.
    style: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": f"{delimiter} " in header, "strict": True}
    try:
        columns = [column.strip() for column in next(csv.reader([header], **style))]
    except csv.Error as error:
        raise ValueError(f"{path}: line {first + 1}: the header is not valid CSV ({error})") from error
    width = len(columns)
    # Spreadsheets write empty columns at the end.
    while columns and not columns[-1]:
        columns.pop()
    if "" in columns:
        raise ValueError(f"{path}: column {columns.index('') + 1} of {width} has no name; name it in line {first + 1}")
    twice = sorted({column for column in columns if columns.count(column) > 1})
    if twice:
        raise ValueError(f"{path}: has the columns {twice} more than once; rename or delete one of each")
    for line, cells in _records(lines, first + 1, style):
        where = f" (line {line})"
        if isinstance(cells, str):
            yield where, cells
        elif any(cell.strip() for cell in cells):
            yield where, _cells_to_row(cells, columns, width, delimiter)


def _cells_to_row(cells: list[str], columns: list[str], width: int, delimiter: str) -> Row | str:
    if len(columns) <= len(cells) <= width and not any(cells[len(columns) :]):
        return dict(zip(columns, cells, strict=False))
    name = {",": "comma", ";": "semicolon", "\t": "tab"}[delimiter]
    remedy = (
        f"put cells that contain a {name} into double quotes, and write quotes in them twice"
        if len(cells) > len(columns)
        else "add the missing ones, which may be empty"
    )
    return f"has {len(cells)} cells, expected {len(columns)} ({', '.join(columns)}); {remedy}"


def _records(lines: list[str], start: int, style: Mapping[str, Any]) -> Iterator[tuple[int, list[str] | str]]:
    """Records with the number of their first line; in place of one that cannot be parsed the reason.

    Parsing continues in the line after the one where a faulty record starts, so that an open quote costs its own row
    and not all that follow.
    """
    remedy = "close the quotes of its cells; quotes within a quoted cell are written twice"
    swallowed = start  # the lines before this one belonged to a record that an open quote made too long
    while start < len(lines):
        offset = start
        reader = csv.reader(islice(lines, start, None), **style)
        try:
            for cells in reader:
                first, start = start, offset + reader.line_num
                if any(_starts_row(line, style["delimiter"]) for line in lines[first + 1 : start]):
                    yield first + 1, f"has an open quote that swallows the rows after it; {remedy}"
                    swallowed, start = start, first + 1
                    break
                if first < swallowed and "".join(lines[first:start]).count('"') % 2:
                    yield first + 1, f"has the quote that closes an open one before; {remedy}"
                    continue
                yield first + 1, cells
        except csv.Error as error:
            yield start + 1, f"is not valid CSV ({error}); {remedy}"
            start += 1


def _starts_row(line: str, delimiter: str) -> bool:
    """Whether a line within a quoted cell looks like a row of its own: its first cell names a media file."""
    match = re.match(rf'\s*"?[^"{delimiter}\n]*(\.\w+)"?\s*{delimiter}', line)
    return match is not None and match[1].lower() in _MEDIA_SUFFIXES


def _parse_json(path: Path, text: str) -> _Parsed:
    is_lines = path.suffix.lower() == ".jsonl" and not text.lstrip().startswith("[")
    if not is_lines:
        try:
            rows = json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            # JSON Lines under the name of JSON: a second object follows the first.
            if error.msg != "Extra data":
                raise ValueError(f"{path}: not valid JSON: {error}{_json_hint(text, error.pos)}") from error
        except ValueError as error:  # a number with thousands of digits
            raise ValueError(f"{path}: not valid JSON: {error}") from error
        except RecursionError as error:
            raise ValueError(f"{path}: nested too deeply; expected a list of objects, one per sample") from error
        else:
            if not isinstance(rows, list):
                keys = f" with the keys {list(rows)[:5]}" if isinstance(rows, dict) else ""
                raise ValueError(
                    f"{path}: expected a list of objects, one per sample, as in "
                    f'[{{"video": "a.mp4", "caption": "..."}}]; found {_kind(rows)}{keys}'
                )
            if rows and not any(isinstance(row, dict) for row in rows):
                raise ValueError(f"{path}: expected a list of objects, one per sample; found a list of other values")
            yield from (("", _object(row)) for row in rows)
            return
    # Not splitlines(): it also splits at U+0085, U+2028 and U+2029, which JSON strings may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f" (line {number})", _object(json.loads(line, object_pairs_hook=_unique))
        except RecursionError:
            yield (
                f" (line {number})",
                f"line {number} is nested too deeply; expected one object of texts in each line",
            )
        except json.JSONDecodeError as error:
            yield (
                f" (line {number})",
                f"line {number} is not valid JSON: {error.msg} at column {error.colno}{_json_hint(line, error.pos)}; "
                "expected one object in each line",
            )
        except ValueError as error:  # a number with thousands of digits
            yield f" (line {number})", f"line {number} is not valid JSON: {error}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """An object; a key that it has twice is stored under None, since JSON's own rule would drop the first silently."""
    found: dict[Any, Any] = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        found[None] = next(name for name in names if names.count(name) > 1)
    return found


def _json_hint(text: str, at: int) -> str:
    before, after = text[:at].rstrip(), text[at:].lstrip()
    if after[:1] in ("/", "#"):
        return "; JSON has no comments, delete it"
    if before.endswith(",") and after[:1] in ("", "]", "}", '"', "'"):
        return "; delete the comma before it" if after[:1] in ("", "]", "}") else ""
    if after[:1] == "'" or before.endswith("'"):
        return "; JSON has double quotes only"
    return ""


def _read_folder(folder: Path) -> TableRows:
    """Rows of a folder of clips: `media_path` (`audio` if it holds audio only) and `caption`, None without a `.txt`."""
    files = find_media(folder, _MEDIA_SUFFIXES)
    visual = [path for path in files if path.suffix.lower() not in AUDIO_SUFFIXES]
    captions, rejected = captions_beside(folder, files)
    if not captions:
        tables = [path.name for path in sorted(folder.iterdir()) if is_table(path) and not path.name.startswith(".")]
        remedy = (
            f"or name its table {folder / tables[0]}"
            if tables
            else "or write a table: ltx-titan caption " + str(folder)
        )
        raise ValueError(f"{folder}: holds no captions; expected a text file NAME.txt beside each clip; {remedy}")
    column = "media_path" if visual else "audio"
    if visual:
        # Audio beside videos is most often that of the videos.
        unused = "is audio in a folder of videos, which is not read; name it in a table with a column 'audio'"
        rejected += [(str(path), unused) for path in files if path.suffix.lower() in AUDIO_SUFFIXES]
    rows = [{column: path.relative_to(folder).as_posix(), "caption": captions.get(path)} for path in visual or files]
    return TableRows(tuple(enumerate(rows, start=1)), tuple(rejected))
