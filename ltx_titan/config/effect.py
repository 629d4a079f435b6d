"""What a job sets without having an effect.

Refused where it shows that the job is not what its author believes; only warned of where switching one key to try
something, such as `--audio.is_generated=false`, must not be refused. Parameters of another `name` are in rules.py.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

from ltx_titan.config.base import Section, StreamName
from ltx_titan.config.errors import Problem
from ltx_titan.config.job import JobConfig
from ltx_titan.config.streams import AudioSection, VideoSection

# Keys of [lora] that nobody sets without wanting adapters.
_ADAPTER = frozenset({"rank", "alpha", "targets"})


def effect_rules(job: JobConfig) -> Iterator[Problem]:
    """Keys without effect that are refused."""
    yield from _lora_section_rules(job)
    yield from _loss_mask_rules(job)


def warn_without_effect(job: JobConfig) -> None:
    """Warns of keys without effect that are not refused."""
    for text in (*_idle_stream_keys(job), *_idle_keys(job)):
        warnings.warn(text, stacklevel=3)


def _idle_stream_keys(job: JobConfig) -> Iterator[str]:
    """What is set for a stream that is not generated, on which only references have an effect."""
    streams: tuple[tuple[StreamName, VideoSection | AudioSection | None], ...]
    streams = (("video", job.video), ("audio", job.audio))
    for name, stream in streams:
        reason = f"[{name}] has is_generated = false" if stream is not None else f"the job has no [{name}]"
        for index, condition in enumerate(stream.conditions if stream is not None else ()):
            assert stream is not None
            if not stream.applied[index]:
                yield (
                    f"{name}.conditions[{index}] ({condition.type}) has no effect: {reason}, so all of its tokens are "
                    "clean already; remove the condition"
                )
        if stream is not None and stream.is_generated:
            continue
        if stream is not None and stream.loss_mask_dir is not None:
            yield f"{name}.loss_mask_dir has no effect: {reason}, so it has no loss; remove it"
        for section, key in (("loss", f"{name}_weight"), ("sigma", f"{name}_min"), ("sigma", f"{name}_max")):
            if key in _not_default(getattr(job, section)):
                yield f"{section}.{key} has no effect: {reason}; remove it"


def _idle_keys(job: JobConfig) -> Iterator[str]:
    if _has_idle_lora(job):
        yield '[lora] has no effect with model.mode = "full", which trains every weight; remove it'
    for source in ("media", "synthetic"):
        if job.data.source != source and (keys := _not_default(getattr(job.data, source))):
            yield (
                f'data.{source}.{", ".join(keys)} has no effect with data.source = "{job.data.source}"; remove it, or '
                f'set data.source = "{source}"'
            )
    if job.data.source == "media" and job.data.root is not None:
        yield 'data.root has no effect with data.source = "media", which reads data.media.dataset_path; remove it'
    if job.optimizer.stochastic_rounding and job.training.weight_dtype == "float32":
        yield (
            "optimizer.stochastic_rounding has no effect on trained weights in float32"
            + ("; remove it" if job.model.mode == "lora" else ': set training.weight_dtype = "bfloat16", or remove it')
        )
    validation = job.validation
    if validation.interval is None:
        given = {"samples": validation.samples, "dataset_samples": validation.dataset_samples,
                 "held_out_root": validation.held_out_root}  # fmt: skip
        if keys := [key for key, value in given.items() if value]:
            yield f"validation.{', '.join(keys)} has no effect while training: set validation.interval"
    elif validation.interval > job.training.steps:
        yield (
            f"validation.interval = {validation.interval} is above training.steps = {job.training.steps}: nothing is "
            "validated after the first step; lower it"
        )
    if validation.held_out_root is not None:
        trained = [job.data.root, *(source.root for source in job.data.sources)]
        if _root(validation.held_out_root) in [_root(root) for root in trained if root is not None]:
            yield (
                f"validation.held_out_root = {validation.held_out_root!r} is trained on: its loss does not show what "
                "the model makes of other clips; prepare some that are not trained on"
            )


def _root(path: str) -> Path:
    """Folder of prepared data, whichever of its two names it is given."""
    resolved = Path(path).expanduser().resolve()
    return resolved.parent if resolved.name == ".precomputed" else resolved


def _not_default(section: Section) -> list[str]:
    """Keys of a section with another value than their default; a resolved job spells all defaults out."""
    fields = type(section).model_fields
    return [
        key for key, field in fields.items() if getattr(section, key) != field.get_default(call_default_factory=True)
    ]


def _lora_section_rules(job: JobConfig) -> Iterator[Problem]:
    # The default mode is "full". A job that says so itself, such as by `--model.mode=full`, is taken at its word.
    if _has_idle_lora(job) and "mode" not in job.model.model_fields_set and _ADAPTER & job.lora.model_fields_set:
        yield Problem(
            "model.mode",
            job.model.mode,
            f'"lora", because the job has a section [lora] ({", ".join(sorted(job.lora.model_fields_set))})',
            'set model.mode = "lora", or remove [lora]: "full" trains every weight',
        )


def _has_idle_lora(job: JobConfig) -> bool:
    """Whether a job that trains every weight sets keys of [lora]; a resolved job spells out all, at their defaults."""
    given = job.lora.model_fields_set
    is_spelled_out = given == set(type(job.lora).model_fields) and not _not_default(job.lora)
    return job.model.mode == "full" and bool(given) and not is_spelled_out


def _loss_mask_rules(job: JobConfig) -> Iterator[Problem]:
    for name, stream in (("video", job.video), ("audio", job.audio)):
        if stream is not None and stream.loss_mask_dir is None and "unmasked_weight" in _not_default(stream):
            yield Problem(
                f"{name}.unmasked_weight",
                stream.unmasked_weight,
                f"unset without {name}.loss_mask_dir, whose dark tokens it weighs",
                f"set {name}.loss_mask_dir, or remove it",
            )
