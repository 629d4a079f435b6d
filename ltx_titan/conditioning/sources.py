"""The prepared datasets of a job, and the conditions of their samples: `data.root`, or `[[data.sources]]`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from ltx_titan.conditioning.checks import check_conditions, check_streams, check_trainable, reference_scale
from ltx_titan.conditioning.strategy import FlexibleStrategy
from ltx_titan.config.sections import DataSection, SourceSection
from ltx_titan.data import (
    MixedDataset,
    PrecomputedDataset,
    Sample,
    ShapeKey,
    Source,
    resolve_root,
    stores_text_features,
)
from ltx_titan.data.bad_samples import SkippingDataset, tolerated
from ltx_titan.data.fingerprints import recorded_options

# Samples that several checks look at are read once.
_PEEKED = 64


class _Dataset(Protocol):
    def name(self, index: int) -> str: ...

    def peek(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class DataPart:
    """Samples that are trained alike: those of one source, or a whole dataset.

    Attributes:
        name: of the source; empty for a job without sources.
        indices: of its samples in the dataset of the job.
        strategy: with the conditions of these samples.
        caption_dropout: fraction of them that are trained without their caption.
        loss_weight: factor on their loss.
    """

    name: str
    indices: range
    strategy: FlexibleStrategy
    caption_dropout: float
    loss_weight: float = 1.0


def open_prepared(
    data: DataSection, strategy: FlexibleStrategy, folder: Path
) -> tuple[PrecomputedDataset | SkippingDataset | MixedDataset, tuple[DataPart, ...]]:
    """Opens the prepared samples of a job.

    Args:
        data: `[data]` of the job.
        strategy: with the conditions of `[video]` and `[audio]`.
        folder: of the list of samples that are replaced.

    Returns:
        The dataset, and its parts in the order of their indices.

    Raises:
        ValueError: a folder is missing or empty, or a source contradicts the job or its data.
    """
    skips = data.on_bad_sample == "skip"
    if not data.sources:
        assert data.root is not None, "required by the section"
        dataset = _open(data.root, strategy.sources, "data.root", folder if skips else None)
        return dataset, (DataPart("", range(len(dataset)), strategy, data.caption_dropout),)
    strategies = [_source_strategy(source, number, strategy) for number, source in enumerate(data.sources)]
    opened = []
    for number, (source, own) in enumerate(zip(data.sources, strategies, strict=True)):
        option = f"data.sources[{number}]"
        absent = tuple(name for name in own.blocks if source.modality not in ("all", name))
        lacking = {f"{name}_latents" for name in absent}
        folders = {name: key for name, key in own.sources.items() if key not in lacking}
        samples = _open(source.root, folders, f"{option}.root", folder if skips else None)
        if source.trigger is not None:
            _check_trigger(source.root, source.trigger, option)
        # Of the first source with equal conditions.
        group = next(i for i, other in enumerate(strategies) if other == own)
        opened.append(Source(source.label, samples, source.weight, source.repeats or 1, group, absent))
    mixed = MixedDataset(opened)
    dropouts = [data.caption_dropout if s.caption_dropout is None else s.caption_dropout for s in data.sources]
    names = [source.name for source in opened]
    return mixed, tuple(
        DataPart(name, indices, own, dropout, source.loss_weight)
        for name, indices, own, dropout, source in zip(
            names, mixed.parts, strategies, dropouts, data.sources, strict=True
        )
    )


def check_part(part: DataPart, dataset: _Dataset, keys: Sequence[ShapeKey], weights: Mapping[str, float]) -> list[str]:
    """Checks the conditions of a part against the shapes of its samples.

    Args:
        part: of the dataset.
        dataset: of the job.
        keys: shapes of each of its samples.
        weights: factor of each stream's loss.

    Returns:
        Warnings of conditions without effect.

    Raises:
        ValueError: no sample can train anything, a mask does not fit, or captions cannot be dropped.
    """
    own, name_of = _own_samples(part, dataset, keys)
    warnings = check_conditions(part.strategy, own, name_of)
    peek = lru_cache(maxsize=_PEEKED)(lambda index: dataset.peek(part.indices[index]))
    check_trainable(part.strategy, own, peek, weights, name_of)
    # Of a source whose modality states that it lacks a stream, that is no news.
    absent = dataset.source_of(part.indices[0]).absent if isinstance(dataset, MixedDataset) and part.indices else ()
    warnings += check_streams(part.strategy, own, peek, weights, absent)
    if part.caption_dropout > 0 and not any(stores_text_features(key) for key in set(own)):
        where = f"data.sources ({part.name}): caption_dropout" if part.name else "data.caption_dropout"
        raise ValueError(
            f"{where} = {part.caption_dropout}: expected text features, found finished contexts, "
            f"whose caption can no longer be dropped; set it to 0, or prepare the data without --contexts."
        )
    return [f"{part.name}: {warning}" if part.name else warning for warning in warnings]


def common_reference_scale(
    parts: Sequence[DataPart], dataset: _Dataset, keys: Sequence[ShapeKey]
) -> tuple[int, int] | None:
    """Computes how much smaller the video references of a job are than their targets, see `reference_scale`.

    Raises:
        ValueError: a reference does not fit its target, or two of them differ in their factors.
    """
    found: dict[tuple[int, int], str] = {}
    for part in parts:
        factors = reference_scale(part.strategy, *_own_samples(part, dataset, keys))
        if factors is not None:
            found.setdefault(factors, part.name)
    if len(found) > 1:
        listed = ", ".join(f"{name} {factors}" for factors, name in found.items())
        raise ValueError(
            f"data.sources: references have different (spatial, temporal) factors: {listed}; an adapter stores one "
            "pair only. Prepare all references with the same factors, or train on one of the sources."
        )
    return next(iter(found), None)


def prepared_triggers(data: DataSection) -> list[str]:
    """Trigger words of the prepared captions of a job: as its sources say, or as recorded by their preparation.

    An export may be made on a machine without the data: what is missing has none.
    """
    roots: Sequence[tuple[str | None, str | None]] = [(source.root, source.trigger) for source in data.sources]
    found: set[str] = set()
    for root, trigger in roots or [(data.root, None)]:
        if trigger is not None:
            found.add(trigger)
        elif root is not None and Path(root).is_dir():
            words = recorded_options(resolve_root(root) / "conditions", "lora_trigger")
            # With several, or some captions without one, it is not known which of them to use.
            found |= {word for word in words if word is not None} if len(words) == 1 else set()
    return sorted(found)


def check_trigger_word(trigger: str | None, data: DataSection) -> None:
    """Compares `job.trigger`, which readers of a LoRA file show, with the words that the captions were encoded with.

    Captions that were prepared without a trigger word may have it in their text.

    Raises:
        ValueError: it contains none of them.
    """
    found = prepared_triggers(data) if data.source == "precomputed" else [data.media.lora_trigger or ""]
    words = [word for word in found if word.strip()]
    if trigger is not None and words and not any(word in trigger for word in words):
        raise ValueError(
            f"job.trigger = {trigger!r}: expected the trigger word that the captions have, found "
            f"{', '.join(map(repr, words))}; correct it, or remove it: unset means that of the data."
        )


def _own_samples(
    part: DataPart, dataset: _Dataset, keys: Sequence[ShapeKey]
) -> tuple[list[ShapeKey], Callable[[int], str]]:
    """Shapes of the samples of a part, and their names by index in it."""
    return [keys[index] for index in part.indices], lambda index: dataset.name(part.indices[index])


def _open(
    root: str, folders: dict[str, str], option: str, skip_folder: Path | None
) -> PrecomputedDataset | SkippingDataset:
    dataset = PrecomputedDataset(root, folders, option, skip_damaged=skip_folder is not None)
    if dataset.num_dropped > tolerated(len(dataset) + dataset.num_dropped):
        raise ValueError(
            f"{dataset.root}: {dataset.num_dropped} samples are damaged (named above), {len(dataset)} are not; "
            f'data.on_bad_sample = "skip" tolerates 1 %: prepare them again.'
        )
    # Of each source on its own: a damaged sample is replaced by another one of its source.
    return dataset if skip_folder is None else SkippingDataset(dataset, skip_folder)


def _source_strategy(source: SourceSection, number: int, strategy: FlexibleStrategy) -> FlexibleStrategy:
    """The job's strategy with the conditions of a source; a stream that it lacks has none."""
    blocks = {}
    for name, block in strategy.blocks.items():
        conditions = source.video_conditions if name == "video" else source.audio_conditions
        if source.modality not in ("all", name):
            conditions = ()
        blocks[name] = block if conditions is None else block.model_copy(update={"conditions": conditions})
    try:
        return FlexibleStrategy.from_config(blocks, strategy.scale_factors, strategy.keyframe_marker)
    except ValueError as error:
        raise ValueError(f"data.sources[{number}]: {error}") from error


def _check_trigger(root: str, trigger: str, option: str) -> None:
    """Compares a trigger word with the one that captions were encoded with, which cannot be added any more.

    Raises:
        ValueError: they differ; folders of other trainers record none.
    """
    words = recorded_options(resolve_root(root) / "conditions", "lora_trigger")
    if words and words != {trigger}:
        found = ", ".join(sorted("none" if word is None else repr(word) for word in words))
        raise ValueError(
            f"{option}.trigger = {trigger!r}: expected the trigger word that the captions were prepared with, found "
            f"{found}; correct it, or run process-captions with --lora-trigger {trigger}."
        )
