"""What a job's conditions come to on its data, known from the shapes of all samples before the first step.

A condition that asks for more than a clip has is clamped to it, here as in the reference trainer. That can leave it
without effect, or leave nothing to generate, and neither shows in a loss curve. So the plan of a job says it, once for
each condition and by name. References must stand in one scale to their targets throughout, because an adapter's file
has room for one pair of factors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_titan.conditioning.conditions import given_tokens
from ltx_titan.conditioning.references import reference_factors
from ltx_titan.conditioning.strategy import FlexibleStrategy
from ltx_titan.conditioning.tokens import Grid
from ltx_titan.config.streams import (
    AudioSection,
    IntrinsicCondition,
    Mask,
    Prefix,
    Reference,
    SpatialCrop,
    Suffix,
    VideoSection,
)

ShapeKey = tuple[tuple[str, str, tuple[int, ...]], ...]
"""(source, field, shape) of everything in a sample, as the data package has it."""


@dataclass(frozen=True)
class _Shape:
    """All samples of one shape: their fields' shapes, how many there are, and the first one's number."""

    fields: dict[tuple[str, str], tuple[int, ...]]
    count: int
    first: int

    def grid(self, source: str) -> Grid:
        """Latent sizes of a clip; audio has height and width 1."""
        sizes = self.fields[source, "latents"][1:]
        return Grid(*sizes) if len(sizes) == 3 else Grid(sizes[0], 1, 1)


def check_conditions(
    strategy: FlexibleStrategy, keys: Sequence[ShapeKey], name_of: Callable[[int], str] = str
) -> list[str]:
    """Looks for conditions that cannot do what they say.

    Args:
        strategy: the job's.
        keys: shapes of each sample of the data set.
        name_of: what messages call a sample.

    Returns:
        Warnings, at most one per condition and kind of trouble.

    Raises:
        ValueError: a mask does not have one element per token of its target.
    """
    shapes = _distinct(keys)
    warnings, given_away = [], {id(shape) for shape in shapes}
    for name, block in _blocks(strategy):
        _check_masks(name, block, shapes, name_of)
        warnings += [
            f"{_label(name, block, place)} has probability 0, so it never applies; raise it, or remove the condition"
            for place, condition in enumerate(block.conditions)
            if condition.probability == 0
        ]
        if not block.is_generated:
            continue
        warnings += _stream_warnings(name, block, strategy.scale_factors, shapes, name_of)
        given_away &= {
            id(shape) for shape in shapes if _always_given(block, shape.grid(f"{name}_latents"), strategy.scale_factors)
        }
    if shapes and len(given_away) == len(shapes):
        warnings.append(
            "nothing is left to learn: in every sample and step the conditions give every token of what is generated, "
            "so the loss is 0 throughout; give less of the clips, or set a probability below 1"
        )
    return warnings


def reference_scale(
    strategy: FlexibleStrategy, keys: Sequence[ShapeKey], name_of: Callable[[int], str] = str
) -> tuple[int, int] | None:
    """How much smaller the video references of a job are than their targets: what an adapter's metadata says.

    Args:
        strategy: the job's.
        keys: shapes of each sample of the data set.
        name_of: what messages call a sample.

    Returns:
        (spatial, temporal), None for a job without video references.

    Raises:
        ValueError: a reference does not fit its target, or two samples or references differ in their factors.
    """
    found: tuple[tuple[int, int], str] | None = None
    folders = [c.latents_dir for c in (strategy.video.conditions if strategy.video else ()) if isinstance(c, Reference)]
    for shape in _distinct(keys) if folders else ():
        for folder in folders:
            where = f"{folder}: {name_of(shape.first)}"
            try:
                factors = reference_factors(shape.grid("video_latents"), shape.grid(folder))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if found is None:
                found = factors, where
            elif found[0] != factors:
                raise ValueError(
                    f"{where} has the (spatial, temporal) factors {factors}, {found[1]} has {found[0]}; an adapter "
                    "knows one pair only. Prepare all references with the same factors, or split the data set."
                )
    return found[0] if found else None


def _distinct(keys: Sequence[ShapeKey]) -> list[_Shape]:
    counts: dict[ShapeKey, list[int]] = {}
    for index, key in enumerate(keys):
        counts.setdefault(key, [0, index])[0] += 1
    return [
        _Shape({(source, field): shape for source, field, shape in key}, count, first)
        for key, (count, first) in counts.items()
    ]


def _blocks(strategy: FlexibleStrategy) -> Iterator[tuple[str, VideoSection | AudioSection]]:
    for name, block in (("video", strategy.video), ("audio", strategy.audio)):
        if block is not None:
            yield name, block


def _check_masks(
    name: str, block: VideoSection | AudioSection, shapes: list[_Shape], name_of: Callable[[int], str]
) -> None:
    for condition, is_applied in zip(block.conditions, block.applied, strict=True):
        if not (isinstance(condition, Mask) and is_applied):
            continue
        for shape in shapes:
            grid, mask = shape.grid(f"{name}_latents"), shape.fields[condition.mask_dir, "mask"]
            if torch.Size(mask).numel() != grid.num_tokens:
                raise ValueError(
                    f"{condition.mask_dir}: {name_of(shape.first)}: expected a mask with one element for each of the "
                    f"{grid.num_tokens} {name} tokens ({_size(grid)}), found {list(mask)}; make the masks from the "
                    "same clips, sizes and frame counts as the latents."
                )


def _stream_warnings(
    name: str,
    block: VideoSection | AudioSection,
    factors: tuple[int, int, int],
    shapes: list[_Shape],
    name_of: Callable[[int], str],
) -> list[str]:
    """Of each condition, how many samples it gives altogether, not at all, or less of than it says."""
    troubles: dict[str, list[_Shape]] = {}
    for shape in shapes:
        grid = shape.grid(f"{name}_latents")
        union = torch.zeros(1, grid.num_tokens, dtype=torch.bool)
        is_said = False
        for place, condition in _from_shapes(block):
            given = _given(condition, grid, factors)
            union |= given
            if trouble := _trouble(condition, given, grid, factors):
                troubles.setdefault(f"{_label(name, block, place)} {trouble}", []).append(shape)
                is_said |= bool(given.all())
        if union.all() and not is_said:
            places = ", ".join(str(place) for place, _ in _from_shapes(block))
            text = f"{name}.conditions {places} together give all of the clip, which then adds nothing to the loss"
            troubles.setdefault(text, []).append(shape)
    total = sum(shape.count for shape in shapes)
    return [
        f"{trouble}: {sum(shape.count for shape in found)} of {total} samples, for example "
        f"{name_of(found[0].first)} ({_size(found[0].grid(f'{name}_latents'))})"
        for trouble, found in troubles.items()
    ]


def _trouble(condition: IntrinsicCondition, given: Tensor, grid: Grid, factors: tuple[int, int, int]) -> str:
    if given.all():
        return "gives all of the clip, which then adds nothing to the loss"
    if not given.any():
        return "lies outside the frame, so it has no effect"
    if isinstance(condition, SpatialCrop):
        _, _, bottom, right = condition.spatial_region
        if bottom > grid.height * factors[1] or right > grid.width * factors[2]:
            return "reaches beyond the frame; only the part inside is given"
    return ""


def _from_shapes(block: VideoSection | AudioSection) -> list[tuple[int, IntrinsicCondition]]:
    """The conditions, with their places, of which shapes alone say what they give."""
    return [
        (place, condition)
        for place, condition in enumerate(block.conditions)
        if not isinstance(condition, Mask | Reference) and condition.probability > 0
    ]


def _always_given(block: VideoSection | AudioSection, grid: Grid, factors: tuple[int, int, int]) -> bool:
    """Whether the conditions of probability 1 leave no token to generate."""
    union = torch.zeros(1, grid.num_tokens, dtype=torch.bool)
    for _, condition in _from_shapes(block):
        if condition.probability == 1:
            union |= _given(condition, grid, factors)
    return bool(union.all())


def _given(condition: IntrinsicCondition, grid: Grid, factors: tuple[int, int, int]) -> Tensor:
    return given_tokens(condition, grid, factors, None, torch.device("cpu"))


def _label(name: str, block: VideoSection | AudioSection, place: int) -> str:
    condition = block.conditions[place]
    detail = ""
    if isinstance(condition, Prefix | Suffix):
        detail = f", temporal_boundary = {condition.temporal_boundary}"
    elif isinstance(condition, SpatialCrop):
        detail = f", spatial_region = {list(condition.spatial_region)}"
    return f"{name}.conditions[{place}] ({condition.type}{detail})"


def _size(grid: Grid) -> str:
    if (grid.height, grid.width) == (1, 1):
        return f"{grid.frames} latent steps"
    return f"{grid.frames} x {grid.height} x {grid.width} latent frames, rows, columns"
