"""Where prepared samples go, what is there already, and which of them a rank makes.

Every sample is first written to a `.pt` file of its own, whole or not at all, so that a run that is killed loses the
sample it was working on and nothing else. With a shard size, the files of a shard's samples are then put together as
soon as all of them have been through (`seal`). Which shard a sample belongs to follows from its row alone, and one rank
does all of a shard: any number of ranks, and any number of interruptions, end in the same bytes.

Files are written under a temporary name, but a full disk or an interrupted copy can still cut one off. A `.pt` file is
a zip archive whose table of contents stands at its end, and the header of a shard tells its length: neither needs to be
read to know that it is whole.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

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
from ltx_titan.media.tables import SampleRow

_TEMPORARY = re.compile(r"\.(pt|safetensors)\.tmp\.\d+(\.[0-9a-f]+)?$")


class Store:
    """The data root that a run writes to."""

    def __init__(
        self, root: Path, samples: Sequence[SampleRow], folders: Iterable[str], shard_size: int | None = None
    ) -> None:
        """Looks at what is there.

        Args:
            root: root of the prepared data; need not exist.
            samples: all samples of the data set, in the order of their rows.
            folders: source folders that the run may read or write.
            shard_size: samples per shard, None for a `.pt` file each.
        """
        self.root = root
        self.damaged: list[Path] = []
        self._is_sharded = shard_size is not None
        self._shards = {folder: self._list(root / folder) for folder in folders}
        present = {key: number for keys in self._shards.values() for key, number in keys.items()}
        # A sample stays in the shard it is in, also where rows have come in before it since.
        self._shard = {
            key: present.get(key, index // (shard_size or 1)) if shard_size else index
            for index, key in enumerate(sample.key.as_posix() for sample in samples)
        }
        self._members: dict[int, list[str]] = {}
        for key, number in self._shard.items():
            self._members.setdefault(number, []).append(key)

    def has(self, folder: str, key: Path) -> bool:
        """Whether a sample is there and whole."""
        path = self.root / folder / key
        return key.as_posix() in self._shards[folder] or (path.is_file() and zipfile.is_zipfile(path))

    def read(self, folder: str, key: Path) -> Fields:
        """A sample, as training reads it.

        Raises:
            ValueError: it is not there, or broken.
        """
        path = self.root / folder / key
        number = self._shards[folder].get(key.as_posix())
        if number is None or path.is_file():
            return read_sample(path)
        return read_shard_sample(shard_path(self.root / folder, number), key.as_posix())

    def write(self, folder: str, key: Path, fields: Mapping[str, Value]) -> None:
        """Writes a sample.

        Raises:
            ValueError: a reader would refuse its fields.
        """
        write_sample(self.root / folder / key, fields)

    def share(self, samples: Iterable[SampleRow], rank: int, world_size: int) -> list[SampleRow]:
        """The samples that a rank makes, in the order in which it does: shard by shard, else every n-th."""
        mine = [sample for sample in samples if self.group(sample) % world_size == rank]
        return sorted(mine, key=lambda sample: (self.group(sample), sample.row))

    def group(self, sample: SampleRow) -> int:
        """Number of the shard that a sample belongs to; where there are no shards, one of its own."""
        return self._shard[sample.key.as_posix()]

    def num_groups(self) -> int:
        """How many groups there are to share among ranks."""
        return len(self._members)

    def seal(self, folder: str, group: int) -> None:
        """Puts the files of a shard's samples together, with what the shard holds already; does nothing without files.

        May be called again after any interruption: files go only when the shard that holds them is complete.
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
        # Rows that are gone from the metadata keep their samples, behind the others.
        names = [key for key in keys if key in merged] + sorted(merged.keys() - set(keys))
        write_shard(path, {key: merged[key] for key in names})
        self._shards[folder] |= {key: group for key in names}
        for file in alone.values():
            file.unlink()
            _remove_empty(file.parent, base)

    def clean(self) -> None:
        """Removes what a run that was killed left half-written."""
        for folder in self._shards:
            for parent, _, names in os.walk(self.root / folder):
                for name in names:
                    if _TEMPORARY.search(name):
                        Path(parent, name).unlink(missing_ok=True)

    def _list(self, folder: Path) -> dict[str, int]:
        """Samples in the shards of a folder; a damaged shard counts as not there."""
        found = {}
        for path in list_shards(folder):
            number = shard_number(path)
            assert number is not None
            try:
                found |= dict.fromkeys(shard_shapes(path), number)
            except ValueError:
                self.damaged.append(path)
        return found


def _remove_empty(folder: Path, base: Path) -> None:
    while folder != base and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent
