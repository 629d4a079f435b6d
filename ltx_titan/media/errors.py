"""The one error of this package, so that a caller can name a bad file and go on with the next."""

from pathlib import Path


class MediaError(ValueError):
    """A media file cannot be used. The message is `<file>: <reason>`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason
