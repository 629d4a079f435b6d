"""Rules between the fields of `[validation]`, `checkpoint.keep_best` and those of other sections; see rules.py."""

from collections.abc import Iterator
from pathlib import Path

from ltx_titan.config.errors import Problem, must_be_file
from ltx_titan.config.job import JobConfig


def validation_rules(job: JobConfig) -> Iterator[Problem]:
    """Rules of `[validation]`, its LoRAs and its scores."""
    yield from _validation_lora_rules(job)
    yield from _quality_rules(job)
    validation = job.validation
    if validation.dataset_samples and validation.held_out_root is None and job.data.source != "precomputed":
        yield Problem(
            "validation.dataset_samples",
            validation.dataset_samples,
            f'prepared samples, which data.source = "{job.data.source}" does not have',
            "set validation.held_out_root to a prepared dataset, or remove dataset_samples",
        )
    if job.validation.use_ema and job.optimizer.ema_decay is None:
        yield Problem(
            "validation.use_ema",
            True,
            "false, because optimizer.ema_decay is unset and no averaged weights exist",
            "remove it, or set optimizer.ema_decay, for example to 0.999",
        )


def _validation_lora_rules(job: JobConfig) -> Iterator[Problem]:
    if not job.validation.loras:
        return
    for number, lora in enumerate(job.validation.loras):
        yield from must_be_file(f"validation.loras[{number}].path", lora.path)
    # All three keep weights in another form than the one that a LoRA can be added to.
    is_quantized = job.model.mode == "lora" and job.lora.base_dtype not in ("bfloat16", "float32")
    for is_set, cause, remedy in (
        (is_quantized, f'lora.base_dtype = "{job.lora.base_dtype}"', 'set lora.base_dtype = "bfloat16"'),
        (job.parallelism.stream_blocks != 0, "parallelism.stream_blocks", "set parallelism.stream_blocks = 0"),
        (job.float8.all_gather, "float8.all_gather = true", "set float8.all_gather = false"),
    ):
        if is_set:
            paths = ", ".join(lora.path for lora in job.validation.loras)
            what = f"no LoRAs with {cause}, because they are added to plain weights"
            yield Problem("validation.loras", paths, what, f"{remedy}, or remove them")


def _quality_rules(job: JobConfig) -> Iterator[Problem]:
    validation = job.validation
    for name, stream in (("clip_path", "video"), ("clap_path", "audio")):
        if (path := getattr(validation.quality, name)) is None:
            continue
        key = f"validation.quality.{name}"
        if not validation.samples:
            yield Problem(key, path, "validation.samples, whose prompts clips are compared with", "add them")
        if getattr(job, stream) is None or getattr(validation, f"generate_{stream}") is False:
            yield Problem(key, path, f"clips with {stream}, which the job does not sample", "remove it")
        if not (Path(path) / "config.json").is_file():
            yield Problem(key, path, "a folder with config.json and weights of a model", "correct the path")


def keep_best_rules(job: JobConfig) -> Iterator[Problem]:
    """Rules of `checkpoint.keep_best`, most of whose metrics come from validation."""
    best, validation, interval = job.checkpoint.keep_best, job.validation, job.checkpoint.interval
    key = "checkpoint.keep_best.metric"
    if best.metric is None:
        for name in ("mode", "count"):
            if (value := getattr(best, name)) != type(best).model_fields[name].default:
                yield Problem(f"checkpoint.keep_best.{name}", value, f"unset without {key}", f"set {key}, or remove it")
        return
    if not job.checkpoint.enable or interval == 0:
        cause = "enable = false" if not job.checkpoint.enable else "interval = 0"
        what = f"checkpoints to choose from, found checkpoint.{cause}"
        yield Problem(key, best.metric, what, "set checkpoint.interval, or remove it")
        return
    # The other names depend on streams, sigmas and sources; one that is never logged is reported while training.
    of_validation = {
        "held_out/": validation.held_out_root is not None,
        "quality/": best.metric in validation.quality.metrics,
    }
    prefix = next((prefix for prefix in of_validation if best.metric.startswith(prefix)), None)
    if prefix is None:
        return
    if validation.interval is None or not of_validation[prefix]:
        setting = "validation.held_out_root" if prefix == "held_out/" else "a model in validation.quality"
        what = f"a metric that the job logs; this one needs validation.interval and {setting}"
        yield Problem(key, best.metric, what, "set them, or choose another metric")
    elif interval % validation.interval:
        what = f"a multiple of validation.interval = {validation.interval}, at whose steps {best.metric} is known"
        yield Problem("checkpoint.interval", interval, what, "change one of them")
