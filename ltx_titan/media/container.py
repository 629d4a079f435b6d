"""Opening of media files, and the one error of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
from av.container import InputContainer


class MediaError(ValueError):
    """A media file cannot be used: a caller reports it and continues with the next. The message: `<file>: <reason>`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def check_file(path: str | Path) -> None:
    """Checks that a file exists and is not empty.

    Raises:
        MediaError: it does not, or is.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Opens a video or audio file for reading with PyAV.

    Raises:
        MediaError: the file is missing, empty, damaged or not a media file; also for errors while the caller decodes.
    """
    check_file(path)
    try:
        with av.open(str(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(path, f"not a readable media file, or truncated ({error.strerror})") from error


def video_start_s(container: InputContainer) -> Fraction:
    """Time stamp of the first video frame, which is time 0 of a clip, in seconds; 0 without video or time stamps."""
    video = container.streams.video[0] if container.streams.video else None
    if video is None or video.start_time is None or video.time_base is None:
        return Fraction(0)
    return video.start_time * video.time_base
