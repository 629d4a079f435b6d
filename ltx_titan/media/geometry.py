"""From stored to displayed frames: cropped by the container, pixels made square, rotated and mirrored.

A container can ask players for three changes, which FFmpeg applies in this order: cropping (the `clap` box of MP4,
`PixelCrop*` of Matroska), a pixel aspect ratio (width over height of one stored pixel), and a display matrix (ISO/IEC
14496-12, 8.3.2: x' = a x + c y, y' = b x + d y). Cropping by the video codec itself happens in the decoder.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import av
import numpy as np
import torch
import torch.nn.functional as F

from ltx_titan.media.container import MediaError

# Ratios within a thousandth of 1 are rounding of encoders, such as 4320:4319.
_SQUARE = Fraction(1, 1000)
_WIDEST = 8
# Matrix elements that count as 0 beside the largest.
_SMALL = 0.02


@dataclass(frozen=True)
class Geometry:
    """Changes from a stored to a displayed frame.

    Attributes:
        crop: pixels to remove (left, top, right, bottom).
        pixel_aspect: width over height of a stored pixel.
        is_transposed: whether rows become columns.
        flips: whether the result is mirrored (up and down, left and right), after transposing.
    """

    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    pixel_aspect: Fraction = Fraction(1)
    is_transposed: bool = False
    flips: tuple[bool, bool] = (False, False)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """Displayed pixels of a stored frame, uint8 [H, W, C].

        The shorter side of a pixel is enlarged, so that no detail is lost.
        """
        left, top, right, bottom = self.crop
        height, width = pixels.shape[:2]
        pixels = pixels[top : height - bottom, left : width - right]
        if self.pixel_aspect != 1:
            pixels = resized(pixels, *self._square(*pixels.shape[:2]))
        if self.is_transposed:
            pixels = pixels.swapaxes(0, 1)
        down, across = self.flips
        return pixels[:: -1 if down else 1, :: -1 if across else 1]

    def _square(self, height: int, width: int) -> tuple[int, int]:
        if self.pixel_aspect > 1:
            return height, round(width * self.pixel_aspect)
        return round(height / self.pixel_aspect), width


def display_geometry(path: str | Path, stream: av.VideoStream, frame: av.VideoFrame) -> Geometry:
    """Reads how a video is displayed.

    Args:
        path: the file.
        stream: its video track.
        frame: one decoded frame of it.

    Raises:
        MediaError: the container asks for something that cannot be applied, such as a rotation by 45 degrees.
    """
    crop = _container_crop(Path(path), stream, frame)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if aspect <= 0 or abs(aspect - 1) < _SQUARE:
        aspect = Fraction(1)
    if not Fraction(1, _WIDEST) <= aspect <= _WIDEST:
        raise MediaError(path, f"its pixels are {float(aspect):.3g} times as wide as high, expected 1/8 to 8")
    return Geometry(crop, aspect, *_orientation(path, frame))


def _orientation(path: str | Path, frame: av.VideoFrame) -> tuple[bool, tuple[bool, bool]]:
    """Whether to transpose, and then to flip (up and down, left and right)."""
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, (False, False)
    a, b, _, c, d = (value / 65536 for value in struct.unpack("=9i", bytes(side_data))[:5])
    straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
    if crossed <= _SMALL * straight and min(abs(a), abs(d)) > 0:
        return False, (d < 0, a < 0)
    if straight <= _SMALL * crossed and min(abs(b), abs(c)) > 0:
        return True, (b < 0, c < 0)
    raise MediaError(
        path,
        f"is displayed with the matrix [{a:.3g} {b:.3g}; {c:.3g} {d:.3g}]; expected mirroring or rotation by multiples "
        f"of 90 degrees; apply it: ffmpeg -i {Path(path).name} <new file>",
    )


def resized(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scales a frame uint8 [H, W, C]; bicubic with antialiasing."""
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _container_crop(path: Path, stream: av.VideoStream, frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Cropping that the container asks for; PyAV does not expose FFmpeg's side data of it, so the file is read."""
    name = stream.container.format.name
    try:
        with path.open("rb") as file:
            if "mp4" in name:
                crop = _mp4_crop(file, path.stat().st_size, stream.index, frame.width, frame.height)
            elif "matroska" in name:
                crop = _matroska_crop(file, path.stat().st_size, stream.index)
            else:
                return 0, 0, 0, 0
    except (struct.error, IndexError, ZeroDivisionError):
        # FFmpeg reads files whose headers are damaged in parts that it does not need.
        return 0, 0, 0, 0
    if min(crop) < 0 or crop[0] + crop[2] >= frame.width or crop[1] + crop[3] >= frame.height:
        raise MediaError(
            path, f"its container removes {crop} pixels (left, top, right, bottom) of {frame.width}x{frame.height}"
        )
    return crop


def _boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Boxes of ISO/IEC 14496-12 between two offsets: (type, offset of the content, end)."""
    while start + 8 <= end:
        file.seek(start)
        size, kind = struct.unpack(">I4s", file.read(8))
        header = 8
        if size == 1:
            (size,), header = struct.unpack(">Q", file.read(8)), 16
        stop = end if size == 0 else start + size
        if size and size < header:
            return
        yield kind, start + header, min(stop, end)
        start = stop


def _find_boxes(file: BinaryIO, start: int, end: int, *kinds: bytes) -> Iterator[tuple[int, int]]:
    """Contents of all boxes below a path of types."""
    for kind, first, stop in _boxes(file, start, end):
        if kind != kinds[0]:
            continue
        if len(kinds) == 1:
            yield first, stop
        else:
            yield from _find_boxes(file, first, stop, *kinds[1:])


def _mp4_crop(file: BinaryIO, size: int, track: int, width: int, height: int) -> tuple[int, int, int, int]:
    """The clean aperture of ISO/IEC 14496-12, 12.1.4: size, and offset of its center from the center of the frame."""
    tracks = list(_find_boxes(file, 0, size, b"moov", b"trak"))
    for first, end in _find_boxes(file, *tracks[track], b"mdia", b"minf", b"stbl", b"stsd"):
        for _, entry, stop in _boxes(file, first + 8, end):
            # A visual sample entry has 78 bytes of fields before its boxes.
            for content, _ in _find_boxes(file, entry + 78, stop, b"clap"):
                file.seek(content)
                values = struct.unpack(">IIIIiIiI", file.read(32))
                wide, high, right, down = (Fraction(*values[i : i + 2]) for i in range(0, 8, 2))
                left = round((width - wide) / 2 + right)
                top = round((height - high) / 2 + down)
                return left, top, width - left - round(wide), height - top - round(high)
    return 0, 0, 0, 0


_SEGMENT, _TRACKS, _TRACK, _VIDEO, _CLUSTER = 0x18538067, 0x1654AE6B, 0xAE, 0xE0, 0x1F43B675
_PIXEL_CROP = (0x54CC, 0x54BB, 0x54DD, 0x54AA)  # left, top, right, bottom


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Elements of EBML (RFC 8794) between two offsets: (id, offset of the content, end)."""
    while start < end:
        file.seek(start)
        head = file.read(12)
        id_bytes = 9 - head[0].bit_length()
        size_bytes = 9 - head[id_bytes].bit_length()
        kind = int.from_bytes(head[:id_bytes], "big")
        payload = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big") - (1 << 7 * size_bytes)
        first = start + id_bytes + size_bytes
        # All ones: the size is unknown, as in live streams.
        stop = end if payload == (1 << 7 * size_bytes) - 1 else first + payload
        yield kind, first, min(stop, end)
        start = stop


def _matroska_crop(file: BinaryIO, size: int, track: int) -> tuple[int, int, int, int]:
    for kind, first, end in _elements(file, 0, size):
        if kind != _SEGMENT:
            continue
        for part, part_first, part_end in _elements(file, first, end):
            if part == _TRACKS:
                entries = [item for item in _elements(file, part_first, part_end) if item[0] == _TRACK]
                crop = dict.fromkeys(_PIXEL_CROP, 0)
                for field, video_first, video_end in _elements(file, *entries[track][1:]):
                    if field == _VIDEO:
                        for name, value_first, value_end in _elements(file, video_first, video_end):
                            if name in crop:
                                file.seek(value_first)
                                crop[name] = int.from_bytes(file.read(value_end - value_first), "big")
                left, top, right, bottom = crop.values()
                return left, top, right, bottom
            if part == _CLUSTER:
                return 0, 0, 0, 0
    return 0, 0, 0, 0
