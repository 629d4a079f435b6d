"""`ltx-titan import-config`: a job of the LTX Trainer (YAML) becomes one of ours (TOML).

What means something here is carried over, that trainer's defaults included, so that the job does what it did there. A
key without counterpart is named with the reason, an unknown key is refused, and the result is checked as `load_job`
would check it, except that model and data need not be on this machine.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from ltx_titan.commands.ltx_schema import LtxJob, Table, read_ltx_job
from ltx_titan.config.errors import MISSING, ConfigError, Problem, as_toml, nearest
from ltx_titan.config.job import JobConfig
from ltx_titan.config.load import build_job
from ltx_titan.lora.targets import PRESETS

DESCRIPTION = """Turn a job of the LTX Trainer (YAML) into one of ours (TOML).

Its defaults are carried over. Keys without counterpart are named on stderr with the reason; unknown ones are refused.

example:
  ltx-titan import-config i2v_lora.yaml -o i2v_lora.toml --ranks 4
"""

_HUB = "nothing is uploaded; the files to share are below export/"
_WITHOUT_COUNTERPART = {
    "acceleration.load_text_encoder_in_8bit": "the text encoder is not in memory while training",
    "checkpoints.save_training_state": "a checkpoint always holds all that an exact resume needs",
    **dict.fromkeys(("hub.push_to_hub", "hub.hub_model_id"), _HUB),
}
_BASE_DTYPES = {
    "int8-quanto": "int8",
    "int4-quanto": "int4",
    "int2-quanto": "int4",
    "fp8-quanto": "float8",
    "fp8uz-quanto": "float8",
}
# Parameter of a schedule or sampler -> our key; None has no counterpart.
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
_RESTARTS_ETA_MIN = 5e-5
_PARTS = ("all_attention", "video", "video_ffn", "audio", "audio_ffn", "audio_to_video", "video_to_audio")
_PATHS = ("model.checkpoint_path", "model.adapter_path", "data.root")
_OLDER_SAMPLES = (
    "prompts",
    "images",
    "reference_videos",
    "reference_downscale_factor",
    "include_reference_in_output",
)
_DEPRECATED_GUIDANCE = {"guidance_scale": "cfg_scale", "stg_scale": "stg_scale", "stg_mode": "stg_scale"}


@dataclass
class Imported:
    """A translated job.

    Attributes:
        job: section -> key -> value, as in a job file.
        notes: what could not be carried over, or means something slightly different; one line each.
    """

    job: dict[str, Table] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def put(self, key: str, value: Any) -> None:
        """Sets `section.key`."""
        section, name = key.split(".")
        self.job.setdefault(section, {})[name] = value

    def note(self, key: str, value: Any, reason: str) -> None:
        """Says what became of a key of the other trainer."""
        self.notes.append(f"{key} = {as_toml(value)}: {reason}")

    def toml(self) -> str:
        """The job file."""
        sections = [name for name in JobConfig.model_fields if name in self.job]
        return tomli_w.dumps({name: self.job[name] for name in sections})


def import_job(text: str, origin: str, ranks: int = 1) -> Imported:
    """Translates a job.

    Args:
        text: YAML of the LTX Trainer.
        origin: what errors call it.
        ranks: processes that the job was started with; its batch size counts per process.

    Raises:
        ConfigError: the text is no valid job, or the result would not be one.
    """
    source, result = read_ltx_job(text, origin), Imported()
    for key, reason in _WITHOUT_COUNTERPART.items():
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
    problems += _validation(source, result)
    if problems:
        raise ConfigError(Problem(p.key, p.found, p.expected, p.remedy, origin) for p in problems)
    _check(result, origin)
    return result


def _check(result: Imported, origin: str) -> None:
    """Refuses what `load_job` would, and notes files that are not on this machine."""
    try:
        build_job(result.job, origin)
    except ConfigError as error:
        elsewhere = [p for p in error.problems if p.key in (*_PATHS, "metrics.wandb") and p.found is not MISSING]
        if len(elsewhere) < len(error.problems):
            raise ConfigError(p for p in error.problems if p not in elsewhere) from None
        for problem in elsewhere:
            reason = "not on this machine" if problem.key in _PATHS else f"not on this machine: {problem.remedy}"
            result.note(problem.key, problem.found, reason)


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
        reason = "that trainer's full checkpoints lack the metadata and names that model.checkpoint_path needs"
        result.note("model.load_checkpoint", path, reason)
    elif not path.endswith(".safetensors"):
        result.note("model.load_checkpoint", path, "set model.adapter_path to the adapter file itself")
    else:
        result.put("model.adapter_path", path)
        if source.get("lora", "alpha") != source.get("lora", "rank"):
            reason = "read with strength 1, as inference does; that trainer multiplies it by alpha / rank"
            result.note("model.load_checkpoint", path, reason)


def _streams(source: LtxJob, result: Imported) -> Iterable[Problem]:
    """The two blocks; the older strategies are special cases of them."""
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
        result.note(f"{where}.name", strategy["name"], "references now also have a temporal factor, from their shapes")
    if (probability := strategy["first_frame_conditioning_p"]) > 0:
        conditions.append({"type": "first_frame", "probability": probability})
    result.job["video"] = {"is_generated": True, "latents_dir": "latents"}
    if conditions:
        result.job["video"]["conditions"] = conditions
    if strategy.get("with_audio"):
        result.job["audio"] = {"is_generated": True, "latents_dir": strategy["audio_latents_dir"]}
        result.note(f"{where}.name", strategy["name"], "video and audio now draw their noise levels independently")


def _lora(source: LtxJob, result: Imported) -> None:
    for key in ("rank", "alpha", "dropout"):
        result.put(f"lora.{key}", source.get("lora", key))
    result.put("lora.targets", _targets(source, result))
    form = source.get("acceleration", "quantization")
    if form is not None:
        result.put("lora.base_dtype", _BASE_DTYPES[form])
    if form == "int2-quanto":
        result.note("acceleration.quantization", form, 'there are no 2-bit weights here; lora.base_dtype = "int4"')
    if form == "fp8uz-quanto":
        result.note("acceleration.quantization", form, 'the e4m3fn format is used; lora.base_dtype = "float8"')


def _no_lora(source: LtxJob, result: Imported) -> Iterable[Problem]:
    for key, value in source.sections["lora"].items():
        result.note(f"lora.{key}", value, 'model.training_mode = "full" trains no adapters')
    if (form := source.get("acceleration", "quantization")) is not None:
        yield Problem("acceleration.quantization", form, 'unset, because model.training_mode = "full"', "remove it")


def _targets(source: LtxJob, result: Imported) -> list[str]:
    """Patterns mean the same here. Complete groups get their name; what the job's model lacks is left out."""
    patterns = list(dict.fromkeys(source.get("lora", "target_modules")))
    found = []
    for part in _PARTS:
        if set(PRESETS[part]) <= set(patterns):
            found.append(part)
            patterns = [pattern for pattern in patterns if pattern not in PRESETS[part]]
    absent = {"video", "audio"} - result.job.keys()
    kept = [target for target in [*found, *patterns] if not absent & _needed_streams(target)]
    for target in [*found, *patterns]:
        if target not in kept:
            reason = f"the job has no {' and '.join(sorted(absent))} block, so nothing of it would be trained"
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
    total = batch * get("gradient_accumulation_steps") * ranks
    result.put("training.steps", get("steps"))
    result.put("training.global_batch_size", total)
    result.put("training.local_batch_size", batch)
    result.put("training.max_grad_norm", max(get("max_grad_norm"), 0.0))
    result.put("optimizer.name", get("optimizer_type"))
    result.put("optimizer.lr", get("learning_rate"))
    result.put("scheduler.name", get("scheduler_type"))
    result.put("activation_checkpoint.mode", "full" if get("enable_gradient_checkpointing") else "none")
    reason = f"counts per process; training.global_batch_size = {total} is that of {ranks} (--ranks)"
    result.note("optimization.batch_size", batch, reason)
    yield from _scheduler(source, result)


def _scheduler(source: LtxJob, result: Imported) -> Iterable[Problem]:
    name, rate = source.get("optimization", "scheduler_type"), source.get("optimization", "learning_rate")
    known = _SCHEDULERS[name]
    parameters = dict(source.get("optimization", "scheduler_params"))
    if name == "cosine_with_restarts":
        parameters.setdefault("eta_min", _RESTARTS_ETA_MIN)
    for parameter, value in parameters.items():
        where = f"optimization.scheduler_params.{parameter}"
        if parameter not in (*known, "last_epoch"):
            yield Problem(where, value, f'a parameter of scheduler_type "{name}"', nearest(parameter, known))
            continue
        key = known.get(parameter)
        if key is None:
            result.note(where, value, "a schedule spans training.steps")
            continue
        number = _as_number(value)
        if number is None:
            yield Problem(where, value, "a number", "change it")
            continue
        if parameter == "eta_min":
            number = number / rate if rate > 0 else 1.0
            if number > 1:
                result.note(where, value, "above the learning rate; scheduler.min_factor = 1 keeps the rate as it is")
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
    """Seed, precision, data and checkpoints."""
    result.put("training.seed", source.get("", "seed"))
    precision = source.get("acceleration", "mixed_precision_mode")
    result.put("training.dtype", "float32" if precision == "no" else "bfloat16")
    if precision == "fp16":
        result.note("acceleration.mixed_precision_mode", precision, "bfloat16 is used, which cannot overflow")
    if precision is None:
        result.note("acceleration.mixed_precision_mode", precision, "no launcher decides here; bfloat16 is used")
    if (root := source.get("data", "preprocessed_data_root")) is not None:
        result.put("data.root", root)
    result.put("data.num_workers", source.get("data", "num_dataloader_workers"))
    keep = source.get("checkpoints", "keep_last_n")
    result.put("checkpoint.interval", source.get("checkpoints", "interval") or 0)
    result.put("checkpoint.keep_last", keep if keep > 0 else -1)
    result.put("checkpoint.export_dtype", source.get("checkpoints", "precision"))
    if source.get("checkpoints", "no_resume"):
        result.put("checkpoint.resume", False)


def _wandb(source: LtxJob, result: Imported) -> None:
    given = source.sections["wandb"]
    if not source.get("wandb", "enabled"):
        for key in given.keys() - {"enabled"}:
            result.note(f"wandb.{key}", given[key], "wandb.enabled is false")
        return
    result.put("metrics.wandb", "online")
    for key in ("project", "tags"):
        result.put(f"metrics.wandb_{key}", source.get("wandb", key))
    result.put("metrics.wandb_clips", source.get("wandb", "log_validation_videos"))
    if (entity := source.get("wandb", "entity")) is not None:
        result.put("metrics.wandb_entity", entity)


def _validation(source: LtxJob, result: Imported) -> Iterable[Problem]:
    """Samples and guidance. Without samples nothing is validated there, and the rest of the section is idle."""
    given = source.sections["validation"]
    table, problems = _validation_table(given)
    yield from problems
    for key in _OLDER_SAMPLES:
        if key in given and given.get("samples"):
            result.note(f"validation.{key}", given[key], "without effect there too, because there are samples")
        elif key in given and key not in ("prompts", "images") and given.get("reference_videos") is None:
            result.note(f"validation.{key}", given[key], "there are no reference_videos")
    if "samples" in table:
        table.setdefault("interval", source.get("validation", "interval"))
    elif table.get("interval") is not None:
        result.note("validation.interval", table.pop("interval"), "there are no samples to make")
    for stream in ("video", "audio"):
        key = f"generate_{stream}"
        if table.get(key) and stream not in result.job:
            result.note(f"validation.{key}", table.pop(key), f"the job has no {stream} block, so the model has none")
    for key in ("text_encoder_path", "video_vae_path", "audio_vae_path"):
        table[key] = source.sections["model"].get(key)
    if "offload_optimizer_during_validation" in source.sections["acceleration"]:
        table["offload_optimizer"] = source.sections["acceleration"]["offload_optimizer_during_validation"]
    for key, value in table.items():
        if value is not None:
            result.put(f"validation.{key}", value)


def _validation_table(given: Table) -> tuple[Table, list[Problem]]:
    """The keys of the section in their current form; older ones are replaced."""
    table = {key: value for key, value in given.items() if key not in (*_OLDER_SAMPLES, *_DEPRECATED_GUIDANCE)}
    problems = []
    for key, ending in _DEPRECATED_GUIDANCE.items():
        newer = [name for name in given if name.endswith(f"_{ending}")]
        if given.get(key) is not None and newer:
            expected = f"unset beside {' and '.join(newer)}"
            problems.append(Problem(f"validation.{key}", given[key], expected, "remove the older key"))
    if (scale := given.get("guidance_scale")) is not None:
        table |= {"video_cfg_scale": scale, "audio_cfg_scale": scale}
    if "stg_scale" in given or "stg_mode" in given:
        scale = given.get("stg_scale", 1.0)
        table |= {"video_stg_scale": scale, "audio_stg_scale": 0.0 if given.get("stg_mode") == "stg_v" else scale}
    if "stg_blocks" in table and table["stg_blocks"] is None:
        table["stg_blocks"] = "all"
    if not table.get("samples"):
        samples, wrong = _samples_of_prompts(given)
        problems += wrong
        table["samples"] = samples
    table["samples"] = [_sample(sample) for sample in table["samples"]]
    if not table["samples"]:
        del table["samples"]
    return table, problems


def _samples_of_prompts(given: Table) -> tuple[list[Table], list[Problem]]:
    prompts, problems = given.get("prompts", []), []
    samples: list[Table] = [{"prompt": prompt, "conditions": []} for prompt in prompts]
    for key in ("images", "reference_videos"):
        files = given.get(key)
        if files is None:
            continue
        if len(files) != len(prompts):
            expected = f"one for each of the {len(prompts)} prompts"
            problems.append(Problem(f"validation.{key}", files, expected, "make the lists equally long"))
        for sample, file in zip(samples, files, strict=False):
            if key == "images":
                sample["conditions"].append({"type": "first_frame", "image_or_video": file})
            else:
                reference = {"type": "reference", "video": file}
                reference["downscale_factor"] = given.get("reference_downscale_factor", 1)
                reference["include_in_output"] = given.get("include_reference_in_output", False)
                sample["conditions"].append(reference)
    return samples, problems


def _sample(sample: Table) -> Table:
    """A sample without its unset keys; its seed 0 means that of all samples."""
    kept = {key: value for key, value in sample.items() if value is not None}
    if kept.get("seed") == 0:
        del kept["seed"]
    if "conditions" in kept:
        conditions = [{k: v for k, v in c.items() if v is not None} for c in kept.pop("conditions")]
        kept |= {"conditions": conditions} if conditions else {}
    return kept


def _as_number(value: Any) -> float | None:
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", type=Path, metavar="FILE.yaml", help="job of the LTX Trainer")
    parser.add_argument("-o", "--output", type=Path, metavar="JOB.toml", help="where to write (default: stdout)")
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes that it was started with (default: 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Translates one file; the exit status."""
    if arguments.ranks < 1:
        raise ValueError(f"--ranks {arguments.ranks}: expected at least 1.")
    output: Path | None = arguments.output
    if output is not None and output.exists():
        raise ValueError(f"{output}: exists already; choose another name, or remove it.")
    imported = import_job(arguments.config.read_text(encoding="utf-8"), str(arguments.config), arguments.ranks)
    for note in imported.notes:
        print(f"{arguments.config}: {note}", file=sys.stderr)
    text = f"# Made from {arguments.config.name} by ltx-titan import-config.\n\n{imported.toml().rstrip()}\n"
    if output is None:
        print(text, end="")
        return 0
    temporary = output.with_name(f"{output.name}.tmp.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, output)
    print(f"wrote {output}", file=sys.stderr)
    return 0
