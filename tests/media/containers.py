"""Small files with properties of containers that PyAV's muxers cannot write, patched into the bytes."""

from fractions import Fraction

import av
import numpy as np


def corner(height=64, width=96):
    """A frame with a white top left quarter and a red bottom left one, black on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = 255
    pixels[height // 2 :, : width // 2] = (255, 0, 0)
    return pixels


def write_frames(
    path, frames, *, fps=25, pix_fmt="yuv420p", codec="libx264", sar=None, times=None, options=None, **tags
):
    """Encodes frames uint8 [H, W, 3 or 4]; `times` in milliseconds; `tags` are attributes of the codec context."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=1000 if times else fps, options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if sar is not None:
            stream.codec_context.sample_aspect_ratio = Fraction(sar)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            frame = frame.reformat(format=pix_fmt)
            for name in {"color_range", "color_primaries", "color_trc", "colorspace"} & tags.keys():
                setattr(frame, name, tags[name])
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_matrix(path, a, b, c, d):
    """Replaces the matrix of an MP4 file's first track header."""

    def packed(a, b, c, d):
        values = (a * 65536, b * 65536, 0, c * 65536, d * 65536, 0, 0, 0, 1 << 30)
        return b"".join(round(value).to_bytes(4, "big", signed=True) for value in values)

    content = path.read_bytes()
    at = content.index(packed(1, 0, 0, 1), content.index(b"tkhd"))
    path.write_bytes(content[:at] + packed(a, b, c, d) + content[at + 36 :])
    return path


def set_clean_aperture(path, width, height, right=0, down=0):
    """Adds a `clap` box to an MP4 file whose index follows its data, as PyAV writes it."""
    content = bytearray(path.read_bytes())
    values = [value for pair in ((width, 1), (height, 1), (right, 1), (down, 1)) for value in pair]
    box = (40).to_bytes(4, "big") + b"clap" + b"".join(value.to_bytes(4, "big", signed=True) for value in values)
    entry = content.index(b"avc1", content.index(b"stsd")) - 4
    end = entry + int.from_bytes(content[entry : entry + 4], "big")
    for kind in (b"avc1", b"stsd", b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        at = content.rindex(kind, 0, end) - 4
        size = int.from_bytes(content[at : at + 4], "big") + len(box)
        content[at : at + 4] = size.to_bytes(4, "big")
    content[end:end] = box
    path.write_bytes(content)
    return path


def set_matroska_crop(path, left, top, right, bottom):
    """Adds PixelCrop elements to the video of a Matroska file."""
    content = bytearray(path.read_bytes())
    ancestors, start = [], 0
    for wanted in (0x18538067, 0x1654AE6B, 0xAE, 0xE0):  # Segment, Tracks, TrackEntry, Video
        while True:
            id_bytes = 9 - content[start].bit_length()
            size_at = start + id_bytes
            size_bytes = 9 - content[size_at].bit_length()
            size = int.from_bytes(content[size_at : size_at + size_bytes], "big") - (1 << 7 * size_bytes)
            if int.from_bytes(content[start:size_at], "big") == wanted:
                break
            start = size_at + size_bytes + size
        ancestors.append((size_at, size_bytes, size))
        start = size_at + size_bytes
    fields = ((b"\x54\xcc", left), (b"\x54\xbb", top), (b"\x54\xdd", right), (b"\x54\xaa", bottom))
    added = b"".join(name + b"\x81" + bytes([value]) for name, value in fields)
    end = start + ancestors[-1][2]
    content[end:end] = added
    for size_at, size_bytes, size in ancestors:
        grown = size + len(added)
        assert grown < (1 << 7 * size_bytes) - 1
        content[size_at : size_at + size_bytes] = (grown + (1 << 7 * size_bytes)).to_bytes(size_bytes, "big")
    path.write_bytes(content)
    return path
