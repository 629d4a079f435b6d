"""Opening of media files, the choice of their tracks, and the one error of this package."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
from av.codec.context import Flags
from av.container import InputContainer
from av.stream import Disposition

_NOT_THE_VIDEO = (
    Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent | Disposition.still_image
)
# Major brands of ISO/IEC 23008-12 (HEIF) and AV1 image files, which FFmpeg opens as if they were films.
_IMAGE_BRANDS = frozenset({"heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "mif2", "msf1", "avif", "avis"})

# VP8 and VP9 keep transparency in a second layer, which FFmpeg's own decoders drop.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

T = TypeVar("T", av.VideoStream, av.AudioStream)


class MediaError(ValueError):
    """A media file cannot be used: a caller reports it and continues with the next. The message: `<file>: <reason>`."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason


def check_file(path: str | Path) -> None:
    """Checks that a file exists and is not empty.

    Raises:
        MediaError: it does not, or is.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(path, "no such file")
    if path.stat().st_size == 0:
        raise MediaError(path, "is empty (0 bytes)")


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Opens a video or audio file for reading with PyAV.

    Raises:
        MediaError: the file is missing, empty, damaged or not a media file; also for errors while the caller decodes.
    """
    check_file(path)
    try:
        # Absolute: FFmpeg takes the start of a relative name such as `take:1.mp4` for a protocol.
        with av.open(os.path.abspath(path)) as container:
            yield container
    except av.error.FFmpegError as error:
        raise MediaError(path, f"not a readable media file, or truncated ({error.strerror})") from error


def video_stream(container: InputContainer, path: str | Path) -> av.VideoStream:
    """The video track that a player shows: the default one, else the first; never a cover image or a thumbnail.

    Raises:
        MediaError: there is none, or the file is a photo.
    """
    if container.metadata.get("major_brand", "").strip() in _IMAGE_BRANDS:
        raise MediaError(
            path,
            "is a HEIF or AVIF photo, whose image may be made of tiles that no reader here assembles; "
            f"convert it: heif-convert {Path(path).name} {Path(path).stem}.png",
        )
    candidates = [stream for stream in container.streams.video if not stream.disposition & _NOT_THE_VIDEO]
    if not candidates:
        has_cover = ", only a cover image or thumbnails" if container.streams.video else ""
        raise MediaError(path, f"has no video track{has_cover}")
    stream = _preferred(candidates)
    if stream is None:
        raise MediaError(path, "this build of FFmpeg cannot decode its video codec; convert it to H.264")
    stream.thread_type = "AUTO"
    # Without it the decoder keeps what the video codec crops on the left if that is no multiple of 32 bytes.
    stream.codec_context.flags |= Flags.unaligned
    return stream


def decode_video(container: InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Frames of a video track as stored, with their time stamps."""
    decoder = _ALPHA_DECODERS.get(stream.codec_context.name) if stream.metadata.get("alpha_mode") == "1" else None
    if decoder is None or decoder not in av.codecs_available:
        yield from container.decode(stream)
        return
    context = av.CodecContext.create(decoder, "r")
    for packet in container.demux(stream):
        # The last packet is empty: it asks the decoder for what it holds.
        for frame in context.decode(packet if packet.size else None):
            frame.time_base = stream.time_base
            yield frame


def has_video(container: InputContainer) -> bool:
    """Whether there is a video track other than cover images."""
    return any(not stream.disposition & _NOT_THE_VIDEO for stream in container.streams.video)


def audio_stream(container: InputContainer, path: str | Path) -> av.AudioStream | None:
    """The audio track that a player plays: the default one, else the first that can be decoded; None without a track.

    Raises:
        MediaError: there are tracks, and none can be decoded.
    """
    if not container.streams.audio:
        return None
    stream = _preferred(container.streams.audio)
    if stream is None:
        raise MediaError(path, "this build of FFmpeg cannot decode its audio codec; convert it to AAC or WAV")
    return stream


def first_frame_s(container: InputContainer, path: str | Path) -> Fraction | None:
    """Time stamp in seconds of the first frame that decodes, which is time 0 of a clip; None without video.

    A stream that was cut between key frames starts with frames that cannot be decoded, so the header's start time would
    be too early. Decodes one frame; the container must be opened again to read from its start.
    """
    if not has_video(container):
        return None
    first = next(decode_video(container, video_stream(container, path)), None)
    return None if first is None or first.pts is None else first.pts * first.time_base


def _preferred(streams: Sequence[T]) -> T | None:
    """The default track of those with a decoder, else the first. Phones add tracks in codecs that FFmpeg lacks."""
    decodable = [stream for stream in streams if stream.codec_context is not None]
    return next(
        (stream for stream in decodable if stream.disposition & Disposition.default), next(iter(decodable), None)
    )
