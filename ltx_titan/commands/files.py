"""Images that commands write.

Commands need no process group. Under torchrun each rank processes every N-th item, and when it is done writes the whole
table from the outputs that all ranks have on disk by then; the last one sees all of them.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ltx_titan.common.files import atomic_write


def write_image(path: Path, frame: np.ndarray) -> None:
    """Writes a frame uint8 [H, W, 3] as PNG, atomically; its folder is created."""
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
