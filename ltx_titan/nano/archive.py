"""The trained miniature pack as one compressed file of the package."""

import io
import lzma
import tarfile
from importlib import resources
from pathlib import Path

TRAINED_NAME = "ltx-2.3-nano-trained.safetensors"
TEXT_ENCODER_NAME = "text_encoder"
_ARCHIVE = "nano_trained.tar.xz"

# Bit 0 of a position: bytes of a weight alternate between sign with exponent, and mantissa.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]


def archive_pack(folder: Path, archive: Path) -> None:
    """Compresses a pack without loss: about two thirds of bfloat16 weights are entropy.

    Args:
        folder: with the checkpoint and `text_encoder/`.
        archive: the `.tar.xz` to write; the same bytes for the same files.
    """
    names = [TRAINED_NAME, *sorted(str(p.relative_to(folder)) for p in (folder / TEXT_ENCODER_NAME).iterdir())]
    with lzma.open(archive, "wb", filters=_FILTERS) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        for name in names:
            data = (folder / name).read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def unpack_trained_nano(folder: str | Path) -> Path:
    """Writes the trained pack of this package, `ltx-2.3-nano-trained.safetensors` and `text_encoder/`.

    Returns:
        The path of the checkpoint file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    archive = resources.files("ltx_titan") / "assets" / _ARCHIVE
    with archive.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:xz") as tar:
        tar.extractall(folder, filter="data")
    return folder / TRAINED_NAME
