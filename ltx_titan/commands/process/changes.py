"""Changes since samples were made: rows compared with the fingerprints of their samples.

Files are compared by size and time, and by content where those differ: a copied or touched file is not encoded again.
What cannot be made again, since its file is gone, is kept. Samples made before fingerprints existed are adopted.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ltx_titan.commands.process.store import Store
from ltx_titan.commands.report import Report
from ltx_titan.common.ranks import Ranks
from ltx_titan.data.cache import READER_THREADS
from ltx_titan.data.fingerprints import FileVersion, Fingerprint, State, digest_of, is_changed, text_digest, version_of
from ltx_titan.tables.samples import SampleRow, relative_name, table_folder


class Maker(Protocol):
    """Inputs of a stage that are compared."""

    name: str

    @property
    def folders(self) -> tuple[str, ...]:
        """Source folders that it writes."""

    def applies_to(self, row: SampleRow) -> bool:
        """Whether the row has the file of this stage."""

    def sources(self, row: SampleRow) -> Mapping[str, Path]:
        """Role -> file that the row's samples are made of."""

    def text(self, row: SampleRow) -> str | None:
        """Caption that the row's samples are made of."""


@dataclass(frozen=True)
class MadeOf:
    """Inputs of a sample, except options, which differ between the folders of a stage."""

    files: Mapping[str, FileVersion]
    text: str | None


class Changes:
    """Decides which rows are done, and collects what changed of the others."""

    def __init__(self, store: Store, table: Path) -> None:
        """Starts a comparison.

        Args:
            store: the samples and their fingerprints.
            table: the dataset table, which paths are relative to.
        """
        self._store, self._base = store, table_folder(table)
        self._done: set[tuple[str, Path]] = set()
        # Note -> names of rows, in the order of the rows.
        self.notes: dict[str, list[str]] = {}
        # A clip is a source of its latents, audio, references and masks.
        self._version = lru_cache(maxsize=None)(self._read_version)

    def is_done(self, stage: Maker, row: SampleRow) -> bool:
        """Whether `compare` found that all samples of a row are stored and up to date."""
        return (stage.name, row.key) in self._done

    def made_of(self, stage: Maker, row: SampleRow) -> MadeOf:
        """Current inputs of a row's samples, with the content of its files; call it before they are read.

        Raises:
            OSError: a file cannot be read.
        """
        files = {}
        for role, path in stage.sources(row).items():
            # Before the digest: a file that is replaced meanwhile is compared again in the next run.
            version = self._read_version(path)
            if version is not None:
                files[role] = version._replace(digest=digest_of(path))
        text = stage.text(row)
        return MadeOf(files, None if text is None else text_digest(text))

    def compare(self, stages: Sequence[Maker], rows: Sequence[SampleRow], dry_run: bool) -> None:
        """Compares rows with what is stored.

        Changed samples are marked at once, so that training does not use them if this run is interrupted.
        """
        for stage in stages:
            stored = [
                row
                for row in rows
                if stage.applies_to(row) and all(self._store.is_complete(folder, row.key) for folder in stage.folders)
            ]
            self._read_digests(stage, stored)
            updates: dict[str, dict[str, Fingerprint]] = {folder: {} for folder in stage.folders}
            for row in stored:
                reasons = [self._compare(stage, folder, row, updates[folder]) for folder in stage.folders]
                reason = next((reason for reason in reasons if reason is not None), None)
                if reason is None:
                    self._done.add((stage.name, row.key))
                else:
                    self._note(f"{stage.name}: {reason}, made again", row)
            if not dry_run:
                for folder, entries in updates.items():
                    self._store.fingerprints[folder].set(entries)

    def orphans(
        self, stages: Sequence[Maker], rows: Sequence[SampleRow], idle_folders: Sequence[str]
    ) -> dict[str, list[str]]:
        """Samples that no row asks for, by source folder; those of other tables that still exist are not among them.

        Args:
            stages: all stages of the run.
            rows: all rows of the table.
            idle_folders: source folders of columns that the table does not have.
        """
        wanted: dict[str, set[str]] = {folder: set() for folder in idle_folders}
        for stage in stages:
            keys = {row.key.as_posix() for row in rows if stage.applies_to(row)}
            for folder in stage.folders:
                wanted.setdefault(folder, set()).update(keys)
        found = {}
        for folder, keys in wanted.items():
            entries = self._store.fingerprints[folder].entries
            stored = self._store.stored(folder)
            found[folder] = sorted(
                key for key in stored - keys if key in entries and self._is_ours(folder, entries[key])
            )
        return found

    def _compare(self, stage: Maker, folder: str, row: SampleRow, updates: dict[str, Fingerprint]) -> str | None:
        """Returns why a stored sample is made again, or None; adds the entry that changes to `updates`."""
        key = row.key.as_posix()
        entry = self._store.fingerprints[folder].entries.get(key)
        now = {role: self._version(path) for role, path in stage.sources(row).items()}
        if entry is None:
            updates[key] = entry = self._adopted(stage, folder, row)
        text = stage.text(row)
        changed = next((role for role, version in now.items() if self._differs(entry.files.get(role), version)), None)
        if changed is not None:
            reason = f"{changed} changed since"
        elif entry.text != (None if text is None else text_digest(text)):
            reason = "caption changed since"
        elif self._store.differing_options(folder, entry.options):
            reason = "options changed since"
        elif entry.state == "pending":
            return "unfinished"
        else:
            files = {role: self._refreshed(entry.files[role], version) for role, version in now.items()}
            state: State = "absent" if entry.state == "absent" else "done"
            current = Fingerprint(files, entry.text, entry.options, self._store.table_id(folder), state)
            if current != entry:
                if current.files != entry.files:
                    self._note("files with another time or name and the same content, kept", row)
                updates[key] = current
            return None
        if entry.state != "pending":
            updates[key] = replace(entry, state="pending")
        return reason

    def _differs(self, before: FileVersion | None, now: FileVersion | None) -> bool:
        # A file that is gone cannot be encoded again: many delete their clips once they are prepared.
        return now is not None and (before is None or is_changed(before, now, self._base / now.path))

    def _refreshed(self, before: FileVersion, now: FileVersion | None) -> FileVersion:
        return before if now is None else now._replace(digest=before.digest)

    def _read_digests(self, stage: Maker, rows: Iterable[SampleRow]) -> None:
        """Reads the files whose content decides, in parallel; `digest_of` remembers them."""
        paths = set()
        for row in rows:
            entry = self._store.fingerprints[stage.folders[0]].entries.get(row.key.as_posix())
            if entry is None:
                continue
            for role, path in stage.sources(row).items():
                before, now = entry.files.get(role), self._version(path)
                if before and now and before.digest and before.size == now.size and before[:3] != now[:3]:
                    paths.add(path)
        if paths:
            with ThreadPoolExecutor(READER_THREADS) as pool:
                list(pool.map(digest_of, sorted(paths)))

    def _adopted(self, stage: Maker, folder: str, row: SampleRow) -> Fingerprint:
        """Takes a sample without a fingerprint for made of what there is now.

        A killed run leaves none: it records a sample as pending before it writes the file.
        """
        versions = {role: self._version(path) for role, path in stage.sources(row).items()}
        files = {role: version for role, version in versions.items() if version is not None}
        made_ns = self._store.mtime_ns(folder, row.key)
        if any(version.mtime_ns > made_ns for version in files.values()):
            self._note(f"{folder}: made before fingerprints, older than their source; delete those that changed", row)
        self._note(f"{folder}: made before fingerprints were recorded, kept", row)
        text = stage.text(row)
        return Fingerprint(
            files,
            None if text is None else text_digest(text),
            self._store.earlier_options(folder),
            self._store.table_id(folder),
        )

    def _is_ours(self, folder: str, entry: Fingerprint) -> bool:
        """Whether a sample without a row is of this table, or of one that no longer exists."""
        if entry.table == self._store.table_id(folder):
            return True
        other = self._store.fingerprints[folder].values.get(entry.table, {}).get("path")
        return other is None or not (self._store.root / other).is_file()

    def _read_version(self, path: Path) -> FileVersion | None:
        return version_of(path, relative_name(path, self._base))

    def _note(self, note: str, row: SampleRow) -> None:
        self.notes.setdefault(note, []).append(row.subject(row.media.name))


def report_changes(notes_of_ranks: Sequence[Mapping[str, list[str]]], ranks: Ranks, report: Report) -> None:
    """Notes what all ranks found, once, with the number of rows and the first names."""
    if not ranks.is_main:
        return
    merged: dict[str, list[str]] = {}
    for notes in notes_of_ranks:
        for note, names in notes.items():
            merged.setdefault(note, []).extend(names)
    for note, names in merged.items():
        for name in names:
            report.note([note], name)
