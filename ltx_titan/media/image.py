"""Still images through Pillow, and the geometry of all frames: scaled to cover a size, cropped to it, in [-1, 1]."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ltx_titan.media.container import MediaError, check_file

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
CENTER = (0.5, 0.5)
"""Anchor of a centered crop."""
_EXIF_SRGB = 1


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image, by its suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | Path) -> Tensor:
    """Reads an image as one frame, uint8 [1, H, W, 3]: rotated by its EXIF tag, converted to sRGB by its ICC profile.

    Raises:
        MediaError: the file is not a readable image, or declares a color space without a profile to convert it by.
    """
    path = Path(path)
    check_file(path)
    try:
        with Image.open(path) as image:
            rgb = _to_srgb(ImageOps.exif_transpose(image), path)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"not a readable image, or truncated ({error})") from error
    return torch.from_numpy(np.array(rgb))[None]


def fit_frames(frames: Tensor, width: int, height: int, anchor: tuple[float, float] = CENTER) -> Tensor:
    """Scales frames so that they just cover width x height, and crops the excess.

    Bicubic with antialiasing; the aspect ratio is kept.

    Args:
        frames: uint8 [F, H, W, 3].
        width: pixels of the result.
        height: pixels of the result.
        anchor: position of the crop (down, right), from 0 (top or left) to 1 (bottom or right).

    Returns:
        Pixels [3, F, height, width] in [-1, 1], float32.
    """
    pixels = frames.permute(0, 3, 1, 2).float() / 255
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = (max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale)))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = int((size[0] - height) * anchor[0]), int((size[1] - width) * anchor[1])
    pixels = pixels[:, :, top : top + height, left : left + width]
    # The bicubic kernel overshoots at edges.
    return (pixels.clamp(0, 1) * 2 - 1).transpose(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Converts decoded pixels [3, F, H, W] in about [-1, 1] to frames for writing, uint8 [F, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # A profile describes the mode that the image is stored in, grayscale and CMYK included; it ignores alpha.
        image = image.convert("RGB") if image.mode in ("P", "RGBA") else image
        try:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError as error:
            raise MediaError(path, f"its color profile cannot be applied ({error})") from error
    space = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace, _EXIF_SRGB)
    if space != _EXIF_SRGB:
        raise MediaError(path, f"EXIF color space {space} is not sRGB (1), and no profile specifies its conversion")
    return image.convert("RGB")
