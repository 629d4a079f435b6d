"""Converts files of diffusion-pipe: jobs with `[model]` and `[optimizer]`, and datasets with `[[directory]]` (TOML)."""

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
    Expected,
    Rule,
    To,
    buckets_of,
    frames_of,
    integer,
    is_ltx2,
    largest_side,
    multiple_of_32,
    number,
    shapes_of_area,
    weights_dtype,
)

_VALIDATION = "set validation.held_out_root to a prepared dataset"
_PARALLEL = "blocks are sharded over GPUs with FSDP2, not divided into stages; see [parallelism]"
_JOB: dict[str, Rule] = {
    **dict.fromkeys(("model", "adapter", "optimizer", "monitoring", "dataset", "activation_checkpointing"), HANDLED),
    **dict.fromkeys(("micro_batch_size_per_gpu", "gradient_accumulation_steps", "pipeline_stages"), HANDLED),
    **dict.fromkeys(("lr_scheduler", "warmup_steps", "pseudo_huber_c"), HANDLED),
    "output_dir": To("job.dump_folder", str),
    "max_steps": To("training.steps", integer),
    "gradient_clipping": To("training.max_grad_norm", number),
    "save_every_n_steps": To("checkpoint.export_interval", integer),
    "checkpoint_every_n_steps": To("checkpoint.interval", integer),
    "save_dtype": To("checkpoint.export_dtype", weights_dtype),
    "seed": To("training.seed", integer),
    "compile": To("compile.enable", bool),
    **dict.fromkeys(("epochs", "save_every_n_epochs", "checkpoint_every_n_epochs"), EPOCHS),
    **dict.fromkeys(("save_every_n_examples", "checkpoint_every_n_minutes"), "set checkpoint.interval, in steps"),
    "eval_datasets": _VALIDATION,
    **dict.fromkeys(("eval_every_n_epochs", "eval_every_n_steps", "eval_every_n_examples"), _VALIDATION),
    **dict.fromkeys(("eval_micro_batch_size_per_gpu", "eval_gradient_accumulation_steps"), _VALIDATION),
    "eval_before_first_step": _VALIDATION,
    "image_micro_batch_size_per_gpu": "all shapes have training.local_batch_size here",
    "force_constant_lr": "set optimizer.lr",
    "blocks_to_swap": STREAM_BLOCKS,
    "reentrant_activation_checkpointing": f"the kind of recomputation {CHOSEN}",
    **dict.fromkeys(("partition_method", "partition_split"), _PARALLEL),
    **dict.fromkeys(("caching_batch_size", "map_num_proc"), f"the batch of process-dataset {CHOSEN}"),
    "steps_per_print": "set [metrics]",
    "x_axis_examples": "metrics.jsonl has both steps and samples",
    "video_clip_mode": HANDLED,
    **dict.fromkeys(("huggingface_repo", "upload_hf_from_epoch"), "set hub.repo"),
}
_MODEL_PATHS = ("transformer_path", "diffusion_model", "single_file_path", "ckpt_path", "diffusers_path")
_MODEL: dict[str, Rule] = {
    **dict.fromkeys(("type", "transformer_dtype", "diffusion_model_dtype", "timestep_sample_method"), HANDLED),
    **dict.fromkeys(("sigmoid_scale", "shift", "flux_shift", "first_frame_conditioning_p"), HANDLED),
    **dict.fromkeys(
        ("diffusers_path", "ckpt_path", "transformer_path", "diffusion_model", "single_file_path"), HANDLED
    ),
    "dtype": To("training.dtype", lambda name: "float32" if name == "float32" else "bfloat16"),
    **dict.fromkeys(("vae", "vae_path"), "set validation.video_vae_path for a split pack"),
    **dict.fromkeys(("text_encoders", "text_encoder_path", "llm_path", "clip_path", "t5_path"), FROZEN_TEXT),
    "guidance": "LTX-2 has no guidance embedding",
    "bypass_guidance_embedding": "LTX-2 has no guidance embedding",
    "caption_dropout_percent": To("data.caption_dropout", number),
}
_ADAPTER: dict[str, Rule] = {
    **dict.fromkeys(("type", "rank", "alpha"), HANDLED),
    "dropout": To("lora.dropout", number),
    "dtype": "adapters are trained in float32",
    "init_from_existing": "set model.adapter_path to the adapter file",
    "fuse_adapters": "merge them into the checkpoint first",
    "decompose_factor": "is an option of LoKr",
}
_MONITORING: dict[str, Rule] = {
    "enable_wandb": HANDLED,
    "wandb_api_key": "is read from WANDB_API_KEY, never from a job",
    "wandb_tracker_name": "set metrics.wandb_project",
    "wandb_run_name": "is the name of job.dump_folder",
}
_BUCKETING = ("min_ar", "max_ar", "num_ar_buckets", "enable_ar_bucket")
_RATIOS = "the command has three aspect ratios; add buckets for others"
_DATASET: dict[str, Rule] = {
    **dict.fromkeys(("directory", "resolutions", "frame_buckets", "ar_buckets", "size_buckets"), HANDLED),
    **dict.fromkeys(("path", "num_repeats"), HANDLED),
    **dict.fromkeys(_BUCKETING, _RATIOS),
    **dict.fromkeys(("cache_shuffle_num", "cache_shuffle_delimiter", "shuffle_tags"), "captions are encoded unchanged"),
    "skip_empty_caption": "clips without a caption are skipped and listed",
    "mask_path": "prepare masks with process-dataset and set video.loss_mask_dir",
    "control_path": "prepare references and add a [[video.conditions]] of type reference",
    "caption_prefix": "process-dataset --lora-trigger puts a word in front of every caption",
}

# LoKr takes a huge rank to mean full matrices, which no LoRA has.
_MAX_RANK = 128


def convert_diffusion_pipe(data: Table, c: Conversion) -> None:
    """Converts a job with the dataset that it names, or a dataset alone."""
    c.streams(False)
    if "directory" in data:
        c.result.notes.append("training options are in the job of diffusion-pipe: import that file for them")
        c.model("model.type", "", True)
        c.adapter("adapter.type", "lora", 32, 32.0)
        _datasets(data, c, [])
        return
    job = c.table("", data, _JOB)
    model = c.table("model", job.get("model"), _MODEL)
    _model(model, c)
    adapter = c.table("adapter", job.get("adapter"), _ADAPTER)
    if adapter:
        rank = c.read("adapter.rank", adapter.get("rank"), integer, 32)
        kind = adapter.get("type", "lora")
        if kind != "lora" and rank > _MAX_RANK:
            c.note("adapter.rank", rank, f"lora.rank = {_MAX_RANK}")
            rank = _MAX_RANK
        c.adapter("adapter.type", kind, rank, float(rank))
        c.all_linears()
        if (form := _weights_dtype(model)) is not None:
            c.base_dtype("model.transformer_dtype", form)
    optimizer = dict(c.section("optimizer", job.get("optimizer")))
    kind, rate = optimizer.pop("type", "adamw"), optimizer.pop("lr", None)
    c.optimizer("optimizer.type", kind, "optimizer.lr", rate, "optimizer", optimizer)
    warmup = c.read("warmup_steps", job.get("warmup_steps"), integer, 0)
    c.schedule("lr_scheduler", str(job.get("lr_scheduler", "constant")), warmup)
    checkpointing = job.get("activation_checkpointing", False)
    c.result.put("activation_checkpoint.mode", "full" if checkpointing else "none")
    if checkpointing == "unsloth":
        c.result.put("activation_checkpoint.offload", True)
    _batch(job, c)
    if (constant := c.read("pseudo_huber_c", job.get("pseudo_huber_c"), number)) is not None:
        c.result.job["loss"] = {"name": "huber", "huber_delta": constant}
        c.note("pseudo_huber_c", constant, 'loss.name = "huber" is linear beyond huber_delta, not smooth around it')
    if c.table("monitoring", job.get("monitoring"), _MONITORING).get("enable_wandb"):
        c.result.put("metrics.wandb", "online")
    options = []
    if job.get("video_clip_mode", "single_beginning") == "multiple_overlapping":
        options = ["--windows", "all"]
    elif job.get("video_clip_mode", "single_beginning") != "single_beginning":
        c.note("video_clip_mode", job["video_clip_mode"], "clips are cut from the start; see process-dataset --windows")
    _datasets(c.dataset_file("dataset", str(job.get("dataset", ""))), c, options)


def _weights_dtype(model: Table) -> str | None:
    form = model.get("transformer_dtype", model.get("diffusion_model_dtype"))
    return None if form in (None, "bfloat16", "float16") else str(form)


def _model(model: Table, c: Conversion) -> None:
    key = next((key for key in _MODEL_PATHS if key in model), "type")
    kind = str(model.get("type", ""))
    path = str(model.get(key, ""))
    if is_ltx2(kind):
        c.model(f"model.{key}", path, True)
    else:
        c.model("model.type", kind, False)
    shift = c.read("model.shift", model.get("shift"), number)
    scale = c.read("model.sigmoid_scale", model.get("sigmoid_scale"), number, 1.0)
    if model.get("timestep_sample_method", "logit_normal") == "logit_normal":
        # Without a shift the odds are not multiplied.
        c.sigma(1.0 if shift is None else shift, scale)
        if model.get("flux_shift"):
            c.note("model.flux_shift", True, "unset sigma.shift for a shift that follows the number of tokens")
    else:
        c.result.put("sigma.name", "uniform")
        if shift is not None:
            c.note("model.shift", shift, 'uniform sigmas have no shift; see sigma.name = "shifted_logit_normal"')
    if probability := c.read("model.first_frame_conditioning_p", model.get("first_frame_conditioning_p"), number):
        c.result.job["video"]["conditions"] = [{"type": "first_frame", "probability": probability}]


def _batch(job: Table, c: Conversion) -> None:
    size = job.get("micro_batch_size_per_gpu", 1)
    if isinstance(size, list):
        c.note("micro_batch_size_per_gpu", size, "all shapes have training.local_batch_size here; the smallest is used")
    size = c.read("micro_batch_size_per_gpu", size, _smallest_batch, 1)
    stages = c.read("pipeline_stages", job.get("pipeline_stages"), integer, 1)
    if stages > 1:
        c.note("pipeline_stages", stages, _PARALLEL)
    accumulation = c.read("gradient_accumulation_steps", job.get("gradient_accumulation_steps"), integer, 1)
    # A stage is a process, but the processes of a pipeline share a batch.
    c.batch(size, accumulation, "micro_batch_size_per_gpu", max(c.ranks // max(stages, 1), 1))


def _datasets(data: Table, c: Conversion, options: list[str]) -> None:
    shared = c.table("dataset", {key: value for key, value in data.items() if key != "directory"}, _DATASET)
    for index, own in enumerate(c.tables("directory", data.get("directory"))):
        where = f"directory[{index}]"
        c.table(where, own, _DATASET)
        found = {**shared, **own}
        if sizes := found.get("size_buckets"):
            buckets = ";".join(c.read(f"{where}.size_buckets", sizes, _size_buckets, []))
        else:
            sizes = found.get("resolutions", [512])
            side = c.read(f"{where}.resolutions", sizes, largest_side, 512.0)
            if isinstance(sizes, list) and len(sizes) > 1:
                c.note(f"{where}.resolutions", sizes, ONE_BUCKET)
            if "ar_buckets" in found:
                c.note(f"{where}.ar_buckets", found["ar_buckets"], _RATIOS)
            buckets = buckets_of(
                shapes_of_area(side), c.frames(f"{where}.frame_buckets", found.get("frame_buckets", [1]))
            )
        repeats = c.read(f"{where}.num_repeats", found.get("num_repeats"), integer)
        c.source(str(found.get("path", "clips")), buckets, *options, repeats=repeats)


def _smallest_batch(size: Any) -> int:
    """The batch of one or, as [resolution, batch], of several shapes."""
    if not isinstance(size, list):
        return integer(size)
    if not size or not all(isinstance(pair, list) and len(pair) == 2 for pair in size):
        raise Expected("an integer, or a list of [resolution, integer]")
    return min(integer(pair[1]) for pair in size)


def _size_buckets(sizes: Any) -> list[str]:
    """Buckets of `--resolution-buckets` from a list of [width, height, frames]."""
    if not isinstance(sizes, list) or not all(isinstance(size, list) and len(size) == 3 for size in sizes):
        raise Expected("a list of [width, height, frames]")
    shapes = [
        ((multiple_of_32(number(size[0])), multiple_of_32(number(size[1]))), frames_of(size[2])) for size in sizes
    ]
    return [buckets_of([shape], [count]) for shape, count in shapes]
