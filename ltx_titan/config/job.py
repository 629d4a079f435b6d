"""The whole job: its sections, and the rules between them.

A section checks its own fields; what only two fields together can get wrong is a rule here. Rules return problems
instead of raising, so that a user sees all of them at once. `check_world` holds the rules that need the world size.
"""

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ltx_titan.config.errors import MISSING, ConfigError, Problem
from ltx_titan.config.lora import LoRASection
from ltx_titan.config.optimizer import OptimizerSection
from ltx_titan.config.sections import (
    ActivationCheckpointSection,
    CheckpointSection,
    CompileSection,
    DataSection,
    Float8Section,
    JobSection,
    KernelsSection,
    LossSection,
    MetricsSection,
    ModelSection,
    ParallelismSection,
    ProfilingSection,
    SchedulerSection,
    Section,
    SigmaSection,
    TrainingSection,
)
from ltx_titan.config.streams import AudioSection, VideoSection
from ltx_titan.config.validation import ValidationSection


@dataclass(frozen=True)
class Degrees:
    """Size of each axis of the mesh; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Number of ranks that read different samples."""
        return self.dp_replicate * self.dp_shard


RELEASED_SHAPES = ("ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-22b")

OWNERS: dict[str, dict[str, frozenset[str]]] = {
    "sigma": {
        "std": frozenset({"shifted_logit_normal"}),
        "eps": frozenset({"shifted_logit_normal"}),
        "uniform_prob": frozenset({"shifted_logit_normal"}),
        "min_value": frozenset({"uniform"}),
        "max_value": frozenset({"uniform"}),
    },
    "scheduler": {
        "start_factor": frozenset({"linear"}),
        "end_factor": frozenset({"linear"}),
        "min_factor": frozenset({"cosine", "cosine_with_restarts", "wsd"}),
        "restart_period": frozenset({"cosine_with_restarts"}),
        "restart_mult": frozenset({"cosine_with_restarts"}),
        "power": frozenset({"polynomial"}),
        "gamma": frozenset({"step"}),
        "step_size": frozenset({"step"}),
        "decay_steps": frozenset({"wsd"}),
    },
}
"""Parameters that belong to some values of their section's `name` only: section -> parameter -> names."""


class JobConfig(Section):
    """A job as read: one attribute per section of the file."""

    job: JobSection = JobSection()
    """Where the run writes."""
    model: ModelSection = ModelSection()
    """Which weights are trained."""
    data: DataSection = DataSection()
    """Where samples come from."""
    video: VideoSection | None = None
    """The video stream; absent means that the transformer sees no video."""
    audio: AudioSection | None = None
    """The audio stream; absent means that the transformer sees no audio."""
    sigma: SigmaSection = SigmaSection()
    """Noise levels."""
    training: TrainingSection = TrainingSection()
    """Length, batch, precision."""
    parallelism: ParallelismSection = ParallelismSection()
    """The device mesh."""
    activation_checkpoint: ActivationCheckpointSection = ActivationCheckpointSection()
    """Recomputation."""
    compile: CompileSection = CompileSection()
    """torch.compile."""
    float8: Float8Section = Float8Section()
    """float8 matrix products."""
    kernels: KernelsSection = KernelsSection()
    """Fused operations."""
    loss: LossSection = LossSection()
    """Weights of the streams."""
    optimizer: OptimizerSection = OptimizerSection()
    """Update rule."""
    scheduler: SchedulerSection = SchedulerSection()
    """Learning rate over time."""
    checkpoint: CheckpointSection = CheckpointSection()
    """What is kept."""
    validation: ValidationSection = ValidationSection()
    """Sampled clips."""
    lora: LoRASection = LoRASection()
    """Adapters."""
    metrics: MetricsSection = MetricsSection()
    """Logs."""
    profiling: ProfilingSection = ProfilingSection()
    """Traces."""


def rule_problems(job: JobConfig) -> list[Problem]:
    """Everything that the fields of `job` get wrong together; empty for an audio job."""
    return [problem for rule in _RULES for problem in rule(job)]


def warn_without_effect(job: JobConfig) -> None:
    """Warns of each condition that does nothing: only a reference reaches a block that is not generated."""
    for name, block in (("video", job.video), ("audio", job.audio)):
        if block is None or block.is_generated:
            continue
        for index, condition in enumerate(block.conditions):
            if condition.type != "reference":
                warnings.warn(
                    f"{name}.conditions[{index}] ({condition.type}) has no effect: [{name}] has is_generated = false, "
                    "so all of its tokens are clean already; remove the condition",
                    stacklevel=3,
                )


def _model_rules(job: JobConfig) -> Iterator[Problem]:
    model = job.model
    if model.init == "checkpoint":
        if model.checkpoint_path is None:
            yield Problem(
                "model.checkpoint_path",
                MISSING,
                "the path of an official checkpoint",
                'set it, or set model.init = "random" and model.shape for a benchmark',
            )
        else:
            yield from _must_be_file("model.checkpoint_path", model.checkpoint_path)
        for key in ("shape", "num_layers"):
            if (value := getattr(model, key)) is not None:
                yield Problem(
                    f"model.{key}",
                    value,
                    'unset while model.init = "checkpoint", whose file decides the shape',
                    'remove it, or set model.init = "random"',
                )
    elif model.shape is None:
        yield Problem(
            "model.shape",
            MISSING,
            'a shape, because model.init = "random"',
            f"set one of {', '.join(RELEASED_SHAPES)}, or a JSON file with checkpoint metadata",
        )
    elif model.shape not in RELEASED_SHAPES and not Path(model.shape).is_file():
        yield Problem(
            "model.shape",
            model.shape,
            f"one of {', '.join(RELEASED_SHAPES)}, or a JSON file that exists",
            "correct the name or the path",
        )
    if model.adapter_path is not None:
        yield from _must_be_file("model.adapter_path", model.adapter_path)
        if model.mode != "lora":
            yield Problem("model.adapter_path", model.adapter_path, 'unset while model.mode = "full"', "remove it")
    if model.connectors_path is not None:
        yield from _must_be_file("model.connectors_path", model.connectors_path)


def _must_be_file(key: str, path: str) -> Iterator[Problem]:
    if not Path(path).is_file():
        what = "a file, not a folder" if Path(path).is_dir() else "a file that exists on this machine"
        yield Problem(key, path, what, "correct the path or download the file")


def _stream_rules(job: JobConfig) -> Iterator[Problem]:
    blocks = {"video": job.video, "audio": job.audio}
    present = [name for name, block in blocks.items() if block is not None]
    if not any(blocks[name].is_generated for name in present):
        yield Problem(
            f"{present[0]}.is_generated" if present else "video",
            False if present else MISSING,
            "at least one of [video] and [audio] with is_generated = true",
            "set it to true, or add the other block" if present else "add [video] or [audio] with is_generated = true",
        )
    other = {"video": "audio", "audio": "video"}.get(job.model.modalities)
    if other is not None and blocks[other] is not None:
        yield Problem(
            "model.modalities",
            job.model.modalities,
            f'"auto" or "av", because the job has an [{other}] block',
            f"remove [{other}], or set model.modalities",
        )


def _data_rules(job: JobConfig) -> Iterator[Problem]:
    data = job.data
    if data.source == "precomputed":
        if data.root is None:
            yield Problem(
                "data.root",
                MISSING,
                "the folder of a preprocessed data set",
                'set it, or set data.source = "synthetic" for a benchmark',
            )
        elif not Path(data.root).is_dir():
            yield Problem("data.root", data.root, "a folder that exists", "correct the path, or preprocess the data")
        return
    if data.source == "media":
        yield from _media_rules(job)
    for name, block in (("video", job.video), ("audio", job.audio)):
        for index, condition in enumerate(block.conditions if block is not None else ()):
            if condition.type in ("mask", "reference"):
                yield Problem(
                    f"{name}.conditions[{index}].type",
                    condition.type,
                    f'a condition without files, because data.source = "{data.source}" has none',
                    'remove the condition, or set data.source = "precomputed"',
                )


def _media_rules(job: JobConfig) -> Iterator[Problem]:
    media = job.data.media
    for key, remedy in (
        ("dataset_path", "set it to the table of clips and captions"),
        ("text_encoder_path", "set it to a folder of Gemma 3, or to the packed text encoder of LTX-2.5"),
        ("resolution_buckets", 'set it to the shapes that clips are brought to, as in "768x448x89"'),
    ):
        if getattr(media, key) is None:
            yield Problem(f"data.media.{key}", MISSING, 'a value, because data.source = "media"', remedy)
    for key in ("dataset_path", "video_vae_path", "audio_vae_path"):
        if (path := getattr(media, key)) is not None:
            yield from _must_be_file(f"data.media.{key}", path)
    if media.text_encoder_path is not None and not Path(media.text_encoder_path).exists():
        yield Problem("data.media.text_encoder_path", media.text_encoder_path, "a path that exists", "correct it")
    if job.model.init == "random":
        yield Problem(
            "model.init",
            "random",
            '"checkpoint" with data.source = "media", whose encoders go with a checkpoint',
            'set model.checkpoint_path, or set data.source = "synthetic"',
        )
    if job.video is None:
        yield Problem(
            "data.source",
            "media",
            '"precomputed" for a job without [video]: latents of audio are small enough to keep',
            "prepare the data with ltx-titan process-dataset",
        )


def _parameter_rules(job: JobConfig) -> Iterator[Problem]:
    for section_name, owners in OWNERS.items():
        section = getattr(job, section_name)
        for parameter, names in owners.items():
            if parameter in section.model_fields_set and section.name not in names:
                yield Problem(
                    f"{section_name}.{parameter}",
                    getattr(section, parameter),
                    f'unset, because {section_name}.name = "{section.name}" has no such parameter',
                    f"remove it, or set {section_name}.name to {' or '.join(sorted(names))}",
                )
    if job.sigma.min_value >= job.sigma.max_value:
        yield Problem(
            "sigma.min_value",
            job.sigma.min_value,
            f"less than sigma.max_value = {job.sigma.max_value}",
            "lower it, or raise sigma.max_value",
        )


def _step_rules(job: JobConfig) -> Iterator[Problem]:
    training, scheduler = job.training, job.scheduler
    if training.stop_at is not None and training.stop_at > training.steps:
        yield Problem(
            "training.stop_at",
            training.stop_at,
            f"at most training.steps = {training.steps}",
            "lower it, or raise training.steps",
        )
    decay = (scheduler.decay_steps or 0) if scheduler.name == "wsd" else 0
    if scheduler.warmup_steps + decay >= training.steps + (1 if decay else 0):
        yield Problem(
            "scheduler.warmup_steps",
            scheduler.warmup_steps,
            f"warm-up{' and decay_steps = ' + str(decay) if decay else ''} to fit training.steps = {training.steps}",
            "shorten it, or raise training.steps",
        )


def _batch_rules(job: JobConfig) -> Iterator[Problem]:
    parallelism = job.parallelism
    if parallelism.dp_shard == 0:
        yield Problem("parallelism.dp_shard", 0, "-1 (the rest) or at least 1", "set it to -1")
        return
    dp = parallelism.dp_replicate * max(parallelism.dp_shard, 1)
    fits = True
    for problem in _batch_fit(job, dp):
        fits = False
        yield problem
    # With dp_shard = -1 there may be more ranks, hence fewer micro-batches: `check_world` decides.
    if fits and parallelism.dp_shard > 0:
        yield from _accumulation_problems(job, dp)


def _single_rules(job: JobConfig) -> Iterator[Problem]:
    recompute = job.activation_checkpoint
    if recompute.mode == "every_k" and recompute.k is None:
        yield Problem(
            "activation_checkpoint.k", MISSING, 'a number, because mode = "every_k"', "set it, for example to 2"
        )
    if recompute.mode != "every_k" and recompute.k is not None:
        yield Problem(
            "activation_checkpoint.k",
            recompute.k,
            f'unset, because activation_checkpoint.mode = "{recompute.mode}"',
            'remove it, or set activation_checkpoint.mode = "every_k"',
        )
    if job.checkpoint.keep_last == 0:
        yield Problem("checkpoint.keep_last", 0, "-1 (keep all) or at least 1", "set it to 1 or more")
    start = job.profiling.trace_start
    steps = job.training.steps
    if start is not None and start > steps:
        yield Problem("profiling.trace_start", start, f"at most training.steps = {steps}", "start the trace earlier")


def _validation_rules(job: JobConfig) -> Iterator[Problem]:
    if job.validation.use_ema and job.optimizer.ema_decay is None:
        yield Problem(
            "validation.use_ema",
            True,
            "averaged weights, but optimizer.ema_decay is unset",
            "set optimizer.ema_decay, for example to 0.999, or remove it",
        )


def _wandb_rules(job: JobConfig) -> Iterator[Problem]:
    metrics = job.metrics
    if metrics.wandb == "off":
        for key, field in type(metrics).model_fields.items():
            if key.startswith("wandb_") and (value := getattr(metrics, key)) != field.default:
                remedy = 'set metrics.wandb to "online" or "offline", or remove it'
                yield Problem(f"metrics.{key}", value, 'unset while metrics.wandb = "off"', remedy)
        return
    # A folder of that name, such as W&B itself writes, has a spec without an origin.
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        yield Problem(
            "metrics.wandb", metrics.wandb, "the package wandb, which is not installed", 'install "ltx-titan[wandb]"'
        )
    elif metrics.wandb == "online":
        import wandb

        # Without a request: a node may have no network until the job runs.
        if not wandb.login(prompt=False, verify=False):
            remedy = 'run `wandb login`, set WANDB_API_KEY, or set it to "offline"'
            yield Problem("metrics.wandb", metrics.wandb, "credentials of Weights & Biases on this machine", remedy)


def _clipping_rules(job: JobConfig) -> Iterator[Problem]:
    if job.optimizer.in_backward and job.training.max_grad_norm > 0:
        yield Problem(
            "training.max_grad_norm",
            job.training.max_grad_norm,
            "0 with optimizer.in_backward = true, which frees gradients before their norm is known",
            "set it to 0, or set optimizer.in_backward = false",
        )


def _accumulation_problems(job: JobConfig, dp: int) -> Iterator[Problem]:
    """An update in the backward pass sees one micro-batch; `dp` is the number of data-parallel ranks."""
    training = job.training
    micro_batches = training.global_batch_size // (training.local_batch_size * dp)
    if job.optimizer.in_backward and micro_batches > 1:
        yield Problem(
            "optimizer.in_backward",
            True,
            "one micro-batch per step, because gradients are freed instead of accumulated; found global_batch_size / "
            f"(local_batch_size x data-parallel ranks) = {training.global_batch_size} / ({training.local_batch_size} "
            f"x {dp}) = {micro_batches}",
            f"set training.local_batch_size = {training.global_batch_size // dp}, lower training.global_batch_size, "
            "or set optimizer.in_backward = false",
        )


def _batch_fit(job: JobConfig, dp: int) -> Iterator[Problem]:
    """At least `dp` data-parallel ranks, each with micro-batches of `local_batch_size`, must fill the global batch."""
    training = job.training
    unit = training.local_batch_size * dp
    if training.global_batch_size % unit:
        rounded = -(-training.global_batch_size // unit) * unit
        yield Problem(
            "training.global_batch_size",
            training.global_batch_size,
            f"a multiple of local_batch_size x data-parallel ranks = {training.local_batch_size} x {dp} = {unit}",
            f"set it to {rounded}, or change training.local_batch_size or the parallelism",
        )


_RULES: tuple[Callable[[JobConfig], Iterator[Problem]], ...] = (
    _model_rules,
    _stream_rules,
    _data_rules,
    _parameter_rules,
    _step_rules,
    _batch_rules,
    _clipping_rules,
    _single_rules,
    _validation_rules,
    _wandb_rules,
)


def check_world(job: JobConfig, world_size: int) -> Degrees:
    """Resolves `parallelism.dp_shard = -1` and checks that mesh and batch fit `world_size` ranks.

    Raises:
        ConfigError: the degrees do not multiply to `world_size`, or the batch does not divide; with the arithmetic.
    """
    asked = job.parallelism
    others = asked.dp_replicate * asked.cp * asked.tp
    terms = f"dp_replicate x cp x tp = {asked.dp_replicate} x {asked.cp} x {asked.tp} = {others}"
    dp_shard = asked.dp_shard
    if dp_shard == -1:
        if world_size % others:
            raise ConfigError(
                [
                    Problem(
                        "parallelism.dp_shard",
                        -1,
                        f"{terms} to divide the {world_size} ranks of this run",
                        "change these degrees or the number of ranks",
                    )
                ]
            )
        dp_shard = world_size // others
    elif dp_shard * others != world_size:
        raise ConfigError(
            [
                Problem(
                    "parallelism.dp_shard",
                    dp_shard,
                    f"dp_shard x {terms} to give {world_size} ranks, not {dp_shard} x {others} = {dp_shard * others}",
                    f"set parallelism.dp_shard = -1, or start {dp_shard * others} ranks",
                )
            ]
        )
    degrees = Degrees(asked.dp_replicate, dp_shard, asked.cp, asked.tp)
    if problems := list(_batch_fit(job, degrees.dp)) or list(_accumulation_problems(job, degrees.dp)):
        raise ConfigError(problems)
    return degrees
