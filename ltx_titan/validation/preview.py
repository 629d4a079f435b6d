"""Sampled clips in TensorBoard and W&B: moving pictures, a sheet of frames and audio, each with its prompt and step.

A preview is made where the clip was decoded and is small enough to be sent to the rank that writes. TensorBoard has no
video player; an animated GIF in an image summary plays in every browser. W&B has one and gets the clip itself.
"""

import io
import os
import tempfile
import textwrap
import wave
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.audio import metadata as audio_metadata
from tensorboard.plugins.image import metadata as image_metadata
from torch.utils.tensorboard import SummaryWriter

from ltx_titan.validation.decode import DecodedSample

_SIDE = 320
_MOVING_FRAMES = 32
_SHEET_FRAMES, _SHEET_COLUMNS = 8, 4
_LINE_HEIGHT, _LINE_LENGTH = 14, 120
_TITLE_LENGTH = 100


@dataclass(frozen=True)
class Preview:
    """One clip, encoded; None where it has no such part.

    Attributes:
        moving: animated GIF.
        frames: PNG of frames in rows, in order of time.
        audio: WAV file.
    """

    moving: bytes | None = None
    frames: bytes | None = None
    audio: bytes | None = None


def make_preview(decoded: DecodedSample, fps: float) -> Preview:
    """Encodes a preview of at most 320 pixels a side and 32 moving frames; audio is whole."""
    fields: dict[str, bytes] = {}
    if decoded.frames is not None:
        frames = [_small(Image.fromarray(frame)) for frame in decoded.frames.numpy()]
        fields["frames"] = _encoded(_rows([frames[place] for place in _spread(len(frames), _SHEET_FRAMES)]), "PNG")
        if len(frames) > 1:
            moving = [frames[place] for place in _spread(len(frames), _MOVING_FRAMES)]
            duration_ms = round(1000 * len(frames) / fps / len(moving))
            fields["moving"] = _encoded(
                moving[0], "GIF", save_all=True, append_images=moving[1:], duration=duration_ms, loop=0
            )
    if decoded.audio is not None:
        fields["audio"] = _wav(decoded.audio.waveform, decoded.audio.sample_rate)
    return Preview(**fields)


def write_preview(writer: SummaryWriter, tag: str, prompt: str, preview: Preview, step: int) -> None:
    """Puts a preview under `<tag>/video`, `/frames`, `/audio` and its prompt under `/prompt`, at a step.

    Cards are entitled with the beginning of the prompt.
    """
    title = textwrap.shorten(prompt, _TITLE_LENGTH, placeholder=" ...")
    values = []
    for name, encoded in (("video", preview.moving), ("frames", preview.frames)):
        if encoded is not None:
            size = [str(side).encode() for side in Image.open(io.BytesIO(encoded)).size]
            about = image_metadata.create_summary_metadata(title, prompt)
            values.append(Summary.Value(tag=f"{tag}/{name}", tensor=_strings([*size, encoded], 3), metadata=about))
    if preview.audio is not None:
        about = audio_metadata.create_summary_metadata(title, prompt, audio_metadata.Encoding.Value("WAV"))
        audio = _strings([preview.audio, b""], 1, 2)
        values.append(Summary.Value(tag=f"{tag}/audio", tensor=audio, metadata=about))
    # The writer's own methods re-encode: no moving pictures without a further package, audio in mono, and no titles.
    writer._get_file_writer().add_summary(Summary(value=values), step)
    writer.add_text(f"{tag}/prompt", prompt, step)


@contextmanager
def wandb_media(clips: Iterable[tuple[str, str, Path, Preview]]) -> Iterator[dict[str, Any]]:
    """Clips as W&B shows them, captioned with their prompts: `<tag>/video`, `/frames`, `/audio`.

    Args:
        clips: tag, prompt, file and preview of each. A file that is on another machine is stood in for by its preview.

    Yields:
        What a run's `log` takes; it copies the files, which the context then removes.
    """
    import wandb

    media: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tag, prompt, path, preview in clips:
            if preview.moving is not None and path.exists():
                media[f"{tag}/video"] = wandb.Video(str(path), caption=prompt, format="mp4")
            elif preview.moving is not None:
                media[f"{tag}/video"] = wandb.Video(io.BytesIO(preview.moving), caption=prompt, format="gif")
            if preview.frames is not None:
                media[f"{tag}/frames"] = wandb.Image(Image.open(io.BytesIO(preview.frames)), caption=prompt)
            if preview.audio is not None:
                audio = Path(folder) / f"{tag}.wav"
                audio.write_bytes(preview.audio)
                media[f"{tag}/audio"] = wandb.Audio(str(audio), caption=prompt)
        yield media


def write_contact_sheet(path: str | Path, rows: Sequence[tuple[str, Preview]]) -> Path | None:
    """Writes frames of several clips below each other, each under its prompt, as one PNG.

    Args:
        path: the file; its folder exists.
        rows: prompt and preview of each clip.

    Returns:
        The file, or None where no clip has pictures.
    """
    shown = [(prompt, Image.open(io.BytesIO(preview.frames))) for prompt, preview in rows if preview.frames is not None]
    if not shown:
        return None
    texts = [textwrap.wrap(prompt, _LINE_LENGTH) or [""] for prompt, _ in shown]
    width = max(_LINE_LENGTH * 6, *(frames.width for _, frames in shown))
    height = sum(image.height + _LINE_HEIGHT * (len(lines) + 1) for (_, image), lines in zip(shown, texts, strict=True))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for (_, frames), lines in zip(shown, texts, strict=True):
        draw.multiline_text((2, top + 1), "\n".join(lines), fill="black")
        top += _LINE_HEIGHT * len(lines) + 2
        sheet.paste(frames, (0, top))
        top += frames.height + _LINE_HEIGHT - 2
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    sheet.save(temporary, format="PNG")
    temporary.rename(path)
    return path


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((_SIDE, _SIDE))
    return image


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` places, evenly from the first to the last."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().int().tolist()


def _rows(frames: list[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    columns = min(len(frames), _SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * columns, height * -(-len(frames) // columns)))
    for place, frame in enumerate(frames):
        sheet.paste(frame, (place % columns * width, place // columns * height))
    return sheet


def _strings(values: list[bytes], *shape: int) -> TensorProto:
    dims = [TensorShapeProto.Dim(size=size) for size in shape]
    return TensorProto(dtype=DT_STRING, string_val=values, tensor_shape=TensorShapeProto(dim=dims))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _wav(waveform: torch.Tensor, sample_rate: int) -> bytes:
    buffer = io.BytesIO()
    samples = (waveform.float().clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(buffer, "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(samples.T.contiguous().numpy().tobytes())
    return buffer.getvalue()
