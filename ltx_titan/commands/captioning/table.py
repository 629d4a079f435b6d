"""Table of captions, with a journal that keeps new captions until the table is written.

Several processes may work on one table. All append to one journal, and each merges the journal into the table when it
is done; both under one lock.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from ltx_titan.common.files import json_text, locked, write_text
from ltx_titan.media import is_image
from ltx_titan.tables.folders import AUDIO_SUFFIXES, VIDEO_SUFFIXES, captions_beside, find_media
from ltx_titan.tables.samples import Row, is_table, media_of_row, moved_row, read_table, relative_name, write_table


class CaptionTable:
    """Files to be captioned, and their captions."""

    def __init__(self, source: Path, output: Path | None, suffixes: frozenset[str], recursive: bool) -> None:
        """Finds the files.

        Args:
            source: a file, a folder, or a table.
            output: table to write (.csv, .json, .jsonl, .txt); None: the source, or a file in its folder.
            suffixes: suffixes of the files in a folder.
            recursive: whether to search subfolders.

        Raises:
            ValueError: there are no files, or the output is not a table.
        """
        self._source = source if is_table(source) else None
        self.path = output or _default_output(source)
        if not is_table(self.path) and self.path.suffix != ".txt":
            raise ValueError(f"--output: {self.path} is not a table; expected .csv, .json, .jsonl or .txt")
        self._journal = self.path.with_name(f".{self.path.name}.journal")
        self.rows_without_file: list[int] = []
        self._beside: dict[Path, str] = {}
        if self._source is not None:
            found = [media_of_row(row, source) for row in read_table(source)]
            self.rows_without_file = [number for number, path in enumerate(found, start=1) if path is None]
            # Rows may share a file, which is captioned once.
            self.files = list(dict.fromkeys(path for path in found if path is not None))
        elif source.is_file():
            self.files = [source]
        else:
            self.files = _without_audio_of_videos(find_media(source, suffixes, recursive))
            # Captions of other trainers: `NAME.txt` beside a clip.
            self._beside, _ = captions_beside(source, self.files)
        self._captions = self._known()

    def has(self, path: Path) -> bool:
        """Whether a file has a caption."""
        return bool(self._captions.get(self._key(path)))

    def add(self, path: Path, caption: str) -> None:
        """Appends a caption to the journal on disk."""
        line = json_text({"media": self._key(path), "caption": caption})
        # Locked, or another process could merge and delete the journal between `open` and `write`.
        with locked(self.path), self._journal.open("a", encoding="utf-8") as journal:
            # The leading line break ends a line that a killed run may have left incomplete.
            journal.write(f"\n{line}\n")

    def save(self) -> None:
        """Merges the journal into the table."""
        with locked(self.path):
            # Read again under the lock: other processes have added captions since the start.
            captions = self._known()
            rows = self._rows(captions)
            if rows and (self._journal.is_file() or not _read(self.path)):
                _write(self.path, rows)
            # After the table is on disk: a kill in between merges the same captions twice, which changes nothing.
            self._journal.unlink(missing_ok=True)

    def _key(self, path: Path) -> str:
        return relative_name(path, self.path.parent)

    def _known(self) -> dict[str, str]:
        """Captions in the source, the output and the journal by file; later ones win."""
        captions = {self._key(path): caption for path, caption in self._beside.items()}
        for table in dict.fromkeys(path for path in (self._source, self.path) if path is not None):
            for row in _read(table):
                media = media_of_row(row, table)
                if media is not None and row.get("caption"):
                    captions[self._key(media)] = str(row["caption"])
        if self._journal.is_file():
            for line in self._journal.read_text(encoding="utf-8").split("\n"):
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the incomplete line of a killed run; its file is captioned again
                captions[entry["media"]] = entry["caption"]
        return captions

    def _rows(self, captions: Mapping[str, str]) -> list[Row]:
        """All rows: those of the source, or other rows of the output and then one row for each captioned file."""
        if self._source is not None:
            return [self._moved(row, captions) for row in read_table(self._source)]
        own = {self._key(path): path for path in self.files}
        before = {}
        others = []
        for row in _read(self.path):
            media = media_of_row(row, self.path)
            key = None if media is None else self._key(media)
            if key in own:
                before[key] = row
            else:
                others.append(row)
        rows = []
        for key, path in own.items():
            if captions.get(key):
                column = "audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"
                rows.append({**before.get(key, {column: key}), "caption": captions[key]})
        return others + rows

    def _moved(self, row: Row, captions: Mapping[str, str]) -> Row:
        """A row of the source with its caption, and with paths relative to the folder of the output."""
        assert self._source is not None
        media = media_of_row(row, self._source)
        caption = None if media is None else captions.get(self._key(media))
        row = moved_row(row, self._source.parent, self.path.parent)
        return {**row, "caption": caption or row.get("caption")}


def _default_output(source: Path) -> Path:
    if is_table(source):
        return source
    return source / "dataset.jsonl" if source.is_dir() else source.with_name(f"{source.stem}.dataset.jsonl")


def _without_audio_of_videos(files: list[Path]) -> list[Path]:
    """Drops audio files next to videos or images, since they usually belong to these."""
    visual = [path for path in files if path.suffix.lower() in VIDEO_SUFFIXES or is_image(path)]
    return visual or files


def _read(path: Path) -> list[Row]:
    if path.suffix != ".txt":
        return read_table(path) if path.is_file() else []
    captions, paths = _text_files(path)
    if not (captions.is_file() and paths.is_file()):
        return []
    # Not splitlines(): paths and captions may hold the other line breaks of Unicode.
    lines = [file.read_text(encoding="utf-8").removesuffix("\n").split("\n") for file in (paths, captions)]
    return [{"video": media, "caption": caption} for media, caption in zip(*lines, strict=False)]


def _write(path: Path, rows: list[Row]) -> None:
    if path.suffix != ".txt":
        write_table(path, rows)
        return
    captions, paths = _text_files(path)
    named = [(row.get("video") or row.get("media_path") or row.get("audio"), row.get("caption")) for row in rows]
    # One caption per line, so line breaks within a caption become spaces.
    write_text(captions, "".join(f"{' '.join((caption or '').split())}\n" for _, caption in named))
    write_text(paths, "".join(f"{media}\n" for media, _ in named))


def _text_files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f"{path.stem}_captions.txt"), path.with_name(f"{path.stem}_paths.txt")
