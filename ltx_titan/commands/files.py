"""Media files that commands find and images that they write.

Commands need no process group. Under torchrun each rank processes every N-th item, and when it is done writes the whole
table from the outputs that all ranks have on disk by then; the last one sees all of them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ltx_titan.common.files import atomic_write
from ltx_titan.media.folders import AUDIO_SUFFIXES, REFERENCE_SUFFIXES, VIDEO_SUFFIXES, find_media

__all__ = ["AUDIO_SUFFIXES", "REFERENCE_SUFFIXES", "VIDEO_SUFFIXES", "find_media", "write_image"]


def write_image(path: Path, frame: np.ndarray) -> None:
    """Writes a frame uint8 [H, W, 3] as PNG, atomically; its folder is created."""
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
