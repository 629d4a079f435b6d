"""Still images through Pillow, and the geometry of all frames: scaled to cover a size, cropped to it, in [-1, 1]."""

import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from ltx_titan.media.color import over_white
from ltx_titan.media.container import MediaError, check_file
from ltx_titan.tables.folders import HEIF_SUFFIXES, IMAGE_SUFFIXES

CENTER = (0.5, 0.5)
"""Anchor of a centered crop."""
_EXIF_SRGB = 1
# H.273: BT.709 or unspecified primaries; the transfers of BT.709, BT.601, sRGB and BT.2020, or unspecified.
_SRGB_PRIMARIES = (1, 2)
_SRGB_TRANSFERS = (1, 2, 6, 13, 14, 15)
_SRGB_GAMMA = 0.45455
_HEADER_BYTES = 1 << 16
_TIFF_SUBFILE = 254
_MAIN_IMAGE_FIRST = ("MPO", "JPEG")


def is_image(path: str | Path) -> bool:
    """Whether a file is a still image, by its suffix."""
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def read_image(path: str | Path) -> Tensor:
    """Reads an image as one frame, uint8 [1, H, W, 3], as a viewer shows it.

    Rotated by its EXIF tag, converted to sRGB by its ICC profile, reduced to 8 bits, composited over white.

    Raises:
        MediaError: the file is not a readable image, holds several, or has colors that cannot be converted to sRGB.
    """
    path = Path(path)
    check_file(path)
    if path.suffix.lower() in HEIF_SUFFIXES:
        raise MediaError(path, f"is a HEIF photo, which Pillow cannot read; heif-convert {path.name} {path.stem}.png")
    try:
        with Image.open(path) as image:
            _main_image(image, path)
            upright = ImageOps.exif_transpose(image)
            rgb = _over_white(_to_srgb(_to_8_bits(upright, path), path)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(path, f"not a readable image, or truncated ({error}); save it as 8-bit PNG") from error
    return torch.from_numpy(np.array(rgb))[None]


def image_has_alpha(path: str | Path) -> bool:
    """Whether an image that can be read has transparent pixels, which `read_image` composites over white."""
    with Image.open(path) as image:
        return image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255)


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
    # Truncated and not rounded, as the reference trainer does: one pixel changes every value of the result.
    size = (max(height, int(pixels.shape[2] * scale)), max(width, int(pixels.shape[3] * scale)))
    if size != tuple(pixels.shape[2:]):
        pixels = F.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = int((size[0] - height) * anchor[0]), int((size[1] - width) * anchor[1])
    pixels = pixels[:, :, top : top + height, left : left + width]
    # The bicubic kernel overshoots at edges.
    return (pixels.clamp(0, 1) * 2 - 1).transpose(0, 1)


def to_uint8(pixels: Tensor) -> Tensor:
    """Converts decoded pixels [3, F, H, W] in about [-1, 1] to frames for writing, uint8 [F, H, W, 3]."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def _main_image(image: Image.Image, path: Path) -> None:
    """Selects the image of a file: the only one of full size. Multi-picture JPEGs start with the main one."""
    count = getattr(image, "n_frames", 1)
    if count == 1 or image.format in _MAIN_IMAGE_FIRST:
        return
    full = []
    for index in range(count):
        image.seek(index)
        # NewSubfileType: bit 0 marks a thumbnail, bit 2 a transparency mask.
        if image.format != "TIFF" or not image.tag_v2.get(_TIFF_SUBFILE, 0) & 0b101:
            full.append(index)
    if len(full) != 1:
        kind = "pages" if image.format == "TIFF" else "frames"
        raise MediaError(
            path,
            f"holds {len(full)} {kind}, expected one image; save the one you mean as PNG, or convert an animation to "
            f"video: ffmpeg -i {path.name} {path.stem}.mp4",
        )
    image.seek(full[0])


def _to_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """Reduces 16-bit gray to 8 bits by v / 257; Pillow's own conversion would clip it at 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise MediaError(
            path, f"holds {kind}, for which no file states what white is; expected 8 or 16 bits; save it as 16-bit PNG"
        )
    return image


def _over_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.fromarray(over_white(np.asarray(image.convert("RGBA"))))


def _to_srgb(image: Image.Image, path: Path) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        # A profile describes the mode that the image is stored in, grayscale and CMYK included; it ignores alpha.
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        image = (
            image.convert("L" if image.mode == "LA" else "RGB") if image.mode in ("P", "PA", "RGBA", "LA") else image
        )
        try:
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except ImageCms.PyCMSError as error:
            raise MediaError(path, f"its color profile cannot be applied ({error})") from error
        if alpha is not None:
            converted.putalpha(alpha)
        return converted
    _check_is_srgb(image, path)
    return image


def _check_is_srgb(image: Image.Image, path: Path) -> None:
    """Checks what an image without a profile states about its colors.

    Raises:
        MediaError: that they are not sRGB.
    """
    space = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ColorSpace, _EXIF_SRGB)
    if space != _EXIF_SRGB:
        raise MediaError(path, f"EXIF color space {space} is not sRGB (1), and no profile specifies its conversion")
    primaries, transfer = _coded_colors(path)
    if primaries not in _SRGB_PRIMARIES or transfer not in _SRGB_TRANSFERS:
        raise MediaError(
            path,
            f"is tagged with primaries {primaries} and transfer {transfer} of H.273, expected sRGB (1 and 13); HDR and "
            "wide colors need a conversion of your choice: save it as 8-bit sRGB PNG",
        )
    gamma = image.info.get("gamma")
    if gamma and "srgb" not in image.info and abs(gamma - _SRGB_GAMMA) > 0.02:
        raise MediaError(path, f"its gAMA chunk states {gamma:.3g}, expected {_SRGB_GAMMA}; save it as sRGB PNG")


def _coded_colors(path: Path) -> tuple[int, int]:
    """Primaries and transfer of H.273 in the cICP chunk of a PNG or the colr box of an AVIF; unspecified (2) if absent.

    Pillow does not read them.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER_BYTES)
    if head.startswith(b"\x89PNG") and (at := head.find(b"cICP", 0, head.find(b"IDAT"))) > 0:
        return head[at + 4], head[at + 5]
    if head[4:8] == b"ftyp" and (at := head.find(b"colrnclx")) > 0:
        return int.from_bytes(head[at + 8 : at + 10], "big"), int.from_bytes(head[at + 10 : at + 12], "big")
    return 2, 2
