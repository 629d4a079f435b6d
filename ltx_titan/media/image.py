"""Still images through Pillow: upright and in sRGB, as a clip of one frame."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ltx_titan.media.errors import MediaError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
_EXIF_SRGB = 1


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image, by its suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | Path) -> Tensor:
    """Read an image as one frame, uint8 [1, H, W, 3]: turned upright by its EXIF tag, converted to sRGB by its profile.

    Raises:
        MediaError: the file is not a readable image, or declares a colour space it has no profile for.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            rgb = _to_srgb(upright, path)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"not a readable image, or truncated ({error})") from error
    return torch.from_numpy(np.array(rgb))[None]


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # Profiles describe the mode the image is stored in, grey and CMYK included; transparency has no place in them.
        image = image.convert("RGB") if image.mode in ("P", "RGBA") else image
        try:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError as error:
            raise MediaError(path, f"its colour profile cannot be applied ({error})") from error
    space = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace, _EXIF_SRGB)
    if space != _EXIF_SRGB:
        raise MediaError(path, f"EXIF colour space {space} is not sRGB (1) and no profile says how to convert it")
    return image.convert("RGB")
