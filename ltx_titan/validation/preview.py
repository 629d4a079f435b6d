"""Previews of sampled clips for TensorBoard and W&B: an animated GIF, a sheet of frames and the audio.

A preview is made on the rank that decoded the clip and is small enough to be sent to rank 0. TensorBoard has no video
player; an animated GIF in an image summary plays in every browser. W&B has one and gets the clip itself.
"""

import io
import tempfile
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.audio import metadata as audio_metadata
from tensorboard.plugins.image import metadata as image_metadata
from torch.utils.tensorboard import SummaryWriter

from ltx_titan.common.files import atomic_write
from ltx_titan.common.tensors import evenly_spaced
from ltx_titan.media import encode_wav
from ltx_titan.validation.decode import DecodedSample

# 320 pixels and 32 frames keep a GIF below a few MB, which TensorBoard loads without delay.
_SIDE = 320
_GIF_FRAMES = 32
_SHEET_FRAMES, _SHEET_COLUMNS = 8, 4
# PIL's default font is 6 pixels wide and 11 high.
_CHARACTER_WIDTH, _LINE_HEIGHT, _LINE_LENGTH = 6, 14, 120
_TITLE_LENGTH = 100


@dataclass(frozen=True)
class Preview:
    """One clip as encoded files; None for a part that it does not have.

    Attributes:
        moving: animated GIF.
        frames: PNG of a grid of frames, in order of time.
        audio: WAV file.
    """

    moving: bytes | None = None
    frames: bytes | None = None
    audio: bytes | None = None


def make_preview(decoded: DecodedSample, fps: float) -> Preview:
    """Encodes a preview of at most 320 pixels per side and 32 GIF frames; the audio is complete."""
    fields: dict[str, bytes] = {}
    if decoded.frames is not None:
        frames = [_small(Image.fromarray(frame)) for frame in decoded.frames.numpy()]
        fields["frames"] = _encoded(
            _grid([frames[index] for index in evenly_spaced(len(frames), _SHEET_FRAMES)]), "PNG"
        )
        if len(frames) > 1:
            moving = [frames[index] for index in evenly_spaced(len(frames), _GIF_FRAMES)]
            # Fewer frames than the clip, each shown longer: the GIF lasts as long as the clip.
            duration_ms = round(1000 * len(frames) / fps / len(moving))
            fields["moving"] = _encoded(
                moving[0], "GIF", save_all=True, append_images=moving[1:], duration=duration_ms, loop=0
            )
    if decoded.audio is not None:
        buffer = io.BytesIO()
        encode_wav(buffer, decoded.audio)
        fields["audio"] = buffer.getvalue()
    return Preview(**fields)


def write_preview(writer: SummaryWriter, tag: str, prompt: str, preview: Preview, step: int) -> None:
    """Writes a preview to TensorBoard as `<tag>/video`, `/frames`, `/audio`, and its prompt as `/prompt`.

    The title of a card is the beginning of the prompt.
    """
    title = textwrap.shorten(prompt, _TITLE_LENGTH, placeholder=" ...")
    values = []
    for name, encoded in (("video", preview.moving), ("frames", preview.frames)):
        if encoded is not None:
            # TensorBoard's image plugin stores width, height and the encoded image as strings.
            size = [str(side).encode() for side in Image.open(io.BytesIO(encoded)).size]
            about = image_metadata.create_summary_metadata(title, prompt)
            values.append(Summary.Value(tag=f"{tag}/{name}", tensor=_strings([*size, encoded], 3), metadata=about))
    if preview.audio is not None:
        about = audio_metadata.create_summary_metadata(title, prompt, audio_metadata.Encoding.Value("WAV"))
        # A batch of one pair: the encoded audio and its label, which is empty.
        audio = _strings([preview.audio, b""], 1, 2)
        values.append(Summary.Value(tag=f"{tag}/audio", tensor=audio, metadata=about))
    # SummaryWriter's own methods encode again: GIFs need moviepy, audio becomes mono, and cards get no titles.
    writer._get_file_writer().add_summary(Summary(value=values), step)
    # In full, since titles are shortened.
    writer.add_text(f"{tag}/prompt", prompt, step)


@contextmanager
def wandb_media(clips: Iterable[tuple[str, str, Path, Preview]]) -> Iterator[dict[str, Any]]:
    """Converts clips to W&B media with their prompts as captions: `<tag>/video`, `/frames`, `/audio`.

    Args:
        clips: tag, prompt, file and preview of each clip. If the file is on another machine, its GIF is used.

    Yields:
        Values for a run's `log`, which copies the temporary files that are removed on exit.
    """
    import wandb

    media: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tag, prompt, path, preview in clips:
            # On several nodes another node may have written the clip.
            if preview.moving is not None and path.exists():
                media[f"{tag}/video"] = wandb.Video(str(path), caption=prompt, format="mp4")
            elif preview.moving is not None:
                media[f"{tag}/video"] = wandb.Video(io.BytesIO(preview.moving), caption=prompt, format="gif")
            if preview.frames is not None:
                media[f"{tag}/frames"] = wandb.Image(Image.open(io.BytesIO(preview.frames)), caption=prompt)
            if preview.audio is not None:
                audio = Path(folder) / f"{tag}.wav"
                # A file, because `wandb.Audio` takes a path and no bytes.
                audio.write_bytes(preview.audio)
                media[f"{tag}/audio"] = wandb.Audio(str(audio), caption=prompt)
        yield media


def write_contact_sheet(path: str | Path, rows: Sequence[tuple[str, Preview]]) -> Path | None:
    """Writes the frames of several clips below each other, each under its prompt, as one PNG.

    Args:
        path: output file.
        rows: prompt and preview of each clip.

    Returns:
        The path, or None if no clip has frames.
    """
    shown = [(prompt, Image.open(io.BytesIO(preview.frames))) for prompt, preview in rows if preview.frames is not None]
    if not shown:
        return None
    texts = [textwrap.wrap(prompt, _LINE_LENGTH) or [""] for prompt, _ in shown]
    width = max(_LINE_LENGTH * _CHARACTER_WIDTH, *(frames.width for _, frames in shown))
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
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _small(image: Image.Image) -> Image.Image:
    image.thumbnail((_SIDE, _SIDE))
    return image


def _grid(frames: list[Image.Image]) -> Image.Image:
    width, height = frames[0].size
    columns = min(len(frames), _SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * columns, height * -(-len(frames) // columns)))
    for index, frame in enumerate(frames):
        sheet.paste(frame, (index % columns * width, index // columns * height))
    return sheet


def _strings(values: list[bytes], *shape: int) -> TensorProto:
    dims = [TensorShapeProto.Dim(size=size) for size in shape]
    return TensorProto(dtype=DT_STRING, string_val=values, tensor_shape=TensorShapeProto(dim=dims))


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
