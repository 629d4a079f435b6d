"""Converts files of musubi-tuner: arguments in a `--config_file`, and datasets, both TOML."""

import re
from typing import Any

from ltx_titan.commands.ltx_schema import Table
from ltx_titan.commands.peers.conversion import (
    CHOSEN,
    EPOCHS,
    FROZEN_TEXT,
    HANDLED,
    ONE_BUCKET,
    STREAM_BLOCKS,
    Conversion,
    Rule,
    To,
    buckets_of,
    flag,
    integer,
    is_ltx2,
    multiple_of_32,
    number,
    shapes_of_area,
)

_ATTENTION = ("sdpa", "flash_attn", "flash3", "sage_attn", "xformers", "split_attn")
_ARGUMENTS: dict[str, Rule] = {
    **dict.fromkeys(("dit", "ltx2_checkpoint", "task", "dataset_config", "output_dir", "output_name"), HANDLED),
    **dict.fromkeys(("network_module", "network_dim", "network_alpha", "learning_rate", "optimizer_type"), HANDLED),
    **dict.fromkeys(("optimizer_args", "lr_scheduler", "lr_warmup_steps", "lr_scheduler_power"), HANDLED),
    **dict.fromkeys(("lr_scheduler_min_lr_ratio", "gradient_accumulation_steps", "timestep_sampling"), HANDLED),
    **dict.fromkeys(("discrete_flow_shift", "sigmoid_scale", "weighting_scheme", "logit_mean", "logit_std"), HANDLED),
    **dict.fromkeys(("sample_prompts", "sample_every_n_steps", "sample_at_first", "fp8_base", "fp8_scaled"), HANDLED),
    **dict.fromkeys(("log_with", "preserve_distribution_shape", "general", "datasets"), HANDLED),
    "network_dropout": To("lora.dropout", number),
    "network_weights": To("model.adapter_path", str),
    "max_train_steps": To("training.steps", integer),
    "max_grad_norm": To("training.max_grad_norm", number),
    "seed": To("training.seed", integer),
    "mixed_precision": To("training.dtype", lambda name: "float32" if name == "no" else "bfloat16"),
    "gradient_checkpointing": To("activation_checkpoint.mode", lambda on: "full" if flag(on) else "none"),
    "gradient_checkpointing_cpu_offload": To("activation_checkpoint.offload", flag),
    "save_every_n_steps": To("checkpoint.interval", integer),
    "max_data_loader_n_workers": To("data.num_workers", integer),
    "min_timestep": To("sigma.video_min", lambda step: number(step) / 1000),
    "max_timestep": To("sigma.video_max", lambda step: number(step) / 1000),
    **dict.fromkeys(_ATTENTION, f"the attention kernel {CHOSEN}"),
    **dict.fromkeys(("max_train_epochs", "save_every_n_epochs", "sample_every_n_epochs"), EPOCHS),
    **dict.fromkeys(("save_last_n_epochs", "save_last_n_steps"), "set checkpoint.keep_last"),
    **dict.fromkeys(("save_state", "save_state_on_train_end"), "a checkpoint always contains the state"),
    "resume": "a job resumes from the newest checkpoint of job.dump_folder",
    "save_precision": "exports are bfloat16; see checkpoint.export_dtype",
    "network_args": "set lora.targets or [[lora.ranks]] to the adapted layers",
    "dim_from_weights": "set lora.rank to that of the file",
    "scale_weight_norms": "is not supported; lower optimizer.lr or set optimizer.weight_decay",
    "base_weights": "merge them into the checkpoint first",
    "blocks_to_swap": STREAM_BLOCKS,
    "persistent_data_loader_workers": "samples are read by threads, which persist",
    **dict.fromkeys(("vae", "vae_dtype", "vae_tiling", "vae_chunk_size"), "see validation.video_vae_path"),
    **dict.fromkeys(("text_encoder", "text_encoder1", "text_encoder2", "t5", "clip", "fp8_t5", "fp8_llm"), FROZEN_TEXT),
    **dict.fromkeys(("gemma_root", "gemma_load_in_8bit"), FROZEN_TEXT),
    "guidance_scale": "LTX-2 has no guidance embedding",
    **dict.fromkeys(("mode_scale", "num_timestep_buckets"), "see [sigma] for the distribution of sigmas"),
    **dict.fromkeys(("logging_dir", "log_prefix", "wandb_run_name", "log_tracker_name"), "set [metrics]"),
    **dict.fromkeys(("compile", "dynamo_backend"), "set compile.enable"),
    **dict.fromkeys(("training_comment", "metadata_title", "metadata_author"), "set job.description"),
    **dict.fromkeys(("huggingface_repo_id", "huggingface_token"), "set hub.repo and HF_TOKEN"),
}
_GENERAL: dict[str, Rule] = {
    **dict.fromkeys(("resolution", "batch_size", "num_repeats", "enable_bucket", "caption_extension"), HANDLED),
    "bucket_no_upscale": "process-dataset --max-enlargement rejects clips that would be enlarged",
}
_DATASET: dict[str, Rule] = {
    **_GENERAL,
    **dict.fromkeys(("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file"), HANDLED),
    **dict.fromkeys(("target_frames", "frame_extraction", "frame_stride", "frame_sample", "max_frames"), HANDLED),
    "cache_directory": "samples are prepared into data.sources.root",
    "source_fps": "videos state their rate, which the model receives; process-dataset --fps resamples them",
    "control_directory": "prepare references and add a [[video.conditions]] of type reference",
    "multiple_target": "is an option of Qwen-Image-Layered",
}
_PATHS = ("video_directory", "image_directory", "video_jsonl_file", "image_jsonl_file")
_LOSS_WEIGHTS = ("sigma_sqrt", "cosmap")
_PROMPT_OPTIONS = ("w", "h", "f", "d", "s", "n", "l")


def convert_musubi(data: Table, c: Conversion) -> None:
    """Converts arguments, datasets, or both. Tables of a config file only group arguments, so they are flattened."""
    tables = {key: value for key, value in data.items() if isinstance(value, dict) and key != "general"}
    arguments = {key: value for key, value in data.items() if key not in tables}
    for table in tables.values():
        arguments |= table
    datasets: Table = {key: data[key] for key in ("general", "datasets") if key in data}
    if arguments.keys() - datasets.keys():
        _arguments(arguments, c)
    else:
        c.result.notes.append("training options are arguments of musubi-tuner: import its --config_file for them")
        c.model("dit", "", True)
        c.adapter("network_module", "lora", 4, 1.0)
        c.streams(False)
    if not datasets and "dataset_config" in arguments:
        datasets = c.dataset_file("dataset_config", str(arguments["dataset_config"]))
    size = _datasets(datasets, c)
    accumulation = c.read("gradient_accumulation_steps", arguments.get("gradient_accumulation_steps"), integer, 1)
    c.batch(size, accumulation, "general.batch_size", c.ranks)


def _arguments(found: Table, c: Conversion) -> None:
    c.streams(False)
    c.result.put("training.steps", 1600)
    c.table("", found, _ARGUMENTS)
    key = "ltx2_checkpoint" if "ltx2_checkpoint" in found else "dit"
    path = str(found.get(key, ""))
    c.model(key, path, key == "ltx2_checkpoint" or is_ltx2(path))
    c.result.put("job.dump_folder", f"{found.get('output_dir', 'outputs')}/{found.get('output_name', 'musubi')}")
    module = str(found.get("network_module", "networks.lora"))
    kind = next((kind for kind in ("loha", "lokr", "lora") if kind in module), module)
    rank = c.read("network_dim", found.get("network_dim"), integer, 4)
    c.adapter("network_module", kind, rank, c.read("network_alpha", found.get("network_alpha"), number, 1.0))
    if found.get("fp8_base") or found.get("fp8_scaled"):
        c.result.put("lora.base_dtype", "float8")
    if "checkpoint" in c.result.job:
        c.result.put("checkpoint.export_interval", c.result.job["checkpoint"].get("interval", 0))
    if c.result.job.get("activation_checkpoint", {}).get("offload"):
        c.result.put("activation_checkpoint.mode", "full")
    listed = found.get("optimizer_args")
    arguments = listed if isinstance(listed, list) else str(listed or "").split()
    options = dict(str(item).partition("=")[::2] for item in arguments)
    values: Table = {name: _values(text) for name, text in options.items()}
    rate = found.get("learning_rate", 2e-6)
    c.optimizer(
        "optimizer_type", found.get("optimizer_type") or "adamw", "learning_rate", rate, "optimizer_args", values
    )
    warmup = c.read("lr_warmup_steps", found.get("lr_warmup_steps"), number, 0.0)
    # Below 1 it is a fraction of the run.
    steps = int(warmup * c.result.job["training"]["steps"]) if warmup < 1 else int(warmup)
    least = c.read("lr_scheduler_min_lr_ratio", found.get("lr_scheduler_min_lr_ratio"), number)
    power = c.read("lr_scheduler_power", found.get("lr_scheduler_power"), number, 1.0)
    c.schedule("lr_scheduler", str(found.get("lr_scheduler", "constant")), steps, least, power)
    bounds = c.result.job.pop("sigma", {})
    _sigma(found, c)
    c.result.job.setdefault("sigma", {}).update(bounds)
    if found.get("log_with") in ("wandb", "all"):
        c.result.put("metrics.wandb", "online")
    elif "log_with" in found:
        c.note("log_with", found["log_with"], "metrics are always written to metrics.jsonl; see [metrics]")
    if "sample_prompts" in found:
        _prompts(found, c)


def _sigma(found: Table, c: Conversion) -> None:
    sampling, scheme = found.get("timestep_sampling", "sigma"), found.get("weighting_scheme", "none")
    shift = c.read("discrete_flow_shift", found.get("discrete_flow_shift"), number, 1.0)
    scale = c.read("sigmoid_scale", found.get("sigmoid_scale"), number, 1.0)
    if scheme in _LOSS_WEIGHTS:
        c.result.put("loss.weighting", scheme)
    if sampling == "shift":
        c.sigma(shift, scale)
    elif sampling == "sigmoid":
        c.sigma(1.0, scale)
    elif sampling == "sigma" and scheme == "logit_normal" and not found.get("logit_mean"):
        c.sigma(shift, c.read("logit_std", found.get("logit_std"), number, 1.0))
    elif sampling == "uniform" or (sampling == "sigma" and scheme != "logit_normal" and shift == 1):
        c.result.put("sigma.name", "uniform")
        if scheme == "mode":
            c.note("weighting_scheme", scheme, 'is not supported; sigma.name = "uniform"')
    else:
        c.note("timestep_sampling", sampling, "sigmas follow our default, which shifts by the number of tokens")
        if shift != 1:
            c.note("discrete_flow_shift", shift, "set sigma.shift for a shift that clips of any length have")
    if scheme == "sigma_sqrt" and not found.get("min_timestep"):
        # Its weight, 1 / sigma^2, is unbounded; ours must not be.
        c.result.put("sigma.video_min", 0.05)
        c.note("weighting_scheme", scheme, "needs a lowest sigma: sigma.video_min = 0.05")


def _values(text: str) -> Any:
    parts = [part.strip() for part in text.strip("()[] ").split(",")]
    return parts if len(parts) > 1 else parts[0]


def _datasets(data: Table, c: Conversion) -> int:
    """Adds the sources; returns the batch size, which is the largest of the datasets."""
    general = c.table("general", data.get("general"), _GENERAL)
    sizes = [c.read("general.batch_size", general.get("batch_size"), integer, 1)]
    for index, own in enumerate(c.tables("datasets", data.get("datasets"))):
        where = f"datasets[{index}]"
        c.table(where, own, _DATASET)
        found = {**general, **own}
        sizes += [c.read(f"{where}.batch_size", own["batch_size"], integer, 1)] if "batch_size" in own else []
        name = next((name for name in _PATHS if name in found), None)
        if name is None:
            c.note(where, own, "names no folder or table of clips")
            continue
        size = found.get("resolution", [960, 544])
        width, height = (c.read(f"{where}.resolution", side, number, 512) for side in _pair(size))
        exact = (multiple_of_32(width), multiple_of_32(height))
        shapes = [exact, *shapes_of_area((width * height) ** 0.5)] if found.get("enable_bucket") else [exact]
        frames = [1]
        if name.startswith("video"):
            counts = found.get("target_frames", found.get("max_frames", 129))
            frames = c.frames(f"{where}.target_frames", counts)
            if len(frames) > 1:
                c.note(f"{where}.target_frames", counts, ONE_BUCKET)
                frames = [max(frames)]
        if str(found.get("caption_extension", ".txt")).lstrip(".") != "txt":
            c.note(f"{where}.caption_extension", found["caption_extension"], "captions are read from NAME.txt")
        options = _windows(found, c, where) if name.startswith("video") else []
        if name.endswith("jsonl_file"):
            options += ["--video-column", name.removesuffix("_jsonl_file") + "_path"]
        repeats = c.read(f"{where}.num_repeats", found.get("num_repeats"), integer)
        c.source(str(found[name]), buckets_of(shapes, frames), *options, repeats=repeats)
    return max(sizes)


def _pair(size: Any) -> tuple[Any, Any]:
    return (size[0], size[1]) if isinstance(size, list) and len(size) == 2 else (size, size)


def _windows(found: Table, c: Conversion, where: str) -> list[str]:
    """Options of process-dataset for the extraction of clips from a video."""
    extraction = found.get("frame_extraction", "head")
    if extraction == "head":
        return []
    if extraction == "chunk":
        return ["--windows", "all"]
    if extraction == "slide":
        return ["--windows", "all", "--window-stride", str(found.get("frame_stride", 1))]
    if extraction == "uniform":
        return ["--windows", str(found.get("frame_sample", 1))]
    c.note(f"{where}.frame_extraction", extraction, "a clip is cut to the frames of its bucket, not used as a whole")
    return []


def _prompts(found: Table, c: Conversion) -> None:
    """Reads the file of prompts, whose lines end with options such as `--w 640`."""
    path = c.beside(str(found["sample_prompts"]))
    if path is None or path.suffix != ".txt":
        c.note("sample_prompts", found["sample_prompts"], "is no text file on this machine; see [[validation.samples]]")
        return
    samples: list[Table] = []
    first: Table = {}
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        text, *options = re.split(r"\s--(?=[a-z]+\s)", line.strip())
        values = {name: value for name, _, value in (option.partition(" ") for option in options)}
        for name in values.keys() - set(_PROMPT_OPTIONS):
            c.note(f"sample_prompts.{name}", values[name], "not converted; see [[validation.samples]]")
        first = first or values
        size = [c.read(f"sample_prompts.{name}", values.get(name), integer, 256) for name in ("w", "h")]
        size.append(c.read("sample_prompts.f", values.get("f"), integer, 1))
        sample: Table = {"prompt": text, "video_dims": c.dims("sample_prompts", size)}
        if "d" in values:
            sample["seed"] = c.read("sample_prompts.d", values["d"], integer, 42)
        for name in ("s", "l", "n"):
            if name in values and values[name] != first.get(name):
                c.note(f"sample_prompts.{name}", values[name], "is one for all samples here; that of the first is used")
        samples.append(sample)
    c.prompts(
        samples,
        c.read("sample_every_n_steps", found.get("sample_every_n_steps"), integer),
        inference_steps=c.read("sample_prompts.s", first.get("s"), integer, 20),
        video_cfg_scale=max(scale, 1.0) if (scale := c.read("sample_prompts.l", first.get("l"), number)) else None,
        negative_prompt=first.get("n"),
        skip_initial_validation=not found.get("sample_at_first", False),
    )
