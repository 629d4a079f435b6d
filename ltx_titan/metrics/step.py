"""Figures of training steps: sums that stay on the device, and the record that is logged.

A step must not wait for the device, so losses are added up there (`Sums`) and read once per log line, by then reduced
over ranks into a `StepMetrics`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_GIB = 1024**3
# Lower ends of the sigma ranges that losses are also reported for.
_SIGMA_BUCKETS = (0.0, 0.25, 0.5, 0.75)
_STREAMS = ("video", "audio")


@dataclass(frozen=True)
class StepMetrics:
    """Figures of one optimizer step, reduced over ranks and micro-batches.

    Attributes:
        step: counted from 1.
        loss: what is differentiated: the mean over all samples of the global batch, in which a stream that a sample
            lacks counts as 0; None if no sample had a token to generate.
        loss_video: mean over the samples with video to generate; None without such a sample.
        loss_audio: the same for audio.
        grad_norm: before clipping.
        lr: learning rate of the step.
        step_time_s: mean over the steps since the last logged one, in seconds.
        tokens_per_s: over all ranks.
        tflops_per_gpu: model TFLOP/s, see `model.flops`.
        mfu: model FLOPs utilization, 0 to 1.
        peak_mem_gib: largest over ranks.
        extra: further scalars by TensorBoard tag, such as "loss/video_sigma_0.25-0.50"; in the JSON line under these
            names.
    """

    step: int
    loss: float | None = None
    loss_video: float | None = None
    loss_audio: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    tflops_per_gpu: float | None = None
    mfu: float | None = None
    peak_mem_gib: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


class StreamLosses(Protocol):
    """Losses of each sample [B] by stream; None for a stream that is not trained. `conditioning.Loss` is one."""

    @property
    def video(self) -> Tensor | None:
        """Of the video stream."""

    @property
    def audio(self) -> Tensor | None:
        """Of the audio stream."""


class Stream(Protocol):
    """A stream's input to the transformer; `model.Modality` is one."""

    @property
    def sigma(self) -> Tensor:
        """Of each sample, [B]."""


class StreamInputs(Protocol):
    """Both streams' inputs; `conditioning.ModelInputs` is one."""

    @property
    def video(self) -> Stream | None:
        """Of the video stream."""

    @property
    def audio(self) -> Stream | None:
        """Of the audio stream."""

    @property
    def video_loss_mask(self) -> Tensor | None:
        """True for a token with loss [B, S]; None if the stream is not trained."""

    @property
    def audio_loss_mask(self) -> Tensor | None:
        """The same for audio."""


@dataclass(frozen=True)
class Means:
    """Losses since the last log line, over all ranks, micro-batches and steps.

    Attributes:
        loss: mean of the training loss; None if no sample had a token to generate.
        video: mean over the samples with video to generate; None without such a sample.
        audio: the same for audio.
        by_sigma: mean of each stream and sigma range that had samples, by TensorBoard tag.
        parts: mean over samples of each further part of the loss, and of each source's loss, without their weights, by
            TensorBoard tag.
        tflop: work in units of 1e12.
        tokens: video and audio tokens.
        idle_steps: steps in which no sample had a token to generate, so that nothing was learned.
        is_finite: whether the sum of the losses is.
    """

    loss: float | None
    video: float | None
    audio: float | None
    by_sigma: dict[str, float]
    parts: dict[str, float]
    tflop: float
    tokens: float
    idle_steps: int
    is_finite: bool


class Mark(NamedTuple):
    """Losses of `Sums` at some moment."""

    loss: Tensor
    buckets: Tensor
    parts: Tensor
    by_source: Tensor


class Sums:
    """Sums over the micro-batches and steps since the last log line; tensors stay on the device.

    Args:
        device: of the tensors.
        parts: names of further parts of the loss, which belong to no stream.
        sources: names of the sources of samples.
    """

    def __init__(self, device: torch.device, parts: Sequence[str] = (), sources: Sequence[str] = ()) -> None:
        self.loss = torch.zeros((), device=device)
        """Training loss: mean over the global batch, added over steps."""
        self.buckets = torch.zeros(len(_STREAMS), 2, len(_SIGMA_BUCKETS), device=device)
        """Per stream and sigma range: sum of the losses of the samples that have the stream, and their number."""
        self.names = tuple(parts)
        self.parts = torch.zeros(len(parts), device=device)
        """Sums of these parts over samples, divided by the size of the global batch, added over steps."""
        self.sources = tuple(sources)
        self.by_source = torch.zeros(2, len(sources), device=device)
        """Per source: sum of the losses of its samples, and number of those with a token to generate."""
        self.trained: list[Tensor] = []
        """Per step: number of samples with a token to generate."""
        self.edges = torch.tensor(_SIGMA_BUCKETS[1:], device=device)
        self.flops = 0.0
        self.tokens = 0
        self.taken = 0
        """Steps begun since the last log line, skipped ones included."""

    @property
    def steps(self) -> int:
        """Steps whose losses are in the sums."""
        return len(self.trained)

    def begin_step(self) -> Mark:
        """Starts a step, whose micro-batches are then added; returns the sums before it."""
        mark = Mark(self.loss.clone(), self.buckets.clone(), self.parts.clone(), self.by_source.clone())
        self.trained.append(torch.zeros((), device=self.loss.device))
        self.taken += 1
        return mark

    def loss_since(self, mark: Mark) -> Tensor:
        """This rank's share of the loss since a mark, a scalar."""
        return self.loss - mark.loss

    def undo(self, mark: Mark) -> None:
        """Takes back the losses of the last step, but not its work."""
        self.loss, self.buckets, self.parts, self.by_source = mark
        self.trained.pop()

    @torch.no_grad()
    def add(self, total: Tensor, loss: StreamLosses, inputs: StreamInputs, share: float) -> None:
        """Adds one micro-batch.

        Args:
            total: weighted loss of each sample, [B].
            loss: its parts by stream.
            inputs: where sigmas and the samples with a loss are read from.
            share: weight of one sample in the mean over the global batch.
        """
        self.loss += total.sum() * share
        is_trained = torch.zeros_like(total, dtype=torch.bool)
        streams = (
            (loss.video, inputs.video, inputs.video_loss_mask),
            (loss.audio, inputs.audio, inputs.audio_loss_mask),
        )
        for sums, (values, stream, mask) in zip(self.buckets, streams, strict=True):
            if values is None or stream is None or mask is None:
                continue
            # The loss of a sample without the stream, or with clean tokens only, is 0 by definition and no measurement.
            has_loss = mask.any(dim=1)
            is_trained |= has_loss
            # `index_add_`: indexing with boolean masks would wait for the device.
            # A sigma on an edge belongs to the range above it, of which the edge is the lower end.
            bucket = torch.bucketize(stream.sigma, self.edges, right=True)
            sums[0].index_add_(0, bucket, values)
            sums[1].index_add_(0, bucket, has_loss.to(values.dtype))
        self.trained[-1] += is_trained.sum()

    @torch.no_grad()
    def add_part(self, name: str, values: Tensor, total: Tensor | None, share: float) -> None:
        """Adds a further part of one micro-batch's loss.

        Args:
            name: one of `parts`.
            values: of each sample, [B], without a weight.
            total: what it adds to the training loss of each sample, [B]; None: `add` was given it already.
            share: weight of one sample in the mean over the global batch.
        """
        self.parts[self.names.index(name)] += values.sum() * share
        if total is not None:
            self.loss += total.sum() * share

    @torch.no_grad()
    def add_sources(self, names: Sequence[str], values: Tensor, inputs: StreamInputs) -> None:
        """Adds one micro-batch to the losses of its sources.

        Args:
            names: source of each sample.
            values: loss of each sample without the factor of its source [B].
            inputs: where the samples with a loss are read from.
        """
        masks = [mask for mask in (inputs.video_loss_mask, inputs.audio_loss_mask) if mask is not None]
        has_loss = torch.stack([mask.any(dim=1) for mask in masks]).any(dim=0)
        for index, name in enumerate(names):
            # By numbers of the host: a copy of them to the device would make the host wait.
            self.by_source[0, self.sources.index(name)] += values[index]
            self.by_source[1, self.sources.index(name)] += has_loss[index]

    def flat(self) -> Tensor:
        """All sums in one vector, to be added over ranks in one collective and read in one copy; see `means`."""
        work = self.loss.new_tensor([self.flops / 1e12, self.tokens])
        return torch.cat(
            [
                self.loss[None],
                work,
                *(count[None] for count in self.trained),
                self.buckets.flatten(),
                self.by_source.flatten(),
                self.parts,
            ]
        )

    def means(self, totals: list[float]) -> Means:
        """Means of a vector `flat` that was added up over ranks."""
        (loss, tflop, tokens), totals = totals[:3], totals[3:]
        trained, totals = totals[: self.steps], totals[self.steps :]
        width = len(_SIGMA_BUCKETS)
        means: dict[str, float | None] = {}
        by_sigma = {}
        for index, stream in enumerate(_STREAMS):
            # Flattened [stream, sum | count, range].
            losses = totals[2 * index * width : (2 * index + 1) * width]
            counts = totals[(2 * index + 1) * width : (2 * index + 2) * width]
            means[stream] = sum(losses) / sum(counts) if sum(counts) else None
            for low, value, count in zip(_SIGMA_BUCKETS, losses, counts, strict=True):
                if count:
                    by_sigma[f"loss/{stream}_sigma_{low:.2f}-{low + 0.25:.2f}"] = value / count
        totals = totals[2 * len(_STREAMS) * width :]
        count = len(self.sources)
        sources = {
            f"data/{name}/loss": value / samples
            for name, value, samples in zip(self.sources, totals[:count], totals[count : 2 * count], strict=True)
            if samples
        }
        return Means(
            loss=loss / self.steps if any(trained) else None,
            video=means["video"],
            audio=means["audio"],
            by_sigma=by_sigma,
            parts={
                f"loss/{name}": value / self.steps
                for name, value in zip(self.names, totals[2 * count :], strict=True)
                if self.steps
            }
            | sources,
            tflop=tflop,
            tokens=tokens,
            idle_steps=sum(not count for count in trained),
            is_finite=math.isfinite(loss),
        )


def peak_memory_gib(device: torch.device) -> float | None:
    """Largest memory that tensors have held at once since the last reset, in GiB; None on a CPU.

    Memory that the allocator reserves beyond that is not counted: it depends on the size of the device.
    """
    return torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
