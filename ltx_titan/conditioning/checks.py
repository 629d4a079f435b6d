"""Checks a job's conditions against the shapes of all samples, before the first step.

A condition that exceeds a clip is clamped to it, here as in the reference trainer. It may then have no effect, or leave
nothing to generate, and neither shows in a loss curve: the plan of a job warns once for each such condition, by name.
A job in which no sample leaves anything to generate is refused.
All references must have the same scale relative to their targets, because an adapter stores one pair of factors.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_titan.conditioning.conditioned import conditioned_tokens, reference_factors, span_bounds
from ltx_titan.conditioning.strategy import FlexibleStrategy
from ltx_titan.conditioning.tokens import Grid
from ltx_titan.config.streams import (
    AudioSection,
    IntrinsicCondition,
    Keyframe,
    Mask,
    Prefix,
    Reference,
    SpatialCrop,
    Suffix,
    VideoSection,
    random_spans,
)
from ltx_titan.data import Sample, ShapeKey

# Samples that are read at a time.
_BLOCK = 16
# Samples that are looked at for a warning.
_LOOKED_AT = 256


@dataclass(frozen=True)
class _Shape:
    """All samples of one shape: shapes of their fields, their number, and the index of the first one."""

    fields: dict[tuple[str, str], tuple[int, ...]]
    count: int
    first: int

    def grid(self, source: str) -> Grid:
        """Latent sizes of a clip; audio has height and width 1."""
        # Without the channels: [C, F, H, W] or [C, T, M].
        sizes = self.fields[source, "latents"][1:]
        return Grid(*sizes) if len(sizes) == 3 else Grid(sizes[0], 1, 1)


def check_conditions(
    strategy: FlexibleStrategy, keys: Sequence[ShapeKey], name_of: Callable[[int], str] = str
) -> list[str]:
    """Finds conditions without effect, or with another effect than configured.

    Args:
        strategy: of the job.
        keys: shapes of each sample of the dataset.
        name_of: names a sample in messages.

    Returns:
        Warnings, at most one per condition and problem.

    Raises:
        ValueError: a mask does not have one element per token of its target.
    """
    shapes = _distinct(keys)
    warnings = []
    for name, block in strategy.blocks.items():
        _check_masks(name, block, shapes, name_of)
        warnings += [
            f"{_label(name, block, i)} has probability 0, so it never applies; raise it, or remove the condition"
            for i, condition in enumerate(block.conditions)
            if condition.probability == 0
        ]
        # A frozen stream has no loss to lose.
        if not block.is_generated:
            continue
        warnings += _stream_warnings(name, block, strategy.scale_factors, shapes, name_of)
    return warnings


def check_trainable(
    strategy: FlexibleStrategy,
    keys: Sequence[ShapeKey],
    peek: Callable[[int], Sample],
    weights: Mapping[str, float],
    name_of: Callable[[int], str] = str,
) -> None:
    """Refuses a job in which no sample has a token to learn from.

    Args:
        strategy: of the job.
        keys: shapes of each sample of the dataset.
        peek: reads the masks of a sample and whether its streams are present; called only if shapes do not decide.
        weights: factor of each stream's loss.
        name_of: names a sample in messages.

    Raises:
        ValueError: no generated stream of any sample is present, weighted and left unconditioned; with the reasons.
    """
    reasons = _reasons_untrained(strategy, keys, peek, weights)
    if reasons is not None:
        raise ValueError(
            f"no sample can train anything, for example {name_of(0)}: {reasons}. Generate a stream that clips have, "
            "condition on less of them or with a probability below 1, or prepare other clips."
        )


def check_streams(
    strategy: FlexibleStrategy,
    keys: Sequence[ShapeKey],
    peek: Callable[[int], Sample],
    weights: Mapping[str, float],
    absent: Collection[str] = (),
) -> list[str]:
    """Finds streams of a job that no sample trains, or has, although another one can be trained.

    Looks at some of the samples, so that a dataset without audio is not read before the first step.

    Args:
        strategy: of the job.
        keys: shapes of each sample of the dataset.
        peek: as in `check_trainable`.
        weights: factor of each stream's loss.
        absent: streams that the samples lack on purpose.

    Returns:
        A warning for each.
    """
    chosen = [index * len(keys) // _LOOKED_AT for index in range(_LOOKED_AT)] if len(keys) > _LOOKED_AT else None
    own = keys if chosen is None else [keys[index] for index in chosen]
    which = "no sample" if chosen is None else f"none of {_LOOKED_AT} samples"

    def look(index: int) -> Sample:
        return peek(index if chosen is None else chosen[index])

    warnings = []
    for name, block in strategy.blocks.items():
        if name in absent:
            continue
        if block.is_generated and weights[name] > 0:
            alone = {other: weights[name] if other == name else 0.0 for other in strategy.blocks}
            if reasons := _reasons_untrained(strategy, own, look, alone):
                warnings.append(f"[{name}] is generated, and {which} trains it: {reasons}")
        elif not block.is_generated and _is_absent(name, own, look):
            warnings.append(
                f"[{name}] conditions the other stream, and {which} has it ({name} latents with present = false), so "
                "the job trains without it; prepare clips that have it, or remove the section"
            )
    return warnings


def _is_absent(name: str, keys: Sequence[ShapeKey], peek: Callable[[int], Sample]) -> bool:
    """Whether all samples have a placeholder in place of a stream; the first one that has it ends the search."""
    if not keys or any(not any(part[:2] == (f"{name}_latents", "present") for part in key) for key in set(keys)):
        return False
    return all(not peek(index)[f"{name}_latents"]["present"] for index in range(len(keys)))


def _reasons_untrained(
    strategy: FlexibleStrategy, keys: Sequence[ShapeKey], peek: Callable[[int], Sample], weights: Mapping[str, float]
) -> str | None:
    """Reasons why no sample has a token to learn from, with their numbers of samples; None if one has."""
    generated = {name: block for name, block in strategy.blocks.items() if block.is_generated and weights[name] > 0}
    shapes = _distinct(keys)
    reasons: Counter[str] = Counter()
    unsure: set[ShapeKey] = set()
    for key, shape in zip(dict.fromkeys(keys), shapes, strict=True):
        open_streams = [
            name
            for name, block in generated.items()
            if not _always_conditioned(block, shape.grid(f"{name}_latents"), strategy.scale_factors)
        ]
        if not all(_needs_reading(name, generated[name], shape) for name in open_streams):
            return None
        if open_streams:
            unsure.add(key)
        else:
            reasons.update({f"the {name} is covered by conditions": shape.count for name in generated})
    # In blocks: reading ahead hides the latency of network storage, and the first sample usually decides.
    indices = [index for index, key in enumerate(keys) if key in unsure]
    with ThreadPoolExecutor(_BLOCK) as pool:
        for start in range(0, len(indices), _BLOCK):
            block_of_indices = indices[start : start + _BLOCK]
            for index, sample in zip(block_of_indices, pool.map(peek, block_of_indices), strict=True):
                found = [
                    _reason_untrained(name, block, keys[index], sample, strategy.scale_factors)
                    for name, block in generated.items()
                ]
                if None in found:
                    return None
                reasons.update(reason for reason in found if reason is not None)
    return "; ".join(f"{reason} in {count} of {len(keys)} samples" for reason, count in reasons.items())


def reference_scale(
    strategy: FlexibleStrategy, keys: Sequence[ShapeKey], name_of: Callable[[int], str] = str
) -> tuple[int, int] | None:
    """Computes how much smaller the video references of a job are than their targets, for an adapter's metadata.

    Args:
        strategy: of the job.
        keys: shapes of each sample of the dataset.
        name_of: names a sample in messages.

    Returns:
        (spatial, temporal), None for a job without video references.

    Raises:
        ValueError: a reference does not fit its target, or two samples or references differ in their factors.
    """
    found: tuple[tuple[int, int], str] | None = None
    folders = [c.latents_dir for c in (strategy.video.conditions if strategy.video else ()) if isinstance(c, Reference)]
    # One check per distinct shape: a dataset has few shapes and many samples.
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
                    "stores one pair only. Prepare all references with the same factors, or split the dataset."
                )
    return found[0] if found else None


def check_text(
    keys: Sequence[ShapeKey],
    name_of: Callable[[int], str] = str,
    *,
    widths: Mapping[str, int],
    multiple_of: int = 1,
    is_features: bool,
) -> None:
    """Compares the stored texts with what reads them: the text connectors, or the transformer for finished contexts.

    Args:
        keys: shapes of each sample of the dataset.
        name_of: names a sample in messages.
        widths: stream -> width of its text; only streams that are built.
        multiple_of: number of tokens that a text's length is a multiple of.
        is_features: whether `widths` are those of features, which have a mask, or of contexts, which have none.

    Raises:
        ValueError: a sample's text has another width or length; with its name.
    """
    for shape in _distinct(keys):
        fields = {field: size for (source, field), size in shape.fields.items() if source == "conditions"}
        if ("prompt_attention_mask" in fields) != is_features:
            continue
        for stream, width in widths.items():
            # The video's text serves both streams if there is no other.
            field = f"{stream}_prompt_embeds" if f"{stream}_prompt_embeds" in fields else "video_prompt_embeds"
            tokens, found = fields[field]
            what = f"conditions: {name_of(shape.first)} ({shape.count} samples of its shape): {field}"
            if found != width:
                reader = "text connectors" if is_features else "transformer"
                raise ValueError(
                    f"{what}: expected width {width}, which the {reader} of this checkpoint read, found {found}. The "
                    "captions were encoded for another model: run process-captions with --model-path of this one."
                )
            if tokens % multiple_of:
                raise ValueError(
                    f"{what}: expected a multiple of {multiple_of} tokens, the registers of the text connectors, found "
                    f"{tokens}. Encode the captions again with process-captions, which pads them to 1024 tokens."
                )


def _distinct(keys: Sequence[ShapeKey]) -> list[_Shape]:
    counts: dict[ShapeKey, list[int]] = {}
    for index, key in enumerate(keys):
        counts.setdefault(key, [0, index])[0] += 1
    return [
        _Shape({(source, field): shape for source, field, shape in key}, count, first)
        for key, (count, first) in counts.items()
    ]


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
    """Counts, per condition, the samples that it covers entirely, not at all, or less than configured."""
    problems: dict[str, list[_Shape]] = {}
    for shape in shapes:
        grid = shape.grid(f"{name}_latents")
        union = torch.zeros(1, grid.num_tokens, dtype=torch.bool)
        # A condition that covers the clip by itself is named; the union is then not worth a second warning.
        is_named = False
        for i, condition in _known_from_shapes(block):
            mask = conditioned_tokens(condition, grid, factors)
            union |= mask
            if problem := _problem(condition, mask, grid, factors):
                problems.setdefault(f"{_label(name, block, i)} {problem}", []).append(shape)
                is_named |= bool(mask.all())
        # Only together: each condition may leave tokens to generate and their union none.
        if union.all() and not is_named:
            indices = ", ".join(str(i) for i, _ in _known_from_shapes(block))
            text = f"{name}.conditions {indices} together cover the whole clip, so it contributes no loss"
            problems.setdefault(text, []).append(shape)
    total = sum(shape.count for shape in shapes)
    return [
        f"{problem}: {sum(shape.count for shape in found)} of {total} samples, for example "
        f"{name_of(found[0].first)} ({_size(found[0].grid(f'{name}_latents'))})"
        for problem, found in problems.items()
    ]


def _problem(condition: IntrinsicCondition, mask: Tensor, grid: Grid, factors: tuple[int, int, int]) -> str:
    if mask.all():
        return "covers the whole clip, so it contributes no loss"
    if isinstance(condition, Keyframe) and (outside := _outside(condition, grid.frames)):
        return f"is outside the clip at {', '.join(outside)}, where it has no effect"
    # The mask of a random keyframe has only what is clean wherever it starts.
    if not mask.any() and not random_spans(condition):
        return "is outside the frame, so it has no effect"
    if isinstance(condition, SpatialCrop):
        _, _, bottom, right = condition.spatial_region
        if bottom > grid.height * factors[1] or right > grid.width * factors[2]:
            return "exceeds the frame; only the part inside is conditioned on"
    return ""


def _outside(condition: Keyframe, frames: int) -> list[str]:
    """Starts of keyframes that lie beyond the clip with all of their frames."""
    bounds = [(span.at, span_bounds(span, frames)) for span in condition.spans if span.at != "random"]
    return [str(at) for at, (first, stop) in bounds if first >= frames or stop <= 0]


def _known_from_shapes(block: VideoSection | AudioSection) -> list[tuple[int, IntrinsicCondition]]:
    """Conditions, with their indices, whose token masks follow from shapes alone."""
    return [
        (i, condition)
        for i, condition in enumerate(block.conditions)
        # A mask's content differs per sample and a reference adds tokens without covering any.
        if not isinstance(condition, Mask | Reference) and condition.probability > 0
    ]


def _always_conditioned(
    block: VideoSection | AudioSection,
    grid: Grid,
    factors: tuple[int, int, int],
    masks: Mapping[str, Tensor] | None = None,
) -> bool:
    """Whether the conditions of probability 1 leave no token to generate; stored masks count if they are passed."""
    union = torch.zeros(1, grid.num_tokens, dtype=torch.bool)
    for _, condition in _known_from_shapes(block):
        # Below 1 some step trains the tokens, so the sample is not lost.
        if condition.probability == 1:
            union |= conditioned_tokens(condition, grid, factors)
    for condition in _certain_masks(block):
        if masks is not None:
            union |= conditioned_tokens(condition, grid, factors, masks[condition.mask_dir][None])
    return bool(union.all())


def _certain_masks(block: VideoSection | AudioSection) -> list[Mask]:
    """Mask conditions that apply in every step."""
    return [condition for condition in block.conditions if isinstance(condition, Mask) and condition.probability == 1]


def _needs_reading(name: str, block: VideoSection | AudioSection, shape: _Shape) -> bool:
    """Whether values of a sample decide if its stream can be trained: a flag `present`, or a mask."""
    return (f"{name}_latents", "present") in shape.fields or bool(_certain_masks(block))


def _reason_untrained(
    name: str, block: VideoSection | AudioSection, key: ShapeKey, sample: Sample, factors: tuple[int, int, int]
) -> str | None:
    """Reason why a stream of a sample has no token to learn from; None if it has one."""
    # Absent if the shapes alone decided.
    if not sample.get(f"{name}_latents", {}).get("present", True):
        return f"the {name} is absent"
    masks: dict[str, Tensor] = {}
    for condition in _certain_masks(block):
        mask = sample[condition.mask_dir]["mask"]
        assert isinstance(mask, Tensor)
        masks[condition.mask_dir] = mask
    [shape] = _distinct([key])
    if _always_conditioned(block, shape.grid(f"{name}_latents"), factors, masks):
        return f"the {name} is covered by conditions"
    return None


def _label(name: str, block: VideoSection | AudioSection, index: int) -> str:
    condition = block.conditions[index]
    detail = ""
    if isinstance(condition, Prefix | Suffix):
        detail = f", temporal_boundary = {condition.temporal_boundary}"
    elif isinstance(condition, Keyframe):
        detail = f", at = {list(condition.at)}"
    elif isinstance(condition, SpatialCrop):
        detail = f", spatial_region = {list(condition.spatial_region)}"
    return f"{name}.conditions[{index}] ({condition.type}{detail})"


def _size(grid: Grid) -> str:
    if (grid.height, grid.width) == (1, 1):
        return f"{grid.frames} latent steps"
    return f"{grid} latent frames, rows, columns"
