"""Where the samples of prepared data lie, whatever form they are stored in."""

from dataclasses import dataclass
from pathlib import Path

from ltx_titan.data import read_sample
from ltx_titan.data.layout import Fields, Kind


@dataclass(frozen=True)
class Stored:
    """A sample of one source folder.

    Attributes:
        path: its file.
    """

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, kind: Kind | None = None) -> Fields:
        """Read it and check all of it.

        Raises:
            ValueError: it is broken, or of another kind.
        """
        return read_sample(self.path, kind)


def stored_samples(folder: Path) -> dict[str, Stored]:
    """The samples of a source folder by their path below it, which ends in `.pt`; in order of these."""
    found = {path.relative_to(folder).as_posix(): Stored(path) for path in folder.rglob("*.pt")}
    return dict(sorted(found.items()))
