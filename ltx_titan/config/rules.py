"""Rules between the fields of a job.

A section checks its own fields; a rule here checks fields against each other. Rules yield problems instead of raising,
so that all of them are reported at once. `world.py` holds the rules that need the number of ranks, `data_rules.py` and
`validation_rules.py` those of these sections, `effect.py` what is set without having an effect.
"""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

from ltx_titan.config.base import StreamName
from ltx_titan.config.data_rules import data_rules
from ltx_titan.config.effect import effect_rules
from ltx_titan.config.errors import MISSING, Problem, must_be_file
from ltx_titan.config.job import RELEASED_SHAPES, JobConfig
from ltx_titan.config.streams import AudioSection, VideoSection
from ltx_titan.config.validation_rules import keep_best_rules, validation_rules
from ltx_titan.config.world import batch_problems

# Muon updates by AdamW what is no matrix.
_WITH_MOMENTS = frozenset({"adamw", "adamw8bit", "adamw4bit", "adamw_schedulefree", "prodigy", "muon"})
PARAMETER_OWNERS: dict[str, dict[str, frozenset[str]]] = {
    "sigma": {
        "shift": frozenset({"shifted_logit_normal"}),
        "std": frozenset({"shifted_logit_normal"}),
        "eps": frozenset({"shifted_logit_normal"}),
        "uniform_prob": frozenset({"shifted_logit_normal"}),
        "min_value": frozenset({"uniform"}),
        "max_value": frozenset({"uniform"}),
    },
    "loss": {"huber_delta": frozenset({"huber"})},
    "optimizer": {
        "d_coef": frozenset({"prodigy"}),
        "momentum": frozenset({"muon"}),
        "betas": _WITH_MOMENTS,
        "eps": _WITH_MOMENTS,
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
"""Parameters that only some values of their section's `name` use: section -> parameter -> names."""
# With `loss.weighting = "sigma_sqrt"`: below it one sample would weigh as much as 400 at sigma 1.
_LOWEST_WEIGHTED = 0.05


def rule_problems(job: JobConfig) -> list[Problem]:
    """All contradictions between the fields of `job`; empty for a valid job."""
    return [problem for rule in _RULES for problem in rule(job)]


def _loss_rules(job: JobConfig) -> Iterator[Problem]:
    weights = {"video": job.loss.video_weight, "audio": job.loss.audio_weight}
    streams: tuple[tuple[StreamName, VideoSection | AudioSection | None], ...]
    streams = (("video", job.video), ("audio", job.audio))
    generated = [name for name, stream in streams if stream is not None and stream.is_generated]
    if generated and not any(weights[name] for name in generated):
        yield Problem(
            f"loss.{generated[0]}_weight",
            0.0,
            f"a weight above 0 for a generated stream ({', '.join(generated)}), or the loss is 0 in every step",
            "raise it, or remove it",
        )
    if job.loss.weighting != "min_snr" and job.loss.snr_gamma != type(job.loss).model_fields["snr_gamma"].default:
        yield Problem(
            "loss.snr_gamma",
            job.loss.snr_gamma,
            f'unset, because loss.weighting = "{job.loss.weighting}" has no such parameter',
            'remove it, or set loss.weighting = "min_snr"',
        )
    yield from _sigma_rules(job, generated)


def _sigma_rules(job: JobConfig, generated: list[StreamName]) -> Iterator[Problem]:
    sigma = job.sigma
    bounds = (sigma.min_value, sigma.max_value) if sigma.name == "uniform" else (0.0, 1.0)
    for stream in generated:
        low, high = sigma.range_of(stream)
        if max(low, bounds[0]) >= min(high, bounds[1]):
            yield Problem(
                f"sigma.{stream}_min",
                low,
                f"less than sigma.{stream}_max = {high}, with sigmas between {bounds[0]} and {bounds[1]} left",
                f"lower it, or raise sigma.{stream}_max",
            )
        floor = sigma.eps if sigma.name == "shifted_logit_normal" else bounds[0]
        if job.loss.weighting == "sigma_sqrt" and sigma.name != "distilled" and max(low, floor) < _LOWEST_WEIGHTED:
            yield Problem(
                f"sigma.{stream}_min",
                low,
                f'at least {_LOWEST_WEIGHTED} with loss.weighting = "sigma_sqrt", whose factor is 1 / sigma^2',
                "raise it, for example to 0.1, or choose another loss.weighting",
            )


def _preservation_rules(job: JobConfig) -> Iterator[Problem]:
    preservation = job.preservation
    for part in preservation.parts:
        weight = getattr(preservation, f"{part}_weight")
        if job.model.mode != "lora":
            yield Problem(
                f"preservation.{part}_weight",
                weight,
                '0 with model.mode = "full", which keeps no base to compare with',
                'remove it, or set model.mode = "lora"',
            )
    if preservation.blank_prompt_weight > 0 and job.optimizer.in_backward:
        yield Problem(
            "preservation.blank_prompt_weight",
            preservation.blank_prompt_weight,
            "0 with optimizer.in_backward = true, which updates the weights after each of its two backward passes",
            "remove it, or set optimizer.in_backward = false",
        )


def _float8_rules(job: JobConfig) -> Iterator[Problem]:
    if job.float8.recipe == "native" and job.training.dtype != "bfloat16":
        yield Problem(
            "float8.recipe",
            "native",
            f'training.dtype = "bfloat16", which its float8 matmuls write; found "{job.training.dtype}"',
            'set training.dtype = "bfloat16", or float8.recipe = "none"',
        )
    if job.float8.skip_blocks and job.float8.recipe == "none":
        yield Problem(
            "float8.skip_blocks", job.float8.skip_blocks, "a float8.recipe", "set float8.recipe, or remove it"
        )
    if job.float8.all_gather and job.float8.recipe != "tensorwise":
        yield Problem(
            "float8.all_gather",
            True,
            f'float8.recipe = "tensorwise", which alone can gather weights in float8; found "{job.float8.recipe}"',
            'set float8.recipe = "tensorwise", or remove it',
        )
    if job.model.mode == "lora" and job.lora.float8_matmuls == "on":
        for key, wanted, found in (
            ("lora.base_dtype", "float8", job.lora.base_dtype),
            ("training.dtype", "bfloat16", job.training.dtype),
        ):
            if found != wanted:
                expected = f'{key} = "{wanted}"; found "{found}"'
                yield Problem("lora.float8_matmuls", "on", expected, f'set {key} = "{wanted}", or it to "auto"')


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
            yield from must_be_file("model.checkpoint_path", model.checkpoint_path)
        # Refused rather than ignored: the file defines the architecture, and a reader would believe the job.
        for key in ("shape", "num_layers"):
            if (value := getattr(model, key)) is not None:
                yield Problem(
                    f"model.{key}",
                    value,
                    'unset with model.init = "checkpoint", whose file defines the shape',
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
        yield from must_be_file("model.adapter_path", model.adapter_path)
        if model.mode != "lora":
            yield Problem("model.adapter_path", model.adapter_path, 'unset with model.mode = "full"', "remove it")
    if model.connectors_path is not None:
        yield from must_be_file("model.connectors_path", model.connectors_path)


def _stream_rules(job: JobConfig) -> Iterator[Problem]:
    blocks = {"video": job.video, "audio": job.audio}
    present = [name for name, block in blocks.items() if block is not None]
    if not any(block is not None and block.is_generated for block in blocks.values()):
        yield Problem(
            f"{present[0]}.is_generated" if present else "video",
            False if present else MISSING,
            "at least one of [video] and [audio] with is_generated = true",
            "set it to true, or add the other block" if present else "add [video] or [audio] with is_generated = true",
        )
    weights = {
        name: getattr(job.loss, f"{name}_weight")
        for name, block in blocks.items()
        if block is not None and block.is_generated
    }
    if weights and not any(weights.values()):
        yield Problem(
            f"loss.{next(iter(weights))}_weight",
            0.0,
            "above 0 for at least one generated stream, or nothing is trained",
            "raise it",
        )
    other = {"video": "audio", "audio": "video"}.get(job.model.modalities)
    # A stream that is not built cannot be trained or attended to.
    if other is not None and blocks[other] is not None:
        yield Problem(
            "model.modalities",
            job.model.modalities,
            f'"auto" or "av", because the job has an [{other}] block',
            f"remove [{other}], or set model.modalities",
        )


def _parameter_rules(job: JobConfig) -> Iterator[Problem]:
    for section_name, owners in PARAMETER_OWNERS.items():
        section = getattr(job, section_name)
        for parameter, names in owners.items():
            # Only what the job sets: every parameter has a value, and most do not belong to the chosen name. Jobs that
            # earlier versions have resolved spell out those of all optimizers, at their defaults.
            default = type(section).model_fields[parameter].get_default(call_default_factory=True)
            is_resolved = section_name == "optimizer" and getattr(section, parameter) == default
            if parameter in section.model_fields_set and section.name not in names and not is_resolved:
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
    # Without a decay at least one step must follow the warmup; a decay may follow it directly.
    if scheduler.warmup_steps + decay > training.steps - (0 if decay else 1):
        limit = f"training.steps = {training.steps}" + (f" minus decay_steps = {decay}" if decay else "")
        yield Problem(
            "scheduler.warmup_steps",
            scheduler.warmup_steps,
            f"warmup to fit into {limit}",
            "lower it, or raise training.steps",
        )


def _batch_rules(job: JobConfig) -> Iterator[Problem]:
    parallelism = job.parallelism
    # A bound in the section cannot exclude 0 between -1 and 1.
    if parallelism.dp_shard == 0:
        yield Problem("parallelism.dp_shard", 0, "-1 (all remaining ranks) or at least 1", "set it to -1")
        return
    dp = parallelism.dp_replicate * max(parallelism.dp_shard, 1)
    # With dp_shard = -1 the run may have more ranks, hence fewer micro-batches: `check_world` decides.
    yield from batch_problems(job, dp, is_exact=parallelism.dp_shard > 0)


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
    if recompute.mode != "budget" and recompute.memory_gib != "auto":
        yield Problem(
            "activation_checkpoint.memory_gib",
            recompute.memory_gib,
            f'unset, because activation_checkpoint.mode = "{recompute.mode}"',
            'remove it, or set activation_checkpoint.mode = "budget"',
        )
    # 0 reads as none or as all, so it is refused instead of interpreted.
    if job.checkpoint.keep_last == 0:
        yield Problem("checkpoint.keep_last", 0, "-1 (keep all) or at least 1", "set it to 1 or more")
    yield from keep_best_rules(job)
    start = job.profiling.trace_start
    steps = job.training.steps
    if start is not None and start > steps:
        yield Problem("profiling.trace_start", start, f"at most training.steps = {steps}", "lower it")


def _wandb_rules(job: JobConfig) -> Iterator[Problem]:
    metrics = job.metrics
    if metrics.wandb == "off":
        for key, field in type(metrics).model_fields.items():
            if key.startswith("wandb_") and (value := getattr(metrics, key)) != field.default:
                remedy = 'set metrics.wandb to "online" or "offline", or remove it'
                yield Problem(f"metrics.{key}", value, 'unset with metrics.wandb = "off"', remedy)
        return
    # A folder named wandb, such as W&B itself writes, is found as a namespace package: a spec without an origin.
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:
        yield Problem(
            "metrics.wandb",
            metrics.wandb,
            "the package wandb, which is not installed",
            "pip install 'ltx-titan[wandb]'",
        )
    elif metrics.wandb == "online":
        import wandb

        # Credentials are looked up, not verified: a login node may have no network.
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


def _schedule_free_rules(job: JobConfig) -> Iterator[Problem]:
    if job.optimizer.name != "adamw_schedulefree":
        return
    if job.scheduler.name != "constant":
        yield Problem(
            "scheduler.name",
            job.scheduler.name,
            '"constant" with optimizer.name = "adamw_schedulefree", whose average of the weights replaces the decay',
            "remove it, and keep scheduler.warmup_steps",
        )
    if importlib.util.find_spec("schedulefree") is None:
        yield Problem(
            "optimizer.name",
            job.optimizer.name,
            "the package schedulefree, which is not installed",
            "pip install 'ltx-titan[optimizers]'",
        )


def _weight_dtype_rules(job: JobConfig) -> Iterator[Problem]:
    key, dtype = "training.weight_dtype", job.training.weight_dtype
    if dtype == "float32":
        return
    if job.model.mode != "full":
        reason = 'float32 with model.mode = "lora", whose adapters are small; lora.base_dtype is that of the base'
        yield Problem(key, dtype, reason, "remove it")
    if job.training.dtype != dtype:
        reason = f'"{job.training.dtype}", the compute dtype: weights of lower precision gain nothing from it'
        yield Problem(key, dtype, reason, 'set training.dtype = "bfloat16", or remove it')
    if not job.optimizer.stochastic_rounding:
        reason = "optimizer.stochastic_rounding = true: at small learning rates most updates are below half a unit"
        yield Problem(key, dtype, reason, "set optimizer.stochastic_rounding = true, or remove it")


def _skipping_rules(job: JobConfig) -> Iterator[Problem]:
    training = job.training
    if training.spike_factor is None:
        return
    if job.optimizer.in_backward:
        yield Problem(
            "training.spike_factor",
            training.spike_factor,
            "no value with optimizer.in_backward = true, which updates the weights before a spike is known",
            "remove it, or set optimizer.in_backward = false",
        )
    elif training.max_skipped_steps == 0:
        yield Problem(
            "training.spike_factor",
            training.spike_factor,
            "training.max_skipped_steps of at least 1, found 0, which skips nothing",
            "set training.max_skipped_steps, or remove it",
        )


def _stream_blocks_rules(job: JobConfig) -> Iterator[Problem]:
    key, wanted, parallelism = "parallelism.stream_blocks", job.parallelism.stream_blocks, job.parallelism
    if wanted == 0:
        return
    if job.model.mode != "lora":
        reason = 'model.mode = "lora", because only frozen weights are streamed; found "full"'
        yield Problem(key, wanted, reason, "set it to 0; parallelism.cpu_offload keeps trained weights in host memory")
    for axis in ("tp", "cp"):
        if (degree := getattr(parallelism, axis)) > 1:
            reason = f"parallelism.{axis} = 1, because every rank streams whole blocks; found {degree}"
            yield Problem(key, wanted, reason, f"set it to 0, or parallelism.{axis} to 1")
    if parallelism.cpu_offload:
        yield Problem(
            key,
            wanted,
            "parallelism.cpu_offload = false, because both keep the weights in host memory",
            "set parallelism.cpu_offload = false: streaming copies ahead, and keeps the optimizer on the GPU",
        )
    # Streamed weights are not gathered by FSDP2, which casts all others to the compute dtype.
    base = "float32" if job.lora.base_dtype == "float32" else "bfloat16"
    if job.model.mode == "lora" and job.training.dtype != base:
        yield Problem(
            key,
            wanted,
            f'training.dtype = "{base}", the dtype of a base in {job.lora.base_dtype}; found "{job.training.dtype}"',
            f'set training.dtype = "{base}", or it to 0',
        )
    if job.float8.all_gather:
        yield Problem(
            key,
            wanted,
            "float8.all_gather = false, because streamed weights are not gathered",
            "set float8.all_gather = false",
        )


def _export_rules(job: JobConfig) -> Iterator[Problem]:
    checkpoint = job.checkpoint
    is_dora = job.model.mode == "lora" and job.lora.dora
    if is_dora and job.model.init == "random" and checkpoint.enable and checkpoint.export:
        yield Problem(
            "checkpoint.export",
            True,
            'false with lora.dora = true and model.init = "random": DoRA is exported merged into the base checkpoint, '
            "and there is none",
            "set it to false, or set lora.dora = false",
        )


_RULES: tuple[Callable[[JobConfig], Iterator[Problem]], ...] = (
    _model_rules,
    _stream_rules,
    data_rules,
    _parameter_rules,
    effect_rules,
    _step_rules,
    _batch_rules,
    _clipping_rules,
    _schedule_free_rules,
    _weight_dtype_rules,
    _loss_rules,
    _preservation_rules,
    _float8_rules,
    _skipping_rules,
    _export_rules,
    _stream_blocks_rules,
    _single_rules,
    validation_rules,
    _wandb_rules,
)
