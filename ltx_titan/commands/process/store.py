"""The data root that preparation writes to: samples, shards, and a note of the options they were made with.

Every sample is first written to its own `.pt` file, atomically, so a killed run loses the sample that it was working on
and nothing else. With a shard size, the files of a shard's samples are merged once all of them are done (`seal`). The
shard of a sample follows from its row alone, and one rank makes all samples of a shard: any number of ranks and any
number of interruptions end in the same bytes.

A full disk or an interrupted copy can still truncate a file. A `.pt` file is a zip archive with its table of contents
at the end, and the header of a shard states its length: both are checked without reading the tensors.

What each sample was made of is recorded in its folder (`ltx_titan.data.fingerprints`). A run with other options than
those of stored samples is refused, since it would skip everything and look successful. `prepare.json` notes the options
of the last run.
"""

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from ltx_titan.common.files import remove_empty_folders, write_text
from ltx_titan.common.ranks import Ranks
from ltx_titan.data.fingerprints import MODEL_SUFFIX, FileVersion, Fingerprint, FingerprintFile
from ltx_titan.data.layout import Fields, Value, load_fields, read_sample, write_sample
from ltx_titan.data.shards import (
    list_shards,
    read_shard,
    read_shard_sample,
    shard_number,
    shard_path,
    shard_shapes,
    write_shard,
)
from ltx_titan.tables.samples import SampleRow

SETTINGS_NAME = "prepare.json"

# Options of before they existed.
_DEFAULTS = {"reference_layout": False}

Settings = dict[str, dict[str, Any]]
"""Source folder -> options that its samples depend on."""

# Names of unfinished files: those of `atomic_write`, and of earlier versions.
_TEMPORARY = re.compile(r"\.(pt|safetensors)\.tmp\.\d+(\.[0-9a-f]+)?$")


class Store:
    """The data root that a run writes to."""

    def __init__(
        self,
        root: Path,
        samples: Sequence[SampleRow],
        folders: Iterable[str],
        settings: Settings,
        *,
        table: Mapping[str, Any],
        shard_size: int | None = None,
        other_options: bool = False,
        rank: int = 0,
    ) -> None:
        """Lists the shards and fingerprints that exist, and compares the run's options with those of stored samples.

        Args:
            root: root of the prepared data; need not exist.
            samples: all samples of the dataset, in the order of their rows.
            folders: source folders that the run may read or write.
            settings: options that the samples of each folder depend on.
            table: description of the dataset table: `path` (absolute or relative to `root`) and its columns.
            shard_size: samples per shard, None for one `.pt` file per sample.
            other_options: whether samples of other options are accepted, since they are made again.
            rank: number of this process.

        Raises:
            ValueError: samples were made with other options.
        """
        self.root = root
        self._settings = settings
        self.damaged: list[Path] = []
        self._is_sharded = shard_size is not None
        folders = list(folders)
        self._shards = {folder: self._list(root / folder) for folder in folders}
        self.fingerprints = {folder: FingerprintFile(root / folder, rank) for folder in folders}
        self._tables = {folder: file.intern(table) for folder, file in self.fingerprints.items()}
        self._differing: dict[tuple[str, str], dict[str, tuple[Any, Any]]] = {}
        earlier = _read_settings(root)
        # Of samples without fingerprints; options that are not noted are taken for those of this run.
        self._earlier = {
            folder: file.intern(_with_earlier(settings.get(folder, {}), earlier.get(folder, {})))
            for folder, file in self.fingerprints.items()
        }
        if not other_options:
            self._check_options(samples)
        present = {key: number for keys in self._shards.values() for key, number in keys.items()}
        # A stored sample stays in its shard, even if rows were inserted before it since.
        self._shard = {
            key: present.get(key, index // (shard_size or 1)) if shard_size else index
            for index, key in enumerate(sample.key.as_posix() for sample in samples)
        }
        self._members: dict[int, list[str]] = {}
        for key, number in self._shard.items():
            self._members.setdefault(number, []).append(key)

    def has(self, folder: str, key: Path) -> bool:
        """Whether a sample is stored and complete."""
        path = self.root / folder / key
        # `is_zipfile` looks for the table of contents at the end, so a truncated file counts as missing.
        return key.as_posix() in self._shards[folder] or (path.is_file() and zipfile.is_zipfile(path))

    def is_complete(self, folder: str, key: Path) -> bool:
        """Whether a sample is stored, or known to have no file in this folder."""
        entry = self.fingerprints[folder].entries.get(key.as_posix())
        return self.has(folder, key) or (entry is not None and entry.state == "absent")

    def read(self, folder: str, key: Path) -> Fields:
        """Reads a sample, as training does.

        Raises:
            ValueError: it is missing or broken.
        """
        path = self.root / folder / key
        number = self._shards[folder].get(key.as_posix())
        # A single file is newer than the shard: it was made again and not merged yet.
        if number is None or path.is_file():
            return read_sample(path)
        return read_shard_sample(shard_path(self.root / folder, number), key.as_posix())

    def write(
        self,
        folder: str,
        key: Path,
        fields: Mapping[str, Value] | None,
        files: Mapping[str, FileVersion],
        text: str | None,
    ) -> None:
        """Writes a sample and its fingerprint.

        Args:
            folder: source folder.
            key: path of the sample below it.
            fields: the sample; None if the row has none in this folder.
            files: role -> file that it was made of.
            text: digest of the caption that it was made of.

        Raises:
            ValueError: `read` would refuse its fields.
        """
        file, name = self.fingerprints[folder], key.as_posix()
        options = file.intern(self._settings.get(folder, {}))
        entry = Fingerprint(files, text, options, self.table_id(folder), "pending")
        # Before the file: a kill in between must not leave a new file with the old fingerprint, or with none.
        file.set({name: entry})
        if fields is None:
            self._remove(folder, [name])
        else:
            write_sample(self.root / folder / key, fields)
        file.set({name: replace(entry, state="absent" if fields is None else "done")})

    def table_id(self, folder: str) -> str:
        """Id of the run's table in the fingerprints of a folder."""
        return self._tables[folder]

    def earlier_options(self, folder: str) -> str:
        """Id of the options that samples without fingerprints were made with, as far as they are known."""
        return self._earlier[folder]

    def differing_options(self, folder: str, options: str) -> dict[str, tuple[Any, Any]]:
        """Options of the run that differ from those of an id: name -> (before, now)."""
        if (folder, options) not in self._differing:
            before, now = self.fingerprints[folder].values.get(options, {}), self._settings.get(folder, {})
            # Options that one of them lacks are of another version of this program.
            self._differing[folder, options] = {
                name: (before[name], now[name]) for name in now if name in before and before[name] != now[name]
            }
        return self._differing[folder, options]

    def stored(self, folder: str) -> set[str]:
        """Paths of all samples of a folder, whether or not a row has them."""
        base = self.root / folder
        found = set(self._shards[folder])
        for parent, _, names in os.walk(base, followlinks=True):
            found |= {Path(parent, name).relative_to(base).as_posix() for name in names if name.endswith(".pt")}
        return found

    def mtime_ns(self, folder: str, key: Path) -> int:
        """Time when a stored sample was written."""
        path = self.root / folder / key
        if not path.is_file():
            path = shard_path(self.root / folder, self._shards[folder][key.as_posix()])
        return path.stat().st_mtime_ns

    def finish(self, orphans: Mapping[str, Sequence[str]], prune: bool) -> None:
        """Removes orphans if wanted, and tidies the fingerprints; called once, after all ranks are done."""
        for folder, file in self.fingerprints.items():
            removed = orphans.get(folder, ()) if prune else ()
            self._remove(folder, removed)
            file.compact(removed)

    def _remove(self, folder: str, keys: Iterable[str]) -> None:
        """Removes samples; those that stay in a shard keep their order."""
        base, removed = self.root / folder, set(keys)
        for key in removed:
            if (base / key).is_file():
                (base / key).unlink()
                remove_empty_folders((base / key).parent, base)
        for number in {self._shards[folder].pop(key) for key in removed & self._shards[folder].keys()}:
            path = shard_path(base, number)
            kept = {key: fields for key, fields in read_shard(path).items() if key not in removed}
            if kept:
                write_shard(path, kept)
            else:
                path.unlink()

    def begin(self, samples: Iterable[SampleRow], ranks: Ranks) -> list[SampleRow]:
        """Removes what killed runs left unfinished and notes the options of this one; all ranks call it.

        Returns:
            Samples that this rank makes, in order: shard by shard, or every n-th without shards.
        """
        # By the number of the shard, so that no two ranks write one shard.
        mine = [sample for sample in samples if self.group(sample) % ranks.world_size == ranks.rank]
        # The first barrier: every rank has listed the root before it changes. The second: no rank writes before
        # unfinished files are removed.
        ranks.wait()
        if ranks.is_main:
            self._clean()
            for file in self.fingerprints.values():
                file.compact()
            _write_settings(self.root, self._settings)
        ranks.wait()
        return sorted(mine, key=lambda sample: (self.group(sample), sample.row))

    def group(self, sample: SampleRow) -> int:
        """Number of the shard that a sample belongs to; without shards, the number of the sample."""
        return self._shard[sample.key.as_posix()]

    def num_groups(self) -> int:
        """Number of shards, or of samples without shards: the units that ranks share."""
        return len(self._members)

    def seal(self, folder: str, group: int) -> None:
        """Merges the files of a shard's samples into the shard; does nothing without files.

        May be called again after any interruption: files are removed only after the shard with them is written.
        """
        if not self._is_sharded:
            return
        base, keys = self.root / folder, self._members[group]
        alone = {key: base / key for key in keys if (base / key).is_file() and zipfile.is_zipfile(base / key)}
        if not alone:
            return
        path = shard_path(base, group)
        held = read_shard(path) if path.is_file() and path not in self.damaged else {}
        merged = held | {key: load_fields(file) for key, file in alone.items()}
        # Samples whose rows were removed from the table are kept, after the others.
        names = [key for key in keys if key in merged] + sorted(merged.keys() - set(keys))
        # Before the files are removed: a kill in between merges them again, into the same bytes.
        write_shard(path, {key: merged[key] for key in names})
        self._shards[folder] |= {key: group for key in names}
        for file in alone.values():
            file.unlink()
            remove_empty_folders(file.parent, base)

    def _check_options(self, samples: Sequence[SampleRow]) -> None:
        """Compares the options of the run with those that the stored samples of its rows were made with.

        Raises:
            ValueError: they differ; with folder, option, both values, number of samples and the first of them.
        """
        for folder in self._settings:
            file = self.fingerprints[folder]
            found: dict[str, list[str]] = {}
            for sample in samples:
                key = sample.key.as_posix()
                entry = file.entries.get(key)
                options = self._earlier[folder] if entry is None else entry.options
                # Few distinct options, so almost all rows end here. A row that is not stored has none.
                if self.differing_options(folder, options) and (
                    key in self._shards[folder] or (self.root / folder / key).is_file()
                ):
                    found.setdefault(options, []).append(key)
            for options, keys in found.items():
                name, (before, now) = next(iter(self.differing_options(folder, options).items()))
                raise ValueError(
                    f"{self.root / folder}: was prepared with {name} = {before!r}, now it is {now!r} ({len(keys)} of "
                    f"{len(samples)} samples, the first is {keys[0]}); choose another --output-dir, or "
                    f"--overwrite-changed to make these again, or --overwrite to make all again"
                )

            self._check_models(folder, {sample.key.as_posix() for sample in samples})

    def _check_models(self, folder: str, own: Set[str]) -> None:
        """Compares the models of the run with those that samples of other tables in the folder were made with.

        Other options may differ between tables; a model is trained on latents and features of one encoder.

        Args:
            folder: source folder.
            own: samples of this table.

        Raises:
            ValueError: a model differs; with both digests, number of samples and the first of them.
        """
        file, found = self.fingerprints[folder], dict[str, list[str]]()
        for key, entry in file.entries.items():
            if entry.state == "done" and entry.table != self.table_id(folder) and key not in own:
                found.setdefault(entry.options, []).append(key)
        for options, keys in found.items():
            for name, (before, now) in self.differing_options(folder, options).items():
                if name.endswith(MODEL_SUFFIX):
                    raise ValueError(
                        f"{self.root / folder}: has {len(keys)} samples of another table (the first is {min(keys)}) "
                        f"that were prepared with {name} = {before!r}, now it is {now!r}: one folder cannot hold those "
                        f"of two models; choose another --output-dir, or --overwrite-changed with each of the tables"
                    )

    def _clean(self) -> None:
        """Removes the unfinished files of killed runs."""
        for folder in self._shards:
            for parent, _, names in os.walk(self.root / folder):
                for name in names:
                    if _TEMPORARY.search(name):
                        Path(parent, name).unlink(missing_ok=True)

    def _list(self, folder: Path) -> dict[str, int]:
        """Samples in the shards of a folder, with the number of their shard; damaged shards count as missing."""
        found: dict[str, int] = {}
        for path in list_shards(folder):
            number = shard_number(path)
            assert number is not None
            try:
                found |= dict.fromkeys(shard_shapes(path), number)
            except ValueError:
                self.damaged.append(path)
        return found


def _with_earlier(now: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Options of samples without fingerprints: as noted, else the default of before an option existed."""
    return {name: earlier.get(name, _DEFAULTS.get(name, value)) for name, value in now.items()}


def _read_settings(root: Path) -> Settings:
    """Reads the options that the samples of a data root were made with; empty without a note.

    Raises:
        ValueError: the note is damaged.
    """
    path = root / SETTINGS_NAME
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it") from error


def _write_settings(root: Path, settings: Settings) -> None:
    """Notes the options of some folders and keeps the notes of the others."""
    merged = dict(sorted({**_read_settings(root), **settings}.items()))
    write_text(root / SETTINGS_NAME, json.dumps(merged, indent=1, ensure_ascii=False) + "\n")
