"""What prepared data is: samples and their shapes, rates, lengths and text, what is missing, and what is broken."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltx_titan.commands.inspection.sheet import Entry
from ltx_titan.commands.stored import Stored, stored_samples
from ltx_titan.data.layout import Fields
from ltx_titan.validation.decode import Decoders, decode_sample
from ltx_titan.validation.sampling import SampledLatents

_SHEET_FRAMES = 6


@dataclass
class PreparedSample:
    """One sample: what its files in all source folders say.

    Attributes:
        name: path below the source folders.
        shapes: shape of the latents by source folder.
        fps: of the video latents; 0 without.
        duration_s: seconds of video, or of audio where there is none.
        has_audio: whether there are audio latents that are no stand-in.
        text_tokens: tokens of the prompt, 0 where finished contexts are stored.
        is_text_full: whether the prompt fills its whole length, so that its end was likely cut off.
        problems: (source folder, why) of files that cannot be used.
    """

    name: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    fps: float = 0.0
    duration_s: float = 0.0
    has_audio: bool = False
    text_tokens: int = 0
    is_text_full: bool = False
    problems: list[tuple[str, str]] = field(default_factory=list)

    @property
    def bucket(self) -> str:
        """Size in pixels and frames that the video latents stand for."""
        shape = self.shapes.get("latents")
        if shape is None:
            return "audio"
        _, frames, height, width = shape
        return f"{width * 32}x{height * 32}x{(frames - 1) * 8 + 1}"

    @property
    def video_tokens(self) -> int:
        """Tokens of all its video latents, references included."""
        return sum(shape[1] * shape[2] * shape[3] for shape in self.shapes.values() if len(shape) == 4)

    @property
    def audio_tokens(self) -> int:
        """Tokens of all its audio latents, references included."""
        return sum(shape[1] for shape in self.shapes.values() if len(shape) == 3)

    @property
    def facts(self) -> str:
        """In one line."""
        parts = [self.bucket]
        if self.fps:
            parts.append(f"{self.fps:.6g} fps")
        parts.append(f"{self.duration_s:.2f} s")
        parts.append("audio" if self.has_audio else "no audio")
        parts.append(f"{self.video_tokens} + {self.audio_tokens} tokens")
        if self.text_tokens:
            parts.append(f"text {self.text_tokens}")
        return "   ".join(parts)


Folders = Mapping[str, Mapping[str, Stored]]
"""Source folder -> path of the sample below it -> where it lies."""


def find_samples(root: Path) -> Folders:
    """All samples of a data root; folders without any are left out."""
    found = {entry.name: stored_samples(entry) for entry in sorted(root.iterdir()) if entry.is_dir()}
    return {folder: samples for folder, samples in found.items() if samples}


def read_samples(
    folders: Folders, names: Sequence[str], num_workers: int, on_sample: Callable[[], None]
) -> list[PreparedSample]:
    """Read samples from all source folders, with all of their values: a NaN is found here or in training.

    Args:
        folders: the data.
        names: samples to read.
        num_workers: samples at once.
        on_sample: called after each.
    """

    def read(name: str) -> PreparedSample:
        sample = PreparedSample(name)
        for folder, samples in folders.items():
            stored = samples.get(name)
            try:
                if stored is not None:
                    _take(sample, folder, stored.read())
                else:
                    sample.problems.append((folder, "is missing"))
            except ValueError as error:
                sample.problems.append((folder, str(error).removeprefix(f"{stored}: ")))
        on_sample()
        return sample

    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(read, names))


def warnings_of(samples: Sequence[PreparedSample]) -> dict[str, int]:
    """What is likely not meant, with how many samples it concerns."""
    good = [sample for sample in samples if not sample.problems]
    texts = [sample for sample in good if sample.text_tokens]
    counts = {
        "prompts that fill all tokens (their end was likely cut off)": sum(sample.is_text_full for sample in texts),
        "empty prompts": sum(sample.text_tokens <= 1 for sample in texts),
    }
    without = sum(not sample.has_audio for sample in good)
    if 0 < without < len(good):
        counts["samples without audio beside others with it"] = without
    return {text: count for text, count in counts.items() if count}


def statistics_of(
    folders: Folders, folder: str, samples: Sequence[PreparedSample], limit: int = 64
) -> tuple[float, float] | None:
    """Mean and standard deviation of some samples' latents; None for a folder without.

    They are about 0 and 1 where the right VAE made them.
    """
    heard = [sample for sample in samples if folder != "audio_latents" or sample.has_audio]
    names = [sample.name for sample in heard if folder in sample.shapes]
    if not names:
        return None
    chosen = names[:: max(1, len(names) // limit)]
    values = torch.cat([folders[folder][name].read()["latents"].float().flatten() for name in chosen])
    return float(values.mean()), float(values.std())


def sheet_entry(sample: PreparedSample, folders: Folders, decoders: Decoders | None) -> Entry:
    """A sample on a contact sheet: decoded, or without decoders its latents in false colours."""
    if sample.problems:
        folder, reason = sample.problems[0]
        return Entry(sample.name, sample.facts, warning=f"{folder}: {reason}")
    video = _latents(folders, "latents", sample)
    audio = _latents(folders, "audio_latents", sample) if sample.has_audio else None
    if decoders is None:
        frames = [] if video is None else false_colours(video)
        return Entry(sample.name, sample.facts, frames, None if audio is None else _spectrum(audio))
    latents = SampledLatents(
        None if video is None else _first(video)[None],
        None if audio is None or decoders.audio is None else audio[None],
    )
    decoded = decode_sample(latents, decoders)
    frames = (
        []
        if decoded.frames is None
        else [Image.fromarray(decoded.frames[i].numpy()) for i in _spread(len(decoded.frames))]
    )
    return Entry(sample.name, sample.facts, frames, decoded.audio)


def false_colours(latents: Tensor) -> list[Image.Image]:
    """Pictures of latents [C, F, H, W]: their three main components as red, green and blue, over the whole clip."""
    channels, frames, height, width = latents.shape
    values = latents.float().permute(1, 2, 3, 0).reshape(-1, channels)
    values = values - values.mean(0)
    count = min(3, *values.shape)
    _, _, axes = torch.pca_lowrank(values, q=count, center=False, niter=2)
    colours = torch.zeros(values.shape[0], 3)
    colours[:, :count] = values @ axes[:, :count]
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    scaled = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    pictures = (scaled * 255).to(torch.uint8).reshape(frames, height, width, 3).numpy()
    factor = max(1, 256 // max(height, width))
    size = (width * factor, height * factor)
    return [Image.fromarray(pictures[i]).resize(size, Image.Resampling.NEAREST) for i in _spread(frames)]


def as_record(sample: PreparedSample) -> Mapping[str, Any]:
    """A sample for a JSON file."""
    return {
        **vars(sample),
        "bucket": sample.bucket,
        "video_tokens": sample.video_tokens,
        "audio_tokens": sample.audio_tokens,
    }


def _take(sample: PreparedSample, folder: str, fields: Fields) -> None:
    latents = fields.get("latents")
    if isinstance(latents, Tensor):
        sample.shapes[folder] = tuple(latents.shape)
    if folder == "latents":
        sample.fps = float(fields["fps"])
        sample.duration_s = ((int(fields["num_frames"]) - 1) * 8 + 1) / sample.fps
    elif folder == "audio_latents":
        sample.has_audio = bool(fields.get("present", True))
        sample.duration_s = sample.duration_s or float(fields["duration"])
    elif folder == "conditions" and isinstance(mask := fields.get("prompt_attention_mask"), Tensor):
        sample.text_tokens = int(mask.sum())
        sample.is_text_full = sample.text_tokens == mask.numel()


def _latents(folders: Folders, folder: str, sample: PreparedSample) -> Tensor | None:
    return folders[folder][sample.name].read()["latents"] if folder in sample.shapes else None


def _first(latents: Tensor, frames: int = 4) -> Tensor:
    """The first frames: enough to see what a clip is, and quick to decode."""
    return latents[:, :frames]


def _spread(count: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, _SHEET_FRAMES)).round().int().tolist()


def _spectrum(latents: Tensor) -> Image.Image:
    """Audio latents [8, T, 16] as a picture: time to the right, channels and frequencies downwards."""
    values = latents.float().permute(0, 2, 1).flatten(0, 1)
    scaled = ((values.clamp(-2.5, 2.5) + 2.5) / 5 * 255).to(torch.uint8)
    return Image.fromarray(scaled.numpy())
