"""Conditioning of one stream's tokens, for training and for sampling.

This module decides

- which target tokens are conditioned: they stay clean, at timestep 0 and without loss (`conditioned_tokens`);
- which reference tokens join them, in which order and at which positions (`StreamTokens.add_reference`);
- which tokens carry the keyframe marker (`StreamTokens.keyframes_mask`).

Training reads target and references from the dataset (`strategy`), sampling starts from an empty target
(`validation.start`). Both build a `StreamTokens`, so that a model is sampled under the conditions it was trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

import torch
from torch import Tensor

from ltx_titan.conditioning.batch import StreamBatch
from ltx_titan.conditioning.tokens import Clip, Coordinates, Grid
from ltx_titan.config.streams import (
    AudioSection,
    FirstFrame,
    IntrinsicCondition,
    Keyframe,
    Mask,
    Prefix,
    Reference,
    Span,
    SpatialCrop,
    Suffix,
    VideoSection,
    random_spans,
)

_T = TypeVar("_T")


@dataclass(frozen=True)
class StreamTokens:
    """Clean tokens of one stream and their conditioning; noise comes later.

    `B` samples, `S` target tokens, `R` reference tokens of width `C`.

    Attributes:
        target: the clip that is generated, or frozen.
        conditioned: True for a conditioned target token [B, S]; None if no condition can ever make one.
        references: clips that the target attends to, in the order of the conditions; always clean and without loss.
        references_first: whether references come before the target in the sequence, see `_join`.
        is_frozen: whether the whole stream is clean, with sigma 0.
        marks_first_frame: whether the model has an embedding for tokens of a single pixel frame (LTX-2.5).
    """

    target: Clip
    conditioned: Tensor | None = None
    references: tuple[Clip, ...] = ()
    references_first: bool = True
    is_frozen: bool = False
    marks_first_frame: bool = False

    def condition(self, mask: Tensor, content: Tensor | None = None) -> Self:
        """Adds conditioned tokens to those of earlier conditions.

        Args:
            mask: True for a token to condition on [1, S] or [B, S].
            content: clean tokens for the True positions of a [1, S] mask [B, n, C]; None keeps the target's own.
        """
        target = self.target
        if content is not None:
            # The record is frozen, and samples may share an empty target.
            tokens = target.tokens.clone()
            tokens[:, mask[0]] = content
            target = target._replace(tokens=tokens)
        # A [1, S] mask is the same for all samples; training passes [B, S], each sample with its own draw.
        conditioned = mask.expand(target.tokens.shape[:2])
        if self.conditioned is not None:
            # Union, as in the reference trainer: each condition draws by itself, and a token is clean if any of them
            # fires.
            conditioned = self.conditioned | conditioned
        return replace(self, target=target, conditioned=conditioned)

    def add_reference(self, reference: Clip) -> Self:
        """Adds a reference clip; a video's coordinates are scaled to the target's.

        Raises:
            ValueError: sizes of a video reference are not in a whole ratio to the target's.
        """
        if self.target.is_video:
            # Audio references have no scale: both start at 0 and have the same steps per second.
            spatial, temporal = reference_factors(self.target.grid, reference.grid)
            scaled = scale_reference(reference.coordinates, self.target.coordinates, spatial, temporal)
            reference = reference._replace(coordinates=scaled)
        return replace(self, references=(*self.references, reference))

    @property
    def num_tokens(self) -> int:
        """Tokens that the model receives: S + R."""
        return self.target.grid.num_tokens + sum(clip.grid.num_tokens for clip in self.references)

    @property
    def coordinates(self) -> Coordinates:
        """Coordinates of all tokens."""
        return Coordinates.concatenate(self._join(self.target.coordinates, [c.coordinates for c in self.references]))

    @property
    def clean_mask(self) -> Tensor | None:
        """True for a clean token [B, S + R]; None if no token can be clean, or the stream is frozen and sigma is 0."""
        if self.is_frozen or (self.conditioned is None and not self.references):
            return None
        conditioned = self.conditioned
        if conditioned is None:
            # References are clean even if no target token can be.
            conditioned = torch.zeros(self.target.tokens.shape[:2], dtype=torch.bool, device=self.target.tokens.device)
        return self.extend(conditioned, True)

    @property
    def keyframes_mask(self) -> Tensor | None:
        """Keyframe marker [B, S + R, 1]: 1 for the target's first latent frame, 0 elsewhere; None marks nothing.

        The first latent frame of a causal codec is a single pixel frame, conditioned or not. The released pipelines
        always mark the target's and never a reference's.
        """
        if not self.marks_first_frame:
            return None
        marker = self.target.tokens.new_zeros(*self.target.tokens.shape[:2], 1)
        # Tokens are frame-major, so the first frame is a prefix.
        marker[:, : self.target.grid.tokens_per_frame] = 1
        return self.extend(marker, 0)

    def with_references(self, of_target: Tensor) -> Tensor:
        """Joins the target's tokens [B, S, C], by now noised, with the references' clean ones [B, S + R, C]."""
        return self._cat(of_target, [clip.tokens.to(of_target.dtype) for clip in self.references])

    def extend(self, of_target: Tensor, fill: float) -> Tensor:
        """Extends per-token values of the target [B, S, ...] by `fill` for every reference token [B, S + R, ...]."""
        shapes = [(of_target.shape[0], clip.grid.num_tokens, *of_target.shape[2:]) for clip in self.references]
        return self._cat(of_target, [of_target.new_full(shape, fill) for shape in shapes])

    def select_target(self, per_token: Tensor) -> Tensor:
        """Drops the references' part of per-token values [B, S + R, ...]."""
        length = self.target.grid.num_tokens
        return per_token[:, -length:] if self.references_first else per_token[:, :length]

    def _cat(self, of_target: Tensor, of_references: list[Tensor]) -> Tensor:
        return torch.cat(self._join(of_target, of_references), dim=1) if of_references else of_target

    def _join(self, of_target: _T, of_references: list[_T]) -> list[_T]:
        """Puts target and references into the order of the sequence.

        Training prepends, a later reference before an earlier one ([r2, r1, target]), as the reference trainer does;
        sampling appends ([target, r1, r2]), as its validator and the released inference pipelines do. Attention does
        not depend on the order of tokens, only on their positions, so both are the same function. Each order is kept
        because a sum's rounding depends on it: training is held to the golden cases token by token, and a sampled clip
        stays comparable to those pipelines.
        """
        return [*reversed(of_references), of_target] if self.references_first else [of_target, *of_references]


def condition_stream(
    read: StreamBatch,
    section: VideoSection | AudioSection,
    uses: Sequence[Tensor | None],
    starts: Sequence[Tensor | None],
    scale_factors: tuple[int, int, int],
    marks_first_frame: bool,
) -> tuple[StreamTokens, dict[str, tuple[int, int]]]:
    """Applies the conditions of a training batch to one stream.

    Args:
        read: the stream's part of the batch.
        section: the stream's section of the job.
        uses: for each condition, whether it fires: [B] for an intrinsic condition, a scalar for a reference, None for
            one without effect.
        starts: for each condition, the random starts of its keyframes [B, n]; None for one without.
        scale_factors: compression factors of the video codec (time, height, width).
        marks_first_frame: whether the model has an embedding for tokens of a single pixel frame.

    Returns:
        The stream's tokens, and the (spatial, temporal) factors of each video reference by folder.

    Raises:
        ValueError: a mask does not fit its target, or a reference's size is not in a whole ratio to its target's.
    """
    target = read.target
    device, shape = target.tokens.device, target.tokens.shape
    tokens = StreamTokens(
        target,
        # All False rather than None if no condition fires, so that K is the same in every step of a job.
        conditioned=torch.zeros(shape[:2], dtype=torch.bool, device=device) if section.conditions else None,
        is_frozen=not section.is_generated,
        marks_first_frame=marks_first_frame,
    )
    factors: dict[str, tuple[int, int]] = {}
    for condition, fires, at in zip(section.conditions, uses, starts, strict=True):
        if isinstance(condition, Reference):
            reference = read.references[condition.latents_dir]
            # Checked in every batch, fired or not: an adapter stores the factors.
            if target.is_video:
                factors[condition.latents_dir] = reference_factors(target.grid, reference.grid)
            # A reference's decision is on the host: it changes the length of the sequence.
            if bool(fires):
                tokens = tokens.add_reference(reference)
        elif fires is not None:
            file_mask = read.masks[condition.mask_dir] if isinstance(condition, Mask) else None
            assert at is not None or not random_spans(condition), f"{condition.type}: no random starts"
            # [1, S] or [B, S], and [B, 1] for the draw of each sample.
            mask = conditioned_tokens(condition, target.grid, scale_factors, file_mask, device, at)
            tokens = tokens.condition(mask & fires.to(device, non_blocking=True)[:, None])
    return tokens, factors


def conditioned_tokens(
    condition: IntrinsicCondition,
    grid: Grid,
    scale_factors: tuple[int, int, int],
    file_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    starts: Tensor | None = None,
) -> Tensor:
    """Builds the token mask of an intrinsic condition.

    Spans and regions that exceed the clip are clamped to it, as in the reference trainer.

    Args:
        condition: any condition but a reference.
        grid: latent sizes of the target.
        scale_factors: compression factors of the video codec (time, height, width).
        file_mask: stored mask of a `mask` condition, [B, ...] with one element per token.
        device: device of the result.
        starts: random starts of a condition's spans, see `frames_mask`.

    Returns:
        True for a conditioned token: [1, S], or [B, S] for a `mask` condition or with random starts.

    Raises:
        ValueError: a stored mask does not have one element per token.
    """
    match condition:
        case FirstFrame() | Prefix() | Suffix() | Keyframe():
            return frames_mask(grid, condition.spans, starts, device)
        case SpatialCrop():
            mask = torch.zeros(tuple(grid), dtype=torch.bool, device=device)
            top, left, bottom, right = crop_cells(condition, scale_factors)
            # Every frame: the region is outpainted around, so it is known throughout. Slices clamp to the grid.
            mask[:, top:bottom, left:right] = True
            return mask.flatten()[None]
        case Mask():
            assert file_mask is not None, f"{condition.mask_dir}: the batch holds no mask"
            return _threshold(file_mask.to(device), grid, condition.mask_dir)


def frames_mask(
    grid: Grid, spans: Sequence[Span], starts: Tensor | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Builds the token mask of latent frames (video) or steps (audio); parts of a span beyond the clip are dropped.

    Args:
        grid: latent sizes.
        spans: frames to mark; their union is marked.
        starts: start of each random span as a fraction of all starts at which it fits, uniform in [0, 1) [B, n]. None
            marks those frames of a random span that it covers wherever it starts.
        device: device of the result.

    Returns:
        True for a token of a span: [1, S], or [B, S] with starts.
    """
    frames = torch.arange(grid.frames, device=device)
    marked = torch.zeros(1, grid.frames, dtype=torch.bool, device=device)
    drawn = iter(()) if starts is None else iter(starts.unbind(dim=1))
    for span in spans:
        first: Tensor | int
        if span.at != "random":
            first, stop = span_bounds(span, grid.frames)
            marked = marked | ((frames >= first) & (frames < stop))
            continue
        last_start = max(grid.frames - span.length, 0)
        if starts is None:
            marked = marked | ((frames >= last_start) & (frames < span.length))
            continue
        # [B, 1]. On the host as long as the draws are: only whole numbers are copied.
        first = (next(drawn) * (last_start + 1)).long().clamp(max=last_start)[:, None].to(device, non_blocking=True)
        marked = marked | ((frames >= first) & (frames < first + span.length))
    # Tokens are frame-major.
    return marked.repeat_interleave(grid.tokens_per_frame, dim=1)


def span_bounds(span: Span, frames: int) -> tuple[int, int]:
    """Start and end of a span that is not random, in a clip of `frames` latent frames or steps; not clamped to it."""
    assert span.at != "random"
    match span.at:
        case "first":
            first = 0
        case "middle":
            first = max(frames - span.length, 0) // 2
        case "last":
            # Negative for a span that is longer than the clip, which it then covers.
            first = frames - span.length
        case at:
            first = at if at >= 0 else frames + at
    return first, first + span.length


def crop_cells(condition: SpatialCrop, scale_factors: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Converts a pixel region to latent cells: divided by the compression factors and rounded down."""
    _, down, right = scale_factors
    y1, x1, y2, x2 = condition.spatial_region
    # Down for both edges, as in the reference trainer: a region smaller than a cell covers none and is refused by the
    # strategy.
    return y1 // down, x1 // right, y2 // down, x2 // right


def reference_factors(target: Grid, reference: Grid) -> tuple[int, int]:
    """Computes how much smaller a video reference is than its target, in space and in time.

    Spatial: target size / reference size, the same for height and width. Temporal: (F' - 1) of the target / (F' - 1) of
    the reference, 1 if either has a single latent frame. An adapter stores one pair of factors in its metadata, so they
    are integers and every batch is checked.

    Args:
        target: latent sizes of the target.
        reference: latent sizes of the reference.

    Raises:
        ValueError: a factor is not an integer, or height and width differ in theirs.
    """
    target, reference = Grid(*target), Grid(*reference)
    sizes = f"target latents are {target}, the reference's {reference} (frames, rows, columns)"
    if target.height % reference.height or target.width % reference.width:
        raise ValueError(
            f"{sizes}: the target's size must be a multiple of the reference's. Encode the reference again."
        )
    spatial = target.height // reference.height
    if spatial != target.width // reference.width:
        raise ValueError(f"{sizes}: height and width must shrink by the same factor. Encode the reference again.")
    target_groups, reference_groups = target.frames - 1, reference.frames - 1
    # An image has no duration to compare.
    if target_groups == 0 or reference_groups == 0:
        return spatial, 1
    if target_groups % reference_groups:
        raise ValueError(
            f"{sizes}: frames after the first, {target_groups} and {reference_groups}, must be in a whole ratio. "
            "Encode the reference with a temporal factor that divides the target's."
        )
    return spatial, target_groups // reference_groups


def scale_reference(reference: Coordinates, target: Coordinates, spatial: int, temporal: int) -> Coordinates:
    """Scales a video reference's coordinates so that matching content has matching positions.

        rows, columns -> spatial * (rows, columns)
        seconds       -> max(0, seconds - (temporal - 1) * end of the target's first token)

    Args:
        reference: coordinates of the reference; its seconds are those of its own, lower frame rate.
        target: coordinates of the target.
        spatial: spatial factor.
        temporal: temporal factor.
    """
    seconds, down, right = reference.intervals
    if temporal != 1:
        # A latent frame of the reference covers `temporal` times the pixel frames of the target's, all but the first
        # one, which is a single frame in both: hence the shift by temporal - 1 frames of the target.
        batch = reference.index.shape[0]
        first_token_end = target.intervals[0].view(batch, -1, 2)[:, :1, 1:]
        moved = seconds.view(batch, -1, 2) - (temporal - 1) * first_token_end
        seconds = moved.clamp(min=0).view(-1, 2)
    return Coordinates((seconds, down * spatial, right * spatial), reference.index)


def _threshold(mask: Tensor, grid: Grid, folder: str) -> Tensor:
    flat = mask.flatten(1)
    if flat.shape[1] != grid.num_tokens:
        raise ValueError(
            f"{folder}: a mask has shape {list(mask.shape[1:])}, {flat.shape[1]} elements, but its target has "
            f"{grid.num_tokens} latent cells ({grid} frames, rows, columns). "
            "Make the masks from the same clips, sizes and frame counts as the latents."
        )
    # Other tools store masks as floats; the threshold is the reference trainer's.
    return flat > 0.5
