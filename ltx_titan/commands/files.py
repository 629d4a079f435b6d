"""Media files that commands find and images that they write.

Commands need no process group. Under torchrun each rank processes every N-th item, and when it is done writes the whole
table from the outputs that all ranks have on disk by then; the last one sees all of them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ltx_titan.common.files import atomic_write

VIDEO_SUFFIXES = frozenset({".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"})
# Endings of reference files by kind. Datasets on disk use the British spelling.
REFERENCE_SUFFIXES = {"edges": "_edges", "gray": "_grey", "grey": "_grey", "blur": "_blur", "depth": "_depth"}


def find_media(folder: Path, suffixes: frozenset[str], recursive: bool = True) -> list[Path]:
    """Media files of a folder with given suffixes, sorted by path.

    Hidden files and folders are skipped, and so are references (`a_edges.mp4`) of clips in the same folder (`a.mp4`).

    Raises:
        ValueError: the folder does not exist, or contains no such file.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder")
    found = [
        path
        for path in (folder.rglob("*") if recursive else folder.iterdir())
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not found:
        kinds = ", ".join(sorted(suffixes))
        below = "" if recursive else "; add --recursive to search its subfolders"
        raise ValueError(f"{folder}: contains no media files ({kinds}){below}")
    # Only beside the clip it belongs to: a file that merely ends in `_edges` is a clip.
    names = {path.with_suffix("") for path in found}
    return sorted(path for path in found if not any(clip in names for clip in _clips_of(path)))


def _clips_of(path: Path) -> list[Path]:
    """Paths without suffix of the clips that a file is a reference of, judging by its name."""
    endings = set(REFERENCE_SUFFIXES.values())
    return [path.with_name(path.stem.removesuffix(ending)) for ending in endings if path.stem.endswith(ending)]


def write_image(path: Path, frame: np.ndarray) -> None:
    """Writes a frame uint8 [H, W, 3] as PNG, atomically; its folder is created."""
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
