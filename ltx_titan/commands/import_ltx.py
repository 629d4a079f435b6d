"""`ltx-titan import-config`: converts a job of the LTX Trainer (YAML), or of another trainer, to ours (TOML).

Values are converted together with that trainer's defaults, so that the job trains the same. A key without equivalent
is reported with the reason, an unknown key of the LTX Trainer is an error, and the result is validated as by
`load_job`, except that model and data need not exist on this machine. `peers/` converts the other trainers'
files.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ltx_titan.commands.imported import Imported, check_job
from ltx_titan.commands.ltx_schema import LtxJob, read_ltx_job
from ltx_titan.commands.ltx_validation import OLDER_SAMPLES, validation_table
from ltx_titan.commands.peers import import_peer
from ltx_titan.common.files import write_text
from ltx_titan.common.options import Maybe, Positional, alias, placeholder
from ltx_titan.config.errors import ConfigError, Problem, nearest
from ltx_titan.lora.targets import PRESETS

DESCRIPTION = """Convert a job of another trainer to a job of ltx_titan (TOML).

Reads jobs of the LTX Trainer and of ai-toolkit (YAML), of musubi-tuner (--config_file or dataset TOML) and of
diffusion-pipe (job or dataset TOML), told apart by their keys. The defaults of that trainer are kept. Keys without
equivalent are listed on stderr with the reason; unknown keys too, except that those of the LTX Trainer are errors.

examples:
  ltx-titan import-config i2v_lora.yaml -o i2v_lora.toml --ranks 4
  ltx-titan import-config musubi_config.toml -o job.toml
"""

_WITHOUT_EQUIVALENT = {
    "acceleration.load_text_encoder_in_8bit": "the text encoder is not in memory during training",
    "checkpoints.save_training_state": "a checkpoint always contains the state for an exact resume",
}
_BASE_DTYPES = {
    "int8-quanto": "int8",
    "int4-quanto": "int4",
    # The next wider format that we have.
    "int2-quanto": "int4",
    "fp8-quanto": "float8",
    "fp8uz-quanto": "float8",
}
# Parameter of a schedule or sampler -> our key; None has no equivalent.
_SCHEDULERS: dict[str, dict[str, str | None]] = {
    "constant": {},
    "linear": {"start_factor": "start_factor", "end_factor": "end_factor", "total_iters": None},
    "cosine": {"eta_min": "min_factor", "T_max": None},
    "cosine_with_restarts": {"T_0": "restart_period", "T_mult": "restart_mult", "eta_min": "min_factor"},
    "polynomial": {"power": "power", "total_iters": None},
    "step": {"gamma": "gamma", "step_size": "step_size"},
}
_SAMPLERS = {"uniform": ("min_value", "max_value"), "shifted_logit_normal": ("std", "eps", "uniform_prob")}
_INTEGERS = ("restart_period", "restart_mult", "step_size")
# Default of the LTX Trainer, an absolute rate; ours is a fraction of the learning rate.
_RESTARTS_ETA_MIN = 5e-5
# Larger groups first, so that a job with all projections gets the one preset instead of several.
_PARTS = ("all_attention", "video", "video_ffn", "audio", "audio_ffn", "audio_to_video", "video_to_audio")


@dataclass(frozen=True)
class ImportOptions:
    """Options of `ltx-titan import-config`."""

    config: Annotated[Positional[Path], placeholder("FILE")]
    """Job of the LTX Trainer, ai-toolkit, musubi-tuner or diffusion-pipe."""

    output: Annotated[Maybe[Path], alias("-o"), placeholder("JOB.toml")] = None
    """File for the converted job. Default: standard output."""

    ranks: Annotated[int, placeholder("N")] = 1
    """Number of processes of the original job."""


def import_job(text: str, origin: str, ranks: int = 1) -> Imported:
    """Converts a job.

    Args:
        text: YAML of the LTX Trainer, or a file that `import_peer` recognizes.
        origin: path of the file, for errors and for the files that it names.
        ranks: number of processes of the original job, whose batch size is per process.

    Raises:
        ConfigError: the text is not a valid job, or the result is not.
    """
    if (peer := import_peer(text, origin, ranks)) is not None:
        return check_job(peer, origin)
    source, result = read_ltx_job(text, origin), Imported()
    # Only keys that the file sets: a note about a default would be noise.
    for key, reason in _WITHOUT_EQUIVALENT.items():
        section, name = key.split(".")
        if name in source.sections[section]:
            result.note(key, source.sections[section][name], reason)
    _model(source, result)
    problems = [*_streams(source, result), *_optimization(source, result, ranks), *_sigma(source, result)]
    if source.get("model", "training_mode") == "lora":
        _lora(source, result)
    else:
        problems += _no_lora(source, result)
    _training(source, result)
    _wandb(source, result)
    _hub(source, result)
    problems += _validation(source, result)
    if problems:
        raise ConfigError(Problem(p.key, p.found, p.expected, p.remedy, origin) for p in problems)
    return check_job(result, origin)


def _model(source: LtxJob, result: Imported) -> None:
    model = source.sections["model"]
    result.put("job.dump_folder", source.get("", "output_dir"))
    if "model_path" in model:
        result.put("model.checkpoint_path", model["model_path"])
    mode = source.get("model", "training_mode")
    result.put("model.mode", mode)
    if (path := model.get("load_checkpoint")) is None:
        return
    if mode == "full":
        reason = "full checkpoints of the LTX Trainer lack the metadata and names that model.checkpoint_path requires"
        result.note("model.load_checkpoint", path, reason)
    elif not path.endswith(".safetensors"):
        result.note("model.load_checkpoint", path, "set model.adapter_path to the adapter file itself")
    else:
        result.put("model.adapter_path", path)
        # Files store no alpha, and the LTX Trainer applies its own when it loads one.
        if source.get("lora", "alpha") != source.get("lora", "rank"):
            reason = "loaded with strength 1, as in inference; the LTX Trainer multiplies it by alpha / rank"
            result.note("model.load_checkpoint", path, reason)


def _streams(source: LtxJob, result: Imported) -> Iterable[Problem]:
    """Converts the strategy to [video] and [audio]; the older strategies are special cases of the flexible one."""
    strategy = source.strategy
    if strategy["name"] == "flexible":
        for stream in ("video", "audio"):
            if (block := strategy[stream]) is not None:
                conditions = [{k: v for k, v in c.items() if v is not None} for c in block["conditions"]]
                result.job[stream] = {**block, "conditions": conditions}
                if not conditions:
                    del result.job[stream]["conditions"]
        return
    where, conditions = "training_strategy", []
    if strategy["name"] == "video_to_video":
        if source.get("model", "training_mode") != "lora":
            yield Problem("model.training_mode", "full", '"lora" with the strategy video_to_video', "change either")
        conditions.append({"type": "reference", "latents_dir": strategy["reference_latents_dir"]})
        result.note(
            f"{where}.name", strategy["name"], "references also get a temporal factor, inferred from their shapes"
        )
    if (probability := strategy["first_frame_conditioning_p"]) > 0:
        conditions.append({"type": "first_frame", "probability": probability})
    result.job["video"] = {"is_generated": True, "latents_dir": "latents"}
    if conditions:
        result.job["video"]["conditions"] = conditions
    if strategy.get("with_audio"):
        result.job["audio"] = {"is_generated": True, "latents_dir": strategy["audio_latents_dir"]}
        result.note(f"{where}.name", strategy["name"], "video and audio draw their sigmas independently")


def _lora(source: LtxJob, result: Imported) -> None:
    for key in ("rank", "alpha", "dropout"):
        result.put(f"lora.{key}", source.get("lora", key))
    result.put("lora.targets", _targets(source, result))
    form = source.get("acceleration", "quantization")
    if form is not None:
        result.put("lora.base_dtype", _BASE_DTYPES[form])
    if form == "int2-quanto":
        result.note("acceleration.quantization", form, '2-bit weights are not supported; lora.base_dtype = "int4"')
    if form == "fp8uz-quanto":
        result.note("acceleration.quantization", form, 'float8 e4m3fn is used; lora.base_dtype = "float8"')


def _no_lora(source: LtxJob, result: Imported) -> Iterable[Problem]:
    for key, value in source.sections["lora"].items():
        result.note(f"lora.{key}", value, 'model.training_mode = "full" trains no adapters')
    if (form := source.get("acceleration", "quantization")) is not None:
        yield Problem("acceleration.quantization", form, 'unset, because model.training_mode = "full"', "remove it")


def _targets(source: LtxJob, result: Imported) -> list[str]:
    """Converts module patterns: complete groups become presets; patterns of absent streams are skipped with a note."""
    patterns = list(dict.fromkeys(source.get("lora", "target_modules")))
    found = []
    for part in _PARTS:
        if set(PRESETS[part]) <= set(patterns):
            found.append(part)
            patterns = [pattern for pattern in patterns if pattern not in PRESETS[part]]
    absent = {"video", "audio"} - result.job.keys()
    # A target of an absent stream matches no layer, which is an error in our jobs.
    kept = [target for target in [*found, *patterns] if not absent & _needed_streams(target)]
    for target in [*found, *patterns]:
        if target not in kept:
            reason = f"skipped: the job has no {' and '.join(sorted(absent))} section"
            result.note("lora.target_modules", target, reason)
    return kept


def _needed_streams(target: str) -> set[str]:
    if target.startswith(("audio_to_video", "video_to_audio")):
        return {"video", "audio"}
    if target.startswith("audio"):
        return {"audio"}
    return {"video"} if target.startswith(("video", "attn1", "attn2", "ff.")) else set()


def _optimization(source: LtxJob, result: Imported, ranks: int) -> Iterable[Problem]:
    def get(key: str) -> Any:
        return source.get("optimization", key)

    batch = get("batch_size")
    # Ours is the total, so that a job trains the same on any number of GPUs.
    total = batch * get("gradient_accumulation_steps") * ranks
    result.put("training.steps", get("steps"))
    result.put("training.global_batch_size", total)
    result.put("training.local_batch_size", batch)
    # 0 or less turns clipping off there, 0 here.
    result.put("training.max_grad_norm", max(get("max_grad_norm"), 0.0))
    result.put("optimizer.name", get("optimizer_type"))
    result.put("optimizer.lr", get("learning_rate"))
    result.put("scheduler.name", get("scheduler_type"))
    result.put("activation_checkpoint.mode", "full" if get("enable_gradient_checkpointing") else "none")
    reason = f"is per process; training.global_batch_size = {total} is the total of {ranks} (--ranks)"
    result.note("optimization.batch_size", batch, reason)
    if ranks > 1 and get("scheduler_type") != "constant":
        # Accelerate steps the schedule once per process in each optimizer step.
        reason = f"ended after 1/{ranks} of the steps on {ranks} processes; here it spans training.steps"
        result.note("optimization.scheduler_type", get("scheduler_type"), reason)
    yield from _scheduler(source, result)


def _scheduler(source: LtxJob, result: Imported) -> Iterable[Problem]:
    name, rate = source.get("optimization", "scheduler_type"), source.get("optimization", "learning_rate")
    known = _SCHEDULERS[name]
    parameters = dict(source.get("optimization", "scheduler_params"))
    if name == "cosine_with_restarts":
        parameters.setdefault("eta_min", _RESTARTS_ETA_MIN)
    for parameter, value in parameters.items():
        where = f"optimization.scheduler_params.{parameter}"
        # `last_epoch` is a resume detail of torch's schedulers, so it is noted and not an error.
        if parameter not in (*known, "last_epoch"):
            yield Problem(where, value, f'a parameter of scheduler_type "{name}"', nearest(parameter, known))
            continue
        key = known.get(parameter)
        if key is None:
            result.note(where, value, "a schedule always spans training.steps")
            continue
        number = _as_number(value)
        if number is None:
            yield Problem(where, value, "a number", "change it")
            continue
        if parameter == "eta_min":
            number = number / rate if rate > 0 else 1.0
            if number > 1:
                result.note(where, value, "above the learning rate; scheduler.min_factor = 1 keeps the rate constant")
                number = 1.0
        result.put(f"scheduler.{key}", int(number) if key in _INTEGERS else float(number))


def _sigma(source: LtxJob, result: Imported) -> Iterable[Problem]:
    name = source.get("flow_matching", "timestep_sampling_mode")
    result.put("sigma.name", name)
    for parameter, value in source.get("flow_matching", "timestep_sampling_params").items():
        where = f"flow_matching.timestep_sampling_params.{parameter}"
        number = _as_number(value)
        if parameter not in _SAMPLERS[name]:
            yield Problem(where, value, f'a parameter of the sampler "{name}"', nearest(parameter, _SAMPLERS[name]))
        elif number is None:
            yield Problem(where, value, "a number", "change it")
        else:
            result.put(f"sigma.{parameter}", float(number))


def _training(source: LtxJob, result: Imported) -> None:
    """Converts seed, precision, data and checkpoints."""
    result.put("training.seed", source.get("", "seed"))
    precision = source.get("acceleration", "mixed_precision_mode")
    result.put("training.dtype", "float32" if precision == "no" else "bfloat16")
    if precision == "fp16":
        result.note("acceleration.mixed_precision_mode", precision, "bfloat16 is used, which needs no loss scaling")
    if precision is None:
        result.note("acceleration.mixed_precision_mode", precision, "bfloat16 is used; no launcher sets it")
    if (root := source.get("data", "preprocessed_data_root")) is not None:
        result.put("data.root", root)
    result.put("data.num_workers", source.get("data", "num_dataloader_workers"))
    keep = source.get("checkpoints", "keep_last_n")
    # null there means the final checkpoint only. Its checkpoints are weights to sample with: exports here.
    interval = source.get("checkpoints", "interval") or 0
    result.put("checkpoint.interval", interval)
    result.put("checkpoint.export_interval", interval)
    # -1 and 0 both keep everything there.
    result.put("checkpoint.keep_last", keep if keep > 0 else -1)
    result.put("checkpoint.export_dtype", source.get("checkpoints", "precision"))
    if source.get("checkpoints", "no_resume"):
        result.put("checkpoint.resume", False)


def _hub(source: LtxJob, result: Imported) -> None:
    hub = source.sections["hub"]
    repo = source.get("hub", "hub_model_id")
    if source.get("hub", "push_to_hub") and repo is not None:
        result.put("hub.repo", repo)
        result.note("hub.push_to_hub", True, "is uploaded once, at the end; set HF_TOKEN, and hub.private as you wish")
    elif "hub_model_id" in hub:
        result.note("hub.hub_model_id", repo, "hub.push_to_hub is false")


def _wandb(source: LtxJob, result: Imported) -> None:
    wandb = source.sections["wandb"]
    if not source.get("wandb", "enabled"):
        for key in wandb.keys() - {"enabled"}:
            result.note(f"wandb.{key}", wandb[key], "wandb.enabled is false")
        return
    result.put("metrics.wandb", "online")
    for key in ("project", "tags"):
        result.put(f"metrics.wandb_{key}", source.get("wandb", key))
    result.put("metrics.wandb_clips", source.get("wandb", "log_validation_videos"))
    if (entity := source.get("wandb", "entity")) is not None:
        result.put("metrics.wandb_entity", entity)


def _validation(source: LtxJob, result: Imported) -> Iterable[Problem]:
    """Converts samples and guidance. Without samples the LTX Trainer does not validate."""
    section = source.sections["validation"]
    table, problems = validation_table(section)
    yield from problems
    for key in OLDER_SAMPLES:
        if key in section and section.get("samples"):
            result.note(f"validation.{key}", section[key], "had no effect, because samples are set")
        elif key in section and key not in ("prompts", "images") and section.get("reference_videos") is None:
            result.note(f"validation.{key}", section[key], "had no effect, because reference_videos is unset")
    if "samples" in table:
        # Only with samples: that trainer's default of 100 steps has no effect without any.
        table.setdefault("interval", source.get("validation", "interval"))
    elif table.get("interval") is not None:
        result.note("validation.interval", table.pop("interval"), "had no effect, because there are no samples")
    for stream in ("video", "audio"):
        key = f"generate_{stream}"
        if table.get(key) and stream not in result.job:
            result.note(
                f"validation.{key}",
                table.pop(key),
                f"the job has no {stream} section",
            )
    for key in ("text_encoder_path", "video_vae_path", "audio_vae_path"):
        table[key] = source.sections["model"].get(key)
    if "offload_optimizer_during_validation" in source.sections["acceleration"]:
        table["offload_optimizer"] = source.sections["acceleration"]["offload_optimizer_during_validation"]
    for key, value in table.items():
        if value is not None:
            result.put(f"validation.{key}", value)


def _as_number(value: Any) -> float | None:
    try:
        # A bool is an int to Python.
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def run(options: ImportOptions) -> int:
    """Converts one file; returns the exit status.

    Raises:
        ValueError: `--ranks` is less than 1, or the output exists.
        ConfigError: as `import_job`.
    """
    if options.ranks < 1:
        raise ValueError(f"--ranks {options.ranks}: expected at least 1.")
    # The user may have edited an earlier conversion.
    if options.output is not None and options.output.exists():
        raise ValueError(f"{options.output}: exists already; choose another name or remove it.")
    imported = import_job(options.config.read_text(encoding="utf-8"), str(options.config), options.ranks)
    for note in imported.notes:
        print(f"{options.config}: {note}", file=sys.stderr)
    text = f"# Converted from {options.config.name} by ltx-titan import-config.\n{imported.text().rstrip()}\n"
    if options.output is None:
        print(text, end="")
        return 0
    write_text(options.output, text)
    print(f"wrote {options.output}", file=sys.stderr)
    return 0
