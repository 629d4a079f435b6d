"""Figures of training steps: sums that stay on the device, and the record that is logged.

A step must not wait for the device, so losses are added up there (`Sums`) and read once per log line, by then reduced
over ranks into a `StepMetrics`.
"""

from collections.abc import Mapping
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
        loss: mean over the samples of the global batch.
        loss_video: the video stream's part; None if it is not trained.
        loss_audio: the audio stream's.
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


class Mark(NamedTuple):
    """Losses of `Sums` at some moment."""

    loss: Tensor
    buckets: Tensor


class Sums:
    """Sums over the micro-batches and steps since the last log line; tensors stay on the device."""

    def __init__(self, device: torch.device) -> None:
        # Three numbers in one tensor: they are reduced and copied to the host together.
        self.loss = torch.zeros(3, device=device)
        """Total, video, audio; means over the global batch, added over steps."""
        self.buckets = torch.zeros(2, 2, len(_SIGMA_BUCKETS), device=device)
        """Per stream (video, audio): sum of the losses of the samples in each sigma range, and their number."""
        self.edges = torch.tensor(_SIGMA_BUCKETS[1:], device=device)
        self.flops = 0.0
        self.tokens = 0
        self.steps = 0
        """Steps whose losses are in the sums."""
        self.taken = 0
        """All steps, skipped ones included."""

    def mark(self) -> "Mark":
        """The sums as they are, for `loss_since` and `undo`."""
        return Mark(self.loss.clone(), self.buckets.clone())

    def loss_since(self, mark: "Mark") -> Tensor:
        """This rank's share of the loss since a mark, a scalar."""
        return self.loss[0] - mark.loss[0]

    def undo(self, mark: "Mark") -> None:
        """Takes back the losses since a mark, but not the work."""
        self.loss, self.buckets = mark.loss, mark.buckets

    @torch.no_grad()
    def add(self, total: Tensor, loss: StreamLosses, inputs: StreamInputs, share: float) -> None:
        """Adds one micro-batch.

        Args:
            total: weighted loss of each sample, [B].
            loss: its parts by stream.
            inputs: where sigmas are read from.
            share: weight of one sample in the mean over the global batch.
        """
        for index, values in enumerate((total, loss.video, loss.audio)):
            if values is not None:
                self.loss[index] += values.sum() * share
        for index, (values, stream) in enumerate(((loss.video, inputs.video), (loss.audio, inputs.audio))):
            if values is not None and stream is not None:
                # `index_add_`: indexing with boolean masks would wait for the device.
                # A sigma on an edge belongs to the range above it, of which the edge is the lower end.
                bucket = torch.bucketize(stream.sigma, self.edges, right=True)
                self.buckets[index, 0].index_add_(0, bucket, values)
                self.buckets[index, 1].index_add_(0, bucket, torch.ones_like(values))


def bucket_means(flat: list[float]) -> dict[str, float]:
    """Mean loss of each stream and sigma range that had samples, by TensorBoard tag; `flat` is `Sums.buckets`."""
    width = len(_SIGMA_BUCKETS)
    means = {}
    for index, stream in enumerate(_STREAMS):
        # Flattened [stream, sum | count, range].
        totals = flat[2 * index * width : (2 * index + 1) * width]
        counts = flat[(2 * index + 1) * width : (2 * index + 2) * width]
        for low, total, count in zip(_SIGMA_BUCKETS, totals, counts, strict=True):
            if count:
                means[f"loss/{stream}_sigma_{low:.2f}-{low + 0.25:.2f}"] = total / count
    return means


def peak_memory_gib(device: torch.device) -> float | None:
    """Largest memory that tensors have held at once since the last reset, in GiB; None on a CPU.

    Memory that the allocator reserves beyond that is not counted: it depends on the size of the device.
    """
    return torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
