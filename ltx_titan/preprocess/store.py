"""Files of a prepared data set: written whole or not at all, so that a run that was stopped can go on.

A `.pt` file is a zip archive whose table of contents stands at its end. A file that a full disk cut off has none, and
is made again.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch


def write_sample(path: Path, fields: dict[str, Any]) -> None:
    """Save the fields of one sample under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    torch.save(fields, temporary)
    temporary.rename(path)


def is_whole(path: Path) -> bool:
    """Whether a sample's file is there and complete."""
    return path.is_file() and zipfile.is_zipfile(path)


def no_audio_marker(path: Path) -> Path:
    """The empty file that says a clip has no sound, beside where its audio latents would be.

    Readers look for `.pt` files only. Without the marker, a silent clip would be encoded again on every run.
    """
    return path.with_suffix(".no-audio")
