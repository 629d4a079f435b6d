"""A folder of prepared samples: which there are, what shape each has, and one of them at a time.

A sample exists where every source folder has a file of the same relative path. Shapes are known before training,
because the batch plan needs them; they are kept in an index file in the data root, so that only new and changed files
are opened.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ltx_titan.data.layout import Fields, Kind, read_sample, read_shapes

logger = logging.getLogger(__name__)

Sample = dict[str, Fields]
"""Source -> field -> value, for one sample."""
ShapeKey = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(source, field, shape) of everything in a sample; samples of equal keys can share a batch."""

INDEX_NAME = ".shapes.json"
PRIMARY = "latents"
_KINDS: dict[str, Kind] = {"conditions": "text", "video_latents": "video", "audio_latents": "audio"}
_EXAMPLES = 3


class _File(NamedTuple):
    """A sample's file in one source folder, by path relative to the data root, with what tells that it changed."""

    name: str
    size: int
    mtime_ns: int


def resolve_root(path: str | Path) -> Path:
    """The data root that `path` means: its `.precomputed` child where there is one, else itself.

    Raises:
        ValueError: if there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise ValueError(f"data.root = {str(path)!r}: expected a folder, found none; correct the path.")
    child = root / ".precomputed"
    return child if child.is_dir() else root


class PrecomputedDataset:
    """The samples below a data root."""

    def __init__(self, root: str | Path, sources: Mapping[str, str]) -> None:
        """Finds the samples and their shapes.

        Args:
            root: data root, or the folder that has it as `.precomputed`.
            sources: folders to read, each with its key in a batch; `conditions` is one of them.

        Raises:
            ValueError: if a folder is missing or empty, no sample is in all of them, or a file cannot be used.
        """
        self.root = resolve_root(root)
        self.sources = dict(sources)
        self._samples = self._match()
        self._keys = self._read_keys()
        self.fingerprint = self._fingerprint()

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """The relative path of a sample, for messages."""
        primary = PRIMARY if PRIMARY in self.sources else next(iter(self.sources))
        return Path(self._samples[index][primary].name).relative_to(primary).as_posix()

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes that a batch of this sample and others must share."""
        return self._keys[index]

    def load(self, index: int) -> Sample:
        """Reads one sample: source -> field -> tensor or number, without a batch dim.

        Raises:
            ValueError: if a file is broken; with its name.
        """
        sample = {
            self.sources[folder]: read_sample(self.root / file.name, self._kind(folder))
            for folder, file in self._samples[index].items()
        }
        self._check_shapes(index, sample)
        self._check_masks(index, sample)
        return sample

    def _kind(self, folder: str) -> Kind | None:
        return _KINDS.get(self.sources[folder])

    def _check_shapes(self, index: int, sample: Sample) -> None:
        if (found := shape_key_of(sample)) != self._keys[index]:
            changed = sorted({source for source, _, _ in set(found) ^ set(self._keys[index])})
            raise ValueError(
                f"{self.root}: {self.name(index)}: expected the shapes of when the run started, found others in "
                f"{changed}; a data set must not change during a run; start the run again."
            )

    def _check_masks(self, index: int, sample: Sample) -> None:
        tokens = {source: count for source, count in token_counts(self._keys[index]).items() if source in _KINDS}
        for source, fields in sample.items():
            mask = fields.get("mask")
            if isinstance(mask, Tensor) and mask.numel() not in tokens.values():
                raise ValueError(
                    f"{self.root / source / self.name(index)}: mask: expected one element per token ({tokens}), "
                    f"found {mask.numel()} (shape {list(mask.shape)}); prepare the mask for this clip's size."
                )

    def _match(self) -> list[dict[str, _File]]:
        """The samples that every source has, in the order of the primary source's paths."""
        folders = {folder: self._scan(folder) for folder in self.sources}
        primary = PRIMARY if PRIMARY in folders else next(iter(folders))
        kept, missing = [], {folder: [] for folder in folders}
        for path in sorted(folders[primary]):
            names = {folder: _paired(path, folder, primary, files) for folder, files in folders.items()}
            lacking = [folder for folder, name in names.items() if name is None]
            for folder in lacking:
                missing[folder].append(path)
            if not lacking:
                kept.append({folder: folders[folder][name] for folder, name in names.items() if name is not None})
        for folder, paths in missing.items():
            if paths:
                logger.warning(
                    "%s: %d of %d samples have no file in %s and are left out: %s%s",
                    self.root,
                    len(paths),
                    len(folders[primary]),
                    folder,
                    ", ".join(paths[:_EXAMPLES]),
                    ", ..." if len(paths) > _EXAMPLES else "",
                )
        if not kept:
            counts = ", ".join(f"{folder}/: {len(files)} files" for folder, files in folders.items())
            examples = "; ".join(f"{folder}/{min(files)}" for folder, files in folders.items())
            raise ValueError(
                f"{self.root}: expected samples with the same relative path in every folder, found none ({counts}; for "
                f"example {examples}); prepare the folders from the same metadata file."
            )
        return kept

    def _scan(self, folder: str) -> dict[str, _File]:
        """Every `.pt` file below a source folder, by path relative to it."""
        base = self.root / folder
        if not base.is_dir():
            present = sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())
            raise ValueError(
                f"{self.root}: expected the folder {folder!r} (for {self.sources[folder]}), found only {present}; "
                "prepare it, or correct the folder's name in the job."
            )
        files = {}
        for parent, _, names in os.walk(base, followlinks=True):
            for name in names:
                if name.endswith(".pt"):
                    path = Path(parent, name)
                    status = path.stat()
                    relative = path.relative_to(base).as_posix()
                    files[relative] = _File(f"{folder}/{relative}", status.st_size, status.st_mtime_ns)
        if not files:
            raise ValueError(f"{base}: expected .pt files, found none; run the preprocessing for this folder.")
        return files

    def _read_keys(self) -> list[ShapeKey]:
        index = ShapeIndex(self.root)
        wanted = {file: self._kind(folder) for sample in self._samples for folder, file in sample.items()}
        shapes = index.shapes(wanted)
        return [
            tuple(
                (self.sources[folder], field, shape)
                for folder, file in sample.items()
                for field, shape in sorted(shapes[file].items())
            )
            for sample in self._samples
        ]

    def _fingerprint(self) -> str:
        """Changes with the set of samples and the sizes of their files, not with the place of the folder."""
        digest = hashlib.sha256()
        for sample in self._samples:
            for file in sample.values():
                digest.update(f"{file.name}\0{file.size}\n".encode())
        return digest.hexdigest()[:32]


class ShapeIndex:
    """Shapes of sample files, remembered in a file of the data root while a file's size and time stay the same."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / INDEX_NAME

    def shapes(self, files: Mapping[_File, Kind | None]) -> dict[_File, dict[str, tuple[int, ...]]]:
        """Shape of every field of each file, () for numbers.

        Args:
            files: files with the kind that each must be.

        Raises:
            ValueError: if a file cannot be used; with its name.
        """
        known = self._remembered()
        found = {
            file: known[self._entry(file, kind)] for file, kind in files.items() if self._entry(file, kind) in known
        }
        new = [(file, kind) for file, kind in files.items() if file not in found]
        if new:
            logger.info("%s: reading the shapes of %d files", self._root, len(new))
            # Opening files waits for the disk, so that more threads than cores help on network storage.
            with ThreadPoolExecutor(max_workers=16) as pool:
                shapes = pool.map(lambda item: read_shapes(self._root / item[0].name, item[1]), new)
                found |= {file: shape for (file, _), shape in zip(new, shapes, strict=True)}
            self._remember(known | {self._entry(file, files[file]): shape for file, shape in found.items()})
        return found

    @staticmethod
    def _entry(file: _File, kind: Kind | None) -> tuple[str, int, int, str]:
        return (*file, kind or "")

    def _remembered(self) -> dict[tuple[str, int, int, str], dict[str, tuple[int, ...]]]:
        try:
            rows = json.loads(self._path.read_text())
            return {tuple(entry): {key: tuple(shape) for key, shape in fields.items()} for entry, fields in rows}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # Only a cache: a missing or foreign file costs one more reading.

    def _remember(self, shapes: Mapping[tuple[str, int, int, str], Mapping[str, tuple[int, ...]]]) -> None:
        latest = {entry[0] + "\0" + entry[3]: (entry, fields) for entry, fields in shapes.items()}
        temporary = self._path.with_name(f"{self._path.name}.tmp.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            temporary.write_text(json.dumps(list(latest.values())))
            os.replace(temporary, self._path)
        except OSError as error:
            logger.info("%s: not written (%s); the shapes are read again next time", self._path, error.strerror)


def shape_key_of(sample: Sample) -> ShapeKey:
    """The shape key of a sample in memory."""
    return tuple(
        (source, field, tuple(value.shape) if isinstance(value, Tensor) else ())
        for source, fields in sample.items()
        for field, value in sorted(fields.items())
    )


def token_counts(key: ShapeKey) -> dict[str, int]:
    """Tokens of each clip in a sample, references included: frames x rows x columns of a video, time steps of sound."""
    counts = {}
    for source, field, shape in key:
        if field == "latents":
            counts[source] = shape[1] * shape[2] * shape[3] if len(shape) == 4 else shape[1]
    return counts


def _paired(path: str, folder: str, primary: str, files: Mapping[str, _File]) -> str | None:
    """The file of `folder` that belongs to the primary's `path`; an older layout has `condition_X` for `latent_X`."""
    if path in files:
        return path
    if folder == "conditions" and primary == PRIMARY and "/" not in path and path.startswith("latent_"):
        older = "condition_" + path.removeprefix("latent_")
        return older if older in files else None
    return None
