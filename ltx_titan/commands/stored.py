"""Samples of prepared data, in single `.pt` files or in shards."""

from dataclasses import dataclass
from pathlib import Path

from ltx_titan.data import read_sample
from ltx_titan.data.layout import Fields, Kind
from ltx_titan.data.shards import list_shards, read_shard_sample, shard_shapes


@dataclass(frozen=True)
class StoredSample:
    """Location of a sample of one source folder.

    Attributes:
        path: its file, or the shard that contains it.
        key: its name in the shard; None if it has its own file.
    """

    path: Path
    key: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}: {self.key}"

    def read(self, kind: Kind | None = None) -> Fields:
        """Reads and validates the sample.

        Raises:
            ValueError: it is damaged, or of another kind.
        """
        if self.key is not None:
            return read_shard_sample(self.path, self.key, kind)
        return read_sample(self.path, kind)


def stored_samples(folder: Path) -> dict[str, StoredSample]:
    """Samples of a source folder by their path below it, which ends in `.pt`; sorted by path.

    Raises:
        ValueError: a shard is damaged, so that its samples are unknown.
    """
    found = {key: StoredSample(shard, key) for shard in list_shards(folder) for key in shard_shapes(shard)}
    # A file takes precedence over a sample of the same name in a shard, since it was written later.
    found |= {path.relative_to(folder).as_posix(): StoredSample(path) for path in folder.rglob("*.pt")}
    return dict(sorted(found.items()))
