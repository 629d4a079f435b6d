"""Whether a prepared file can be kept, so that a run that was stopped goes on where it was.

Files are written whole or not at all, but a full disk or an interrupted copy can still cut one off. A `.pt` file is a
zip archive whose table of contents stands at its end: a file that has one is whole, and is not opened further.
"""

import zipfile
from pathlib import Path


def is_whole(path: Path) -> bool:
    """Whether a sample's file is there and complete."""
    return path.is_file() and zipfile.is_zipfile(path)
