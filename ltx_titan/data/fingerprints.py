"""Fingerprints: what each prepared sample was made of, in one `fingerprints.jsonl` per source folder.

A line is a JSON object and overrides earlier lines of its sample, so that a sample costs one append when it is made.
Options and tables are shared by many samples: they have lines of their own, and samples refer to them by id.

    {"id": "5d0c...", "values": {"fps": null, "reshape_mode": "center", ...}}
    {"key": "clips/a.pt", "files": {"video": ["clips/a.mp4", 81623, 1764227855000000000, "9be1..."]}, "options": ...}

A sample is recorded as `pending` before its file is written and as done after it, so no interruption leaves a line that
promises more than the file holds. An incomplete line of a killed process is ignored. Under torchrun each process
appends to a file of its own, which `compact` merges.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

from ltx_titan.common.files import write_text

_NAME = "fingerprints"
# Larger files are identified by blocks: a film of 50 GB is cut into clips, and only seconds of it are decoded.
_WHOLE_BYTES = 64 * 2**20
_BLOCKS, _BLOCK_BYTES = 64, 2**20

MODEL_SUFFIX = "_digest"
"""End of the names of options that are digests of models."""

State = Literal["done", "pending", "orphan", "absent"]
"""`pending`: it is being made, or its source changed and it was not made again. `orphan`: no row asks for it.
`absent`: its row has no file in this folder, by decision."""


class FileVersion(NamedTuple):
    """Version of a file: size and time are compared first, its content only if they differ.

    Attributes:
        path: relative to the table's folder, or absolute.
        size: bytes.
        mtime_ns: time of the last change.
        digest: of the content; empty if unknown.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str = ""


@dataclass(frozen=True)
class Fingerprint:
    """Inputs that one sample of a source folder was made from.

    Attributes:
        files: role, such as `video` or `video_mask` -> file.
        text: digest of the caption; None without one.
        options: id of the options that the sample depends on.
        table: id of the table whose row it was made for.
        state: whether it can be trained on.
    """

    files: Mapping[str, FileVersion]
    text: str | None
    options: str
    table: str
    state: State = "done"


class FingerprintFile:
    """The fingerprints of one source folder.

    Attributes:
        entries: path of each sample below the folder -> its fingerprint.
        values: id -> options, or description of a table.
    """

    def __init__(self, folder: Path, rank: int = 0, name: str = _NAME) -> None:
        """Reads the fingerprints of a folder.

        Args:
            folder: source folder; need not exist.
            rank: process that appends.
            name: name of the file without its suffix.
        """
        self._name = name
        self._path = folder / f"{name}.jsonl"
        self._own = self._path if rank == 0 else folder / f"{name}.{rank}.jsonl"
        self._file: TextIO | None = None
        self.entries: dict[str, Fingerprint] = {}
        self.values: dict[str, dict[str, Any]] = {}
        self._written: set[str] = set()
        self._is_merged = True
        for path in _paths(folder, name):
            self._read(path)

    def intern(self, values: Mapping[str, Any]) -> str:
        """Returns the id of options, or of a table."""
        text = json.dumps(values, sort_keys=True)
        # The process that reads it has the same values under this id, whichever process writes the line.
        name = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        self.values.setdefault(name, dict(values))
        return name

    def set(self, entries: Mapping[str, Fingerprint]) -> None:
        """Records samples: as done when their files are complete, as pending before that."""
        lines = []
        for key, entry in entries.items():
            for name in (entry.options, entry.table):
                if name not in self._written and name in self.values:
                    lines.append(_dump({"id": name, "values": self.values[name]}))
                    self._written.add(name)
            lines.append(_dump(_as_json(key, entry)))
        self.entries.update(entries)
        if not lines:
            return
        if self._file is None:
            self._own.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._own.open("a", encoding="utf-8", newline="")
            # A line cut off by a kill must not swallow the next one.
            self._file.write("\n")
        self._is_merged = False
        self._file.write("".join(lines))
        self._file.flush()

    def mark(self, keys: Iterable[str], state: State) -> None:
        """Changes the state of samples."""
        self.set({key: replace(self.entries[key], state=state) for key in keys if key in self.entries})

    def close(self) -> None:
        """Closes the file; a later `set` opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def compact(self, removed: Iterable[str] = ()) -> None:
        """Merges the files of all processes, sorted by sample, if anything was added; no process may be appending.

        Args:
            removed: samples that no longer exist.
        """
        self.close()
        folder, removed = self._path.parent, list(removed)
        if self._is_merged and not removed and _paths(folder, self._name) == [self._path]:
            return
        merged = FingerprintFile(folder, name=self._name)
        for key in removed:
            merged.entries.pop(key, None)
            self.entries.pop(key, None)
        if not merged.entries and not _paths(folder, self._name):
            return
        used = {name for entry in merged.entries.values() for name in (entry.options, entry.table)}
        lines = [_dump({"id": name, "values": merged.values[name]}) for name in sorted(used & merged.values.keys())]
        lines += [_dump(_as_json(key, merged.entries[key])) for key in sorted(merged.entries)]
        write_text(self._path, "".join(lines))
        # After the merged file is complete: a kill in between merges them again.
        for path in _paths(folder, self._name):
            if path != self._path:
                path.unlink()
        self._written = used
        self._is_merged = True

    def _read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                data = json.loads(line) if line else {}
                if "id" in data:
                    self.values[data["id"]] = data["values"]
                    self._written.add(data["id"])
                elif data:
                    self.entries[data["key"]] = _from_json(data)
            except (ValueError, TypeError, KeyError):
                # Its sample counts as not recorded.
                continue


def excluded_samples(folder: Path) -> dict[str, State]:
    """Samples of a source folder that must not be trained on, with the reason; empty without fingerprints."""
    # Almost always there are none, and looking for the word takes a tenth of parsing the lines. Quotes within JSON
    # strings are escaped, so that no name contains it.
    if not any('"state":' in path.read_text(encoding="utf-8", errors="replace") for path in _paths(folder)):
        return {}
    entries = FingerprintFile(folder).entries
    return {key: entry.state for key, entry in entries.items() if entry.state in ("pending", "orphan")}


def recorded_options(folder: Path, name: str) -> set[Any]:
    """Values of an option that samples of a source folder were made with; empty without fingerprints.

    Args:
        folder: source folder.
        name: key in the recorded options, such as `lora_trigger`; its values must be hashable.
    """
    found = set()
    for path in _paths(folder):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                # Lines of samples, of which there may be half a million, are not parsed.
                if not line.startswith('{"id":') or f'"{name}":' not in line:
                    continue
                # As in `_read`: a killed process may have left an incomplete line.
                with suppress(ValueError, TypeError, KeyError):
                    found.add(json.loads(line)["values"][name])
    return found


def version_of(path: Path, name: str) -> FileVersion | None:
    """Version of a file without its digest; None if there is no such file.

    Args:
        path: the file.
        name: path to store.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return FileVersion(name, status.st_size, status.st_mtime_ns)


def is_changed(before: FileVersion, now: FileVersion, path: Path) -> bool:
    """Whether a file has another content than it had; it is read only if name or time differ and the size does not."""
    if before.size != now.size:
        return True
    if before[:3] == now[:3]:
        return False
    return not before.digest or before.digest != digest_of(path)


def digest_of(path: Path) -> str:
    """Digest of a file's content; of 64 evenly spaced blocks of 1 MiB and the size if it is larger than 64 MiB."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


def text_digest(text: str) -> str:
    """Digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=8).hexdigest()


def model_digest(path: Path) -> str:
    """Digest of a model: a file, or a folder of files; independent of its path and of times."""
    if path.is_file():
        return digest_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in (".json", ".safetensors"))
    return text_digest("".join(f"{file.relative_to(path).as_posix()} {digest_of(file)}\n" for file in files))


# Size and time are part of the key: a file is read once for all folders that depend on it.
@lru_cache(maxsize=4096)
def _digest(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        else:
            for index in range(_BLOCKS):
                file.seek((size - _BLOCK_BYTES) * index // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _paths(folder: Path, name: str = _NAME) -> list[Path]:
    """Files of fingerprints of a folder; the merged one first, since the others are newer."""
    merged = folder / f"{name}.jsonl"
    return [path for path in (merged, *sorted(folder.glob(f"{name}.*.jsonl"))) if path.is_file()]


def _as_json(key: str, entry: Fingerprint) -> dict[str, Any]:
    data: dict[str, Any] = {"key": key}
    if entry.files:
        data["files"] = entry.files
    if entry.text is not None:
        data["text"] = entry.text
    data |= {"options": entry.options, "table": entry.table}
    # Only exceptions have one, which `excluded_samples` relies on.
    return data if entry.state == "done" else data | {"state": entry.state}


def _from_json(data: Mapping[str, Any]) -> Fingerprint:
    files = {role: FileVersion(*version) for role, version in data.get("files", {}).items()}
    return Fingerprint(files, data.get("text"), data["options"], data["table"], data.get("state", "done"))


def _dump(data: Mapping[str, Any]) -> str:
    # ASCII: names of files may hold bytes that are no UTF-8.
    return json.dumps(data, separators=(",", ":")) + "\n"
