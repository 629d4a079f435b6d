"""Several prepared datasets as one: `[[data.sources]]`.

The samples of a source keep the order of its dataset, and their indices follow those of the source before. How often a
source is drawn is part of the batch plan (`Mixture`). A source without one of the job's streams gets a placeholder for
it: one latent cell that is marked as absent, so that the stream has no loss and the other one does not attend to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from ltx_titan.data.bad_samples import SkippingDataset
from ltx_titan.data.dataset import PrecomputedDataset, Sample, ShapeKey, fingerprint_of, shape_key_of
from ltx_titan.data.layout import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    AUDIO_STEPS_PER_SECOND,
    DEFAULT_FPS,
    VIDEO_CHANNELS,
    Fields,
)
from ltx_titan.data.plan import Mixture


@dataclass(frozen=True)
class Source:
    """One dataset of several.

    Attributes:
        name: of the source in logs and messages.
        dataset: its samples.
        weight: its share of the samples that are drawn, relative to those of the others; None uses `repeats`.
        repeats: number of times that an epoch has each of its samples.
        group: sources of one group have the same conditions, so that their samples can share a forward.
        absent: streams of the job that it lacks, "video" or "audio".
    """

    name: str
    dataset: PrecomputedDataset | SkippingDataset
    weight: float | None = None
    repeats: int = 1
    group: int = 0
    absent: tuple[str, ...] = ()


class MixedDataset:
    """The samples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Combines sources; either all of them have a weight or none.

        Raises:
            ValueError: an epoch has no sample of a source.
        """
        self.sources = tuple(sources)
        sizes = [len(source.dataset) for source in self.sources]
        self._starts = [sum(sizes[:number]) for number in range(len(sizes))]
        self._placeholders = [
            {f"{stream}_latents": _placeholder(stream) for stream in source.absent} for source in self.sources
        ]
        self.mixture = Mixture(tuple(sizes), tuple(_epoch_draws(self.sources, sizes)))
        for source, draws in zip(self.sources, self.mixture.draws, strict=True):
            if draws < 1:
                raise ValueError(
                    f"data.sources: {source.name} has weight {source.weight}: expected at least one of its samples in "
                    f"an epoch of {sum(sizes)}, found {float(draws):.2g}; raise its weight, or use repeats."
                )
        # With all that the order of samples depends on, so that a resumed job says when it is another one.
        self.fingerprint = fingerprint_of(
            f"{source.dataset.fingerprint}\0{draws}\0{source.group}\0{source.absent}"
            for source, draws in zip(self.sources, self.mixture.draws, strict=True)
        )

    def __len__(self) -> int:
        return sum(self.mixture.sizes)

    @property
    def parts(self) -> list[range]:
        """Indices of the samples of each source."""
        return [range(start, start + size) for start, size in zip(self._starts, self.mixture.sizes, strict=True)]

    def name(self, index: int) -> str:
        """Source and relative path of a sample, for messages."""
        number, own = self._find(index)
        return f"{self.sources[number].name}: {self.sources[number].dataset.name(own)}"

    def shape_key(self, index: int) -> ShapeKey:
        """Shapes of a sample, placeholders included."""
        number, own = self._find(index)
        return self.sources[number].dataset.shape_key(own) + shape_key_of(self._placeholders[number])

    def source_of(self, index: int) -> Source:
        """The source of a sample."""
        return self.sources[self._find(index)[0]]

    def load(self, index: int) -> Sample:
        """Reads one sample, with placeholders for the streams that its source lacks.

        Raises:
            ValueError: a file is broken; with its name.
        """
        number, own = self._find(index)
        return self.sources[number].dataset.load(own) | self._placeholders[number]

    def peek(self, index: int) -> Sample:
        """Reads those sources of a sample whose values decide whether it can be trained on.

        Raises:
            ValueError: a file is broken; with its name.
        """
        number, own = self._find(index)
        return self.sources[number].dataset.peek(own) | self._placeholders[number]

    def _find(self, index: int) -> tuple[int, int]:
        """Number of a sample's source, and its index there."""
        number = self.mixture.source_of(index)
        return number, index - self._starts[number]


def _epoch_draws(sources: Sequence[Source], sizes: Sequence[int]) -> list[Fraction]:
    """Samples of each source in an epoch: all of them `repeats` times, or its share of as many as there are."""
    if all(source.weight is None for source in sources):
        return [Fraction(size * source.repeats) for source, size in zip(sources, sizes, strict=True)]
    # As it was written: 0.1 is a tenth.
    weights = [Fraction(str(source.weight)) for source in sources]
    return [sum(sizes) * weight / sum(weights) for weight in weights]


def _placeholder(stream: str) -> Fields:
    if stream == "audio":
        return {
            "latents": torch.zeros(AUDIO_CHANNELS, 1, AUDIO_BINS),
            "num_time_steps": 1,
            "frequency_bins": AUDIO_BINS,
            "duration": 1 / AUDIO_STEPS_PER_SECOND,
            "present": False,
        }
    sizes = {"num_frames": 1, "height": 1, "width": 1}
    latents = torch.zeros(VIDEO_CHANNELS, 1, 1, 1, dtype=torch.bfloat16)
    return {"latents": latents, **sizes, "fps": DEFAULT_FPS, "present": False}
