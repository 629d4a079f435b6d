"""Contact sheet: one image of many clips, each with frames in order of time, its waveform and a summary."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ltx_titan.common.files import atomic_write, printable
from ltx_titan.media import Audio

_CELL_WIDTH = 960
_STRIP_HEIGHT = 132
_AUDIO_HEIGHT = 34
_GAP = 3
_MARGIN = 18
_LINE = 17
_HEADER_LINE = 22
_MAX_CAPTION_LINES = 4

_BACKGROUND = (250, 250, 248)
_TEXT, _FAINT, _WARNING = (28, 28, 30), (118, 118, 124), (190, 40, 30)
_WAVE, _SILENT = (52, 102, 168), (232, 234, 238)


@dataclass(frozen=True)
class Entry:
    """One clip on a sheet.

    Attributes:
        title: name of the clip.
        facts: summary in one line.
        frames: frames in order of time, all of one size; empty for audio.
        audio: audio that is drawn as a waveform, or an image of it; None without audio.
        caption: its caption, shortened to a few lines.
        warning: problem with the clip.
    """

    title: str
    facts: str
    frames: Sequence[Image.Image] = ()
    audio: Audio | Image.Image | None = None
    caption: str | None = None
    warning: str | None = None


def write_sheet(path: Path, header: Sequence[str], entries: Sequence[Entry], columns: int = 2) -> None:
    """Draws a sheet as PNG, atomically.

    Args:
        path: the file; its folder is created.
        header: lines above the clips, the first one large.
        entries: the clips.
        columns: number of columns.
    """
    columns = max(1, min(columns, len(entries)))
    cells = [_cell(entry) for entry in entries]
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) for row in rows]
    top = _MARGIN + _HEADER_LINE * len(header) + 24
    width = _MARGIN + columns * (_CELL_WIDTH + _MARGIN)
    sheet = Image.new("RGB", (width, top + sum(heights) + _MARGIN * (len(rows) + 1)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(map(printable, header)):
        position = (_MARGIN, _MARGIN + _HEADER_LINE * number + (6 if number else 0))
        draw.text(position, line, fill=_FAINT if number else _TEXT, font=_font(13 if number else 18, bold=not number))
    draw.line([(_MARGIN, top - 8), (width - _MARGIN, top - 8)], fill=(210, 210, 210))
    y = top + 6
    for row, height in zip(rows, heights, strict=True):
        for number, cell in enumerate(row):
            sheet.paste(cell, (_MARGIN + number * (_CELL_WIDTH + _MARGIN), y))
        y += height + _MARGIN
    with atomic_write(path) as temporary:
        sheet.save(temporary, format="PNG")


def _cell(entry: Entry) -> Image.Image:
    text = (entry.caption or "").encode("utf-8", "backslashreplace").decode()
    caption = textwrap.wrap(" ".join(text.split()), 138)
    if len(caption) > _MAX_CAPTION_LINES:
        caption = [*caption[: _MAX_CAPTION_LINES - 1], caption[_MAX_CAPTION_LINES - 1][:134] + " ..."]
    strip = _strip(entry.frames)
    wave = _audio(entry.audio, strip.width if strip is not None else _CELL_WIDTH)
    height = _LINE * (1 + len(caption) + bool(entry.warning)) + 5
    height += sum(part.height + _GAP for part in (strip, wave) if part is not None)
    cell = Image.new("RGB", (_CELL_WIDTH, height), _BACKGROUND)
    draw = ImageDraw.Draw(cell)
    # A line break in a name cannot be measured.
    title = printable(entry.title)
    title = title if len(title) <= 60 else "..." + title[-57:]
    draw.text((0, 0), title, fill=_TEXT, font=_font(13, bold=True))
    draw.text((draw.textlength(title + "   ", font=_font(13, bold=True)), 1), entry.facts, fill=_FAINT, font=_font(12))
    y = _LINE + 3
    for part in (strip, wave):
        if part is not None:
            cell.paste(part, (0, y))
            y += part.height + _GAP
    if entry.warning:
        draw.text((0, y), textwrap.shorten(printable(entry.warning), 140), fill=_WARNING, font=_font(12))
        y += _LINE
    for line in caption:
        draw.text((0, y), line, fill=_TEXT, font=_font(12))
        y += _LINE
    return cell


def _strip(frames: Sequence[Image.Image]) -> Image.Image | None:
    """Frames in a row, as large as the width and height of a cell allow."""
    if not frames:
        return None
    width, height = frames[0].size
    room = (_CELL_WIDTH - _GAP * (len(frames) - 1)) // len(frames)
    scale = min(_STRIP_HEIGHT / height, room / width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    strip = Image.new("RGB", ((size[0] + _GAP) * len(frames) - _GAP, size[1]), _BACKGROUND)
    for number, frame in enumerate(frames):
        strip.paste(frame.resize(size, Image.Resampling.LANCZOS), (number * (size[0] + _GAP), 0))
    return strip


def _audio(audio: Audio | Image.Image | None, width: int) -> Image.Image | None:
    if isinstance(audio, Audio):
        return _waveform(audio, width)
    return None if audio is None else audio.convert("RGB").resize((width, _AUDIO_HEIGHT * 2), Image.Resampling.BILINEAR)


def _waveform(audio: Audio, width: int) -> Image.Image:
    """Peak level of each column of pixels, in decibels so that quiet audio is visible."""
    image = Image.new("RGB", (width, _AUDIO_HEIGHT), _SILENT)
    draw = ImageDraw.Draw(image)
    mono = audio.waveform.float().abs().amax(0)
    if mono.numel():
        # To a multiple of the width: every column then has equally many samples.
        padded = torch.nn.functional.pad(mono, (0, -mono.numel() % width))
        peaks = padded.view(width, -1).amax(1).clamp(min=1e-5)
        # -60 dB and below is an empty column.
        loudness = (1 + 20 * peaks.log10() / 60).clamp(0, 1).numpy()
        middle = _AUDIO_HEIGHT / 2
        for x, level in enumerate(np.asarray(loudness)):
            reach = level * (middle - 1)
            draw.line([(x, middle - reach), (x, middle + reach)], fill=_WAVE)
    return image


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    # The font of matplotlib covers many scripts; that of Pillow has Latin letters only.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", name)), size)
