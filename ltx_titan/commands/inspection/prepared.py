"""Prepared data: shape, frame rate, duration and text of each sample, and its missing or damaged files."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltx_titan.commands.inspection.sheet import Entry
from ltx_titan.commands.stored import StoredSample, stored_samples
from ltx_titan.common.tensors import evenly_spaced
from ltx_titan.data.layout import Fields, latents_of
from ltx_titan.validation.decode import Decoders, decode_sample
from ltx_titan.validation.sampling import SampledLatents

_SHEET_FRAMES = 6


@dataclass
class InspectedSample:
    """One sample, merged from its files in all source folders.

    Attributes:
        name: path below the source folders.
        shapes: shape of the latents by source folder.
        fps: frame rate of the video latents; 0 without video.
        duration_s: seconds of video, or of audio without video.
        has_audio: whether its audio latents are real and not a placeholder for missing audio.
        text_tokens: tokens of the prompt; 0 if contexts after the connectors are stored.
        is_text_full: whether the prompt fills its whole length, so that it was probably truncated.
        problems: (source folder, reason) of unusable files.
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
        """Size of the video in pixels and frames."""
        shape = self.shapes.get("latents")
        if shape is None:
            return "audio"
        _, frames, height, width = shape
        return f"{width * 32}x{height * 32}x{(frames - 1) * 8 + 1}"

    @property
    def video_tokens(self) -> int:
        """Tokens of all video latents, references included."""
        return sum(shape[1] * shape[2] * shape[3] for shape in self.shapes.values() if len(shape) == 4)

    @property
    def audio_tokens(self) -> int:
        """Tokens of all audio latents, references included."""
        return sum(shape[1] for shape in self.shapes.values() if len(shape) == 3)

    @property
    def facts(self) -> str:
        """Summary in one line."""
        parts = [self.bucket]
        if self.fps:
            parts.append(f"{self.fps:.6g} fps")
        parts.append(f"{self.duration_s:.2f} s")
        parts.append("audio" if self.has_audio else "no audio")
        parts.append(f"{self.video_tokens} + {self.audio_tokens} tokens")
        if self.text_tokens:
            parts.append(f"text {self.text_tokens}")
        return "   ".join(parts)


Folders = Mapping[str, Mapping[str, StoredSample]]
"""Source folder -> path of a sample below it -> its location."""


def find_samples(root: Path) -> Folders:
    """All samples below a data root; folders without samples are skipped."""
    found = {entry.name: stored_samples(entry) for entry in sorted(root.iterdir()) if entry.is_dir()}
    return {folder: samples for folder, samples in found.items() if samples}


def read_samples(
    folders: Folders, names: Sequence[str], num_workers: int, on_sample: Callable[[], None]
) -> list[InspectedSample]:
    """Reads samples from all source folders and validates all values: a NaN is found here or in training.

    Args:
        folders: the data.
        names: samples to read.
        num_workers: samples in parallel.
        on_sample: called after each sample.
    """

    def read(name: str) -> InspectedSample:
        sample = InspectedSample(name)
        for folder, samples in folders.items():
            stored = samples.get(name)
            try:
                if stored is not None:
                    _merge(sample, folder, stored.read())
                else:
                    sample.problems.append((folder, "is missing"))
            except ValueError as error:
                sample.problems.append((folder, str(error).removeprefix(f"{stored}: ")))
        on_sample()
        return sample

    # Threads suffice: reading files and checking tensors release the interpreter lock.
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(read, names))


def warnings_of(samples: Sequence[InspectedSample]) -> dict[str, list[str]]:
    """Probable mistakes, with the samples that they concern."""
    good = [sample for sample in samples if not sample.problems]
    is_mixed = any(sample.has_audio for sample in good)
    found: dict[str, list[str]] = defaultdict(list)
    for sample in good:
        notes = {
            "prompts that fill all tokens (probably truncated)": bool(sample.text_tokens) and sample.is_text_full,
            # One token is the BOS alone.
            "empty prompts": sample.text_tokens == 1,
            "samples without audio among others with audio": is_mixed and not sample.has_audio,
        }
        for note, applies in notes.items():
            if applies:
                found[note].append(sample.name)
    return found


def statistics_of(
    folders: Folders, folder: str, samples: Sequence[InspectedSample], limit: int = 64
) -> tuple[float, float] | None:
    """Mean and standard deviation of the latents of at most `limit` samples; None for a folder without latents.

    They are about 0 and 1 if the right VAE encoded them.
    """
    real = [sample for sample in samples if folder != "audio_latents" or sample.has_audio]
    names = [sample.name for sample in real if folder in sample.shapes]
    if not names:
        return None
    # Spread over the dataset, whose order often follows its sources.
    chosen = names[:: max(1, len(names) // limit)]
    values = torch.cat([latents_of(folders[folder][name].read()).float().flatten() for name in chosen])
    return float(values.mean()), float(values.std())


def sheet_entry(sample: InspectedSample, folders: Folders, decoders: Decoders | None) -> Entry:
    """A sample on a contact sheet: decoded, or its latents in false colors without decoders."""
    if sample.problems:
        folder, reason = sample.problems[0]
        return Entry(sample.name, sample.facts, warning=f"{folder}: {reason}")
    video = _latents(folders, "latents", sample)
    audio = _latents(folders, "audio_latents", sample) if sample.has_audio else None
    if decoders is None:
        frames = [] if video is None else false_colors(video)
        return Entry(sample.name, sample.facts, frames, None if audio is None else _spectrum(audio))
    latents = SampledLatents(
        # The first frames are enough to recognize a clip, and fast to decode.
        None if video is None else video[None, :, :4],
        None if audio is None or decoders.audio is None else audio[None],
    )
    decoded = decode_sample(latents, decoders)
    frames = []
    if decoded.frames is not None:
        indices = evenly_spaced(len(decoded.frames), _SHEET_FRAMES)
        frames = [Image.fromarray(decoded.frames[index].numpy()) for index in indices]
    return Entry(sample.name, sample.facts, frames, decoded.audio)


def false_colors(latents: Tensor) -> list[Image.Image]:
    """Images of latents [C, F, H, W]: their three main components over the whole clip as red, green and blue."""
    channels, frames, height, width = latents.shape
    values = latents.float().permute(1, 2, 3, 0).reshape(-1, channels)
    values = values - values.mean(0)
    count = min(3, *values.shape)
    # One basis for the whole clip, so that a color means the same in each frame.
    _, _, axes = torch.pca_lowrank(values, q=count, center=False, niter=2)
    colors = torch.zeros(values.shape[0], 3)
    colors[:, :count] = values @ axes[:, :count]
    # Quantiles: a few outliers would otherwise darken everything else.
    low, high = colors.quantile(0.02, dim=0), colors.quantile(0.98, dim=0)
    scaled = ((colors - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    images = (scaled * 255).to(torch.uint8).reshape(frames, height, width, 3).numpy()
    factor = max(1, 256 // max(height, width))
    size = (width * factor, height * factor)
    return [
        Image.fromarray(images[index]).resize(size, Image.Resampling.NEAREST)
        for index in evenly_spaced(frames, _SHEET_FRAMES)
    ]


def as_record(sample: InspectedSample) -> Mapping[str, Any]:
    """The sample as JSON."""
    return {
        **vars(sample),
        "bucket": sample.bucket,
        "video_tokens": sample.video_tokens,
        "audio_tokens": sample.audio_tokens,
    }


def _merge(sample: InspectedSample, folder: str, fields: Fields) -> None:
    latents = fields.get("latents")
    if isinstance(latents, Tensor):
        sample.shapes[folder] = tuple(latents.shape)
    if folder == "latents":
        sample.fps = float(fields["fps"])
        sample.duration_s = ((int(fields["num_frames"]) - 1) * 8 + 1) / sample.fps
    elif folder == "audio_latents":
        sample.has_audio = bool(fields.get("present", True))
        # Video decides if there is one; audio is cut to it.
        sample.duration_s = sample.duration_s or float(fields["duration"])
    elif folder == "conditions" and isinstance(mask := fields.get("prompt_attention_mask"), Tensor):
        sample.text_tokens = int(mask.sum())
        sample.is_text_full = sample.text_tokens == mask.numel()


def _latents(folders: Folders, folder: str, sample: InspectedSample) -> Tensor | None:
    return latents_of(folders[folder][sample.name].read()) if folder in sample.shapes else None


def _spectrum(latents: Tensor) -> Image.Image:
    """Audio latents [8, T, 16] as an image: time to the right, channels and frequencies downwards."""
    values = latents.float().permute(0, 2, 1).flatten(0, 1)
    # Latents are normalized, so nearly all are within 2.5 standard deviations.
    scaled = ((values.clamp(-2.5, 2.5) + 2.5) / 5 * 255).to(torch.uint8)
    return Image.fromarray(scaled.numpy())
