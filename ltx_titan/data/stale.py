"""Samples whose files or rows changed after they were made, found without reading samples.

Preparation compares as well, and makes them again; here they are only named, for commands that read prepared data.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ltx_titan.data.cache import READER_THREADS
from ltx_titan.data.fingerprints import (
    MODEL_SUFFIX,
    FileVersion,
    FingerprintFile,
    is_changed,
    text_digest,
    version_of,
)
from ltx_titan.tables.samples import SampleRow, read_sample_table, split_window_key, table_folder

_EXAMPLES = 3
# Paths that one thread asks for, so that handing them over costs less than asking.
_CHUNK = 256
_EXCLUDED = {
    "orphan": "whose row is no longer in the table, kept out of training",
    "pending": "to be made again by process-dataset (changed or interrupted), kept out of training",
}


def stale_samples(root: Path, folders: Iterable[str]) -> dict[str, list[str]]:
    """Samples that do not match their sources: description -> their paths.

    Sources and tables that are not on this machine are not compared.

    Args:
        root: data root.
        folders: source folders to check.
    """
    found: dict[str, dict[str, None]] = {}
    files = {folder: FingerprintFile(root / folder) for folder in folders}
    tables = {
        table["path"]: _read_rows(root, table)
        for file in files.values()
        for table in (file.values.get(name, {}) for name in {entry.table for entry in file.entries.values()})
        if "path" in table
    }
    sources: dict[Path, list[tuple[str, FileVersion]]] = {}
    for file in files.values():
        for key, entry in file.entries.items():
            if entry.state in _EXCLUDED:
                found.setdefault(f"samples {_EXCLUDED[entry.state]}", {})[key] = None
            if entry.state != "done":
                continue
            table = file.values.get(entry.table, {}).get("path", "")
            for version in entry.files.values():
                sources.setdefault(table_folder(root / table) / version.path, []).append((key, version))
            rows = tables.get(table)
            if rows is None:
                continue
            # Windows of one clip have one row.
            row = rows.get(key) or rows.get(split_window_key(key)[0])
            if row is None:
                found.setdefault(f"samples whose row was removed from {Path(table).name} since", {})[key] = None
            elif entry.text is not None and (row.caption is None or text_digest(row.caption) != entry.text):
                found.setdefault(f"samples whose caption in {Path(table).name} changed since", {})[key] = None
    for folder, file in files.items():
        for name, keys in _of_other_models(file).items():
            model = name.removesuffix(MODEL_SUFFIX).replace("_", " ")
            found.setdefault(f"samples of {folder} made with another {model} than most", {}).update(dict.fromkeys(keys))
    for key in _changed(sources):
        found.setdefault("samples whose files changed since", {})[key] = None
    return {note: sorted(keys) for note, keys in found.items()}


def describe(note: str, keys: list[str]) -> str:
    """One line with the first names."""
    return f"{note} ({', '.join(keys[:_EXAMPLES])}{', ...' if len(keys) > _EXAMPLES else ''})"


def _of_other_models(file: FingerprintFile) -> dict[str, list[str]]:
    """Samples made with another model than most of their folder: name of the option -> their paths."""
    by_options: dict[str, list[str]] = {}
    for key, entry in file.entries.items():
        if entry.state == "done":
            by_options.setdefault(entry.options, []).append(key)
    names = {name for options in by_options for name in file.values.get(options, {}) if name.endswith(MODEL_SUFFIX)}
    found = {}
    for name in sorted(names):
        by_model: dict[str, list[str]] = {}
        for options, keys in by_options.items():
            # Samples of earlier versions of this program recorded no digest.
            if (model := file.values.get(options, {}).get(name)) is not None:
                by_model.setdefault(model, []).extend(keys)
        most = max(by_model, key=lambda model: len(by_model[model]), default=None)
        others = [key for model, keys in by_model.items() if model != most for key in keys]
        if others:
            found[name] = others
    return found


def _changed(sources: Mapping[Path, list[tuple[str, FileVersion]]]) -> list[str]:
    """Samples with a file of another content."""

    def check(paths: list[Path]) -> list[str]:
        return [key for path in paths for key, version in sources[path] if _differs(path, version)]

    paths = list(sources)
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(READER_THREADS) as pool:
        return [key for keys in pool.map(check, chunks) for key in keys]


def _differs(path: Path, before: FileVersion) -> bool:
    now = version_of(path, before.path)
    # Many delete their clips, or train on another machine.
    return now is not None and is_changed(before, now, path)


def _read_rows(root: Path, table: Mapping[str, str]) -> dict[str, SampleRow] | None:
    """Rows by sample; None if the table is not there or cannot be read."""
    path = root / table["path"]
    try:
        read = read_sample_table(path, table.get("video_column"), table.get("caption_column"), needs_captions=False)
    except (ValueError, OSError):
        return None
    return {row.key.as_posix(): row for row in read.samples}
