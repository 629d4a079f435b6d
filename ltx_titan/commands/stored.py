"""Where the samples of prepared data lie, whatever form they are stored in."""

from dataclasses import dataclass
from pathlib import Path

from ltx_titan.data import read_sample
from ltx_titan.data.layout import Fields, Kind
from ltx_titan.data.shards import list_shards, read_shard_sample, shard_shapes


@dataclass(frozen=True)
class Stored:
    """A sample of one source folder.

    Attributes:
        path: its file, or the shard that holds it.
        key: its name in the shard; None: it has a file of its own.
    """

    path: Path
    key: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.key is None else f"{self.path}: {self.key}"

    def read(self, kind: Kind | None = None) -> Fields:
        """Read it and check all of it.

        Raises:
            ValueError: it is broken, or of another kind.
        """
        if self.key is not None:
            return read_shard_sample(self.path, self.key, kind)
        return read_sample(self.path, kind)


def stored_samples(folder: Path) -> dict[str, Stored]:
    """The samples of a source folder by their path below it, which ends in `.pt`; in order of these.

    Raises:
        ValueError: a shard is broken: which samples it holds is not known.
    """
    found = {key: Stored(shard, key) for shard in list_shards(folder) for key in shard_shapes(shard)}
    # A file is newer than the shard's sample of the same name.
    found |= {path.relative_to(folder).as_posix(): Stored(path) for path in folder.rglob("*.pt")}
    return dict(sorted(found.items()))
