"""Converts jobs of ai-toolkit: YAML with `job: extension` and the sections of one process."""

from ltx_titan.commands.ltx_schema import Table
from ltx_titan.commands.peers.conversion import (
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
    largest_side,
    number,
    shapes_of_area,
    weights_dtype,
)

_PREPARED = "samples are always prepared before training"
_NO_AUGMENTATION = "prepared samples are not augmented"

_PROCESS: dict[str, Rule] = {
    **dict.fromkeys(("type", "training_folder", "network", "save", "datasets", "train", "model", "sample"), HANDLED),
    "trigger_word": To("job.trigger", str),
    "device": "is chosen by ltx_titan",
    "performance_log_every": "speed is logged with the other metrics",
    "sqlite_db_path": "belongs to the user interface of ai-toolkit",
    "logging": "set [metrics]",
}
_NETWORK: dict[str, Rule] = {
    **dict.fromkeys(("type", "linear", "rank", "linear_alpha", "alpha"), HANDLED),
    "dropout": To("lora.dropout", number),
    "conv": "the transformer has no convolutions",
    "conv_alpha": "the transformer has no convolutions",
    "lokr_full_rank": "is an option of LoKr",
    "lokr_factor": "is an option of LoKr",
    "network_kwargs": "set lora.targets to the adapted layers",
}
_SAVE: dict[str, Rule] = {
    "save_every": To("checkpoint.interval", integer),
    "max_step_saves_to_keep": To("checkpoint.keep_last", integer),
    "dtype": To("checkpoint.export_dtype", weights_dtype),
    "save_format": "ltx_titan writes .safetensors that ComfyUI and diffusers read",
    "push_to_hub": "set hub.repo",
}
_TRAIN: dict[str, Rule] = {
    **dict.fromkeys(("batch_size", "gradient_accumulation", "gradient_accumulation_steps", "optimizer", "lr"), HANDLED),
    **dict.fromkeys(("optimizer_params", "lr_scheduler", "lr_scheduler_params", "timestep_type", "loss_type"), HANDLED),
    **dict.fromkeys(("ema_config", "train_unet", "noise_scheduler", "disable_sampling"), HANDLED),
    **dict.fromkeys(("blank_prompt_preservation", "blank_prompt_preservation_multiplier", "content_or_style"), HANDLED),
    "steps": To("training.steps", integer),
    "max_grad_norm": To("training.max_grad_norm", number),
    "gradient_checkpointing": To("activation_checkpoint.mode", lambda on: "full" if flag(on) else "none"),
    "dtype": To("training.dtype", lambda name: "float32" if name in ("fp32", "float32") else "bfloat16"),
    "audio_loss_multiplier": To("loss.audio_weight", number),
    "skip_first_sample": HANDLED,
    "force_first_sample": "validation runs before the first step unless validation.skip_initial_validation is true",
    "train_text_encoder": FROZEN_TEXT,
    "unload_text_encoder": FROZEN_TEXT,
    "cache_text_embeddings": _PREPARED,
    "auto_scale_batch_size": "set training.local_batch_size; ltx-titan estimate computes the memory",
    "bypass_guidance_embedding": "LTX-2 has no guidance embedding",
    "switch_boundary_every": "LTX-2 has one transformer",
    "diff_output_preservation": "compares with the captions of a class; preservation.prior_weight uses the batch's own",
    "diff_output_preservation_multiplier": HANDLED,
    "diff_output_preservation_class": HANDLED,
    "min_snr_gamma": 'no effect on flow matching there; loss.weighting = "min_snr" has one here',
    "do_differential_guidance": "is not supported",
    "differential_guidance_scale": HANDLED,
}
_MODEL: dict[str, Rule] = {
    **dict.fromkeys(("name_or_path", "arch", "quantize", "qtype"), HANDLED),
    "quantize_te": "process-dataset --text-encoder-precision int8 quantizes the text encoder",
    "qtype_te": HANDLED,
    "low_vram": STREAM_BLOCKS,
    "layer_offloading": STREAM_BLOCKS,
    "model_kwargs": "are options of another implementation",
}
_DATASET: dict[str, Rule] = {
    **dict.fromkeys(("folder_path", "dataset_path", "caption_dropout_rate", "num_frames", "resolution"), HANDLED),
    **dict.fromkeys(("num_repeats", "do_audio", "fps", "caption_ext", "mask_min_value"), HANDLED),
    "shrink_video_to_frames": "spread frames over the whole video; here they are read from its start at its own rate",
    "do_i2v": "conditioned on first frames; add a [[video.conditions]] of type first_frame",
    "default_caption": "write a caption NAME.txt beside each clip",
    "cache_latents": _PREPARED,
    "cache_latents_to_disk": _PREPARED,
    "is_reg": "set data.sources.loss_weight below 1 for a regularization set",
    "mask_path": "prepare masks with process-dataset and set video.loss_mask_dir",
    "controls": "prepare references and add a [[video.conditions]] of type reference",
    "control_path": "prepare references and add a [[video.conditions]] of type reference",
    **dict.fromkeys(("flip_x", "flip_y", "random_crop", "random_scale", "augmentations"), _NO_AUGMENTATION),
    "shuffle_tokens": _NO_AUGMENTATION,
    "network_weight": HANDLED,
}
_SAMPLE: dict[str, Rule] = {
    **dict.fromkeys(("prompts", "samples", "sample_every", "width", "height", "num_frames", "fps", "seed"), HANDLED),
    **dict.fromkeys(("walk_seed", "neg", "guidance_scale", "sample_steps", "sampler"), HANDLED),
    "guidance_rescale": HANDLED,
    "format": "clips are written as .mp4",
    "ext": "clips are written as .mp4",
}
_ARGUMENTS = {"width", "height", "num_frames", "seed", "prompt"}


def convert_ai_toolkit(data: Table, c: Conversion) -> None:
    """Converts a job whose `config.process` is a list of tables."""
    config = data["config"]
    processes = config["process"]
    where = "config.process[0]"
    process = c.table(where, processes[0], _PROCESS)
    for index, other in enumerate(processes[1:], start=1):
        c.note(f"config.process[{index}]", other, "only the first process is converted")
    c.result.put("job.dump_folder", f"{process.get('training_folder', 'output')}/{config.get('name', 'job')}")
    model = c.table(f"{where}.model", process.get("model"), _MODEL)
    path = str(model.get("name_or_path", ""))
    c.model(f"{where}.model.name_or_path", path, is_ltx2(str(model.get("arch") or path)))
    datasets = c.tables(f"{where}.datasets", process.get("datasets"))
    has_audio = any(dataset.get("do_audio") for dataset in datasets)
    c.streams(has_audio)
    network = c.table(f"{where}.network", process.get("network"), _NETWORK)
    if network:
        rank = c.read(f"{where}.network.linear", network.get("linear", network.get("rank")), integer, 4)
        alpha = network.get("linear_alpha", network.get("alpha"))
        c.adapter(f"{where}.network.type", network.get("type", "lora"), rank, float(rank))
        if alpha is not None and c.read(f"{where}.network.linear_alpha", alpha, number) != rank:
            c.note(f"{where}.network.linear_alpha", alpha, "transformers are trained with alpha = linear, here too")
        c.all_linears()
        if model.get("quantize"):
            c.base_dtype(f"{where}.model.qtype", str(model.get("qtype", "qfloat8")))
    c.table(f"{where}.save", process.get("save"), _SAVE)
    # Its saves are weights to sample with: exports here.
    c.result.put("checkpoint.export_interval", c.result.job.get("checkpoint", {}).get("interval", 0))
    train = c.table(f"{where}.train", process.get("train"), _TRAIN)
    _train(c, f"{where}.train", train)
    for index, dataset in enumerate(datasets):
        _dataset(c, f"{where}.datasets[{index}]", dataset, process.get("trigger_word"))
    sample = c.table(f"{where}.sample", process.get("sample"), _SAMPLE)
    if train.get("disable_sampling"):
        c.note(f"{where}.train.disable_sampling", True, "no validation is set")
    elif sample:
        _sample(c, f"{where}.sample", sample, train, process.get("trigger_word"))


def _train(c: Conversion, where: str, train: Table) -> None:
    c.result.job.setdefault("training", {}).setdefault("steps", 1000)
    c.result.job.setdefault("activation_checkpoint", {}).setdefault("mode", "full")
    accumulation = train.get("gradient_accumulation", train.get("gradient_accumulation_steps"))
    size = c.read(f"{where}.batch_size", train.get("batch_size"), integer, 1)
    c.batch(size, c.read(f"{where}.gradient_accumulation", accumulation, integer, 1), f"{where}.batch_size", c.ranks)
    options = c.section(f"{where}.optimizer_params", train.get("optimizer_params"))
    name = train.get("optimizer", "adamw")
    c.optimizer(f"{where}.optimizer", name, f"{where}.lr", train.get("lr", 1e-6), f"{where}.optimizer_params", options)
    schedule = str(train.get("lr_scheduler") or "constant")
    # Its linear schedule is torch's LinearLR with that class's defaults, which increases the rate.
    c.schedule(f"{where}.lr_scheduler", "increasing linear" if schedule == "linear" else schedule, 0)
    for key, value in c.section(f"{where}.lr_scheduler_params", train.get("lr_scheduler_params")).items():
        c.note(f"{where}.lr_scheduler_params.{key}", value, "set [scheduler], whose schedules span training.steps")
    sampling = str(train.get("timestep_type", "sigmoid"))
    if sampling == "sigmoid":
        c.sigma(shift=1.0)
    elif sampling in ("linear", "weighted"):
        c.result.put("sigma.name", "uniform")
    else:
        c.note(f"{where}.timestep_type", sampling, "sigmas follow our default, which shifts by the number of tokens")
    if sampling == "weighted":
        c.note(f"{where}.timestep_type", sampling, "uniform sigmas without its weights; see loss.weighting")
    if train.get("content_or_style", "balanced") != "balanced":
        reason = "set sigma.video_min for content or sigma.video_max for style"
        c.note(f"{where}.content_or_style", train["content_or_style"], reason)
    if train.get("loss_type", "mse") != "mse":
        c.note(f"{where}.loss_type", train["loss_type"], 'is not supported; loss.name = "mse"')
    ema = c.section(f"{where}.ema_config", train.get("ema_config"))
    if ema and ema.get("use_ema", True) and c.is_schedule_free:
        c.note(f"{where}.ema_config", ema, "adamw_schedulefree averages the weights itself")
    elif ema and ema.get("use_ema", True):
        c.result.put(
            "optimizer.ema_decay", c.read(f"{where}.ema_config.ema_decay", ema.get("ema_decay"), number, 0.999)
        )
        c.result.put("validation.use_ema", True)
    if train.get("blank_prompt_preservation"):
        key = "blank_prompt_preservation_multiplier"
        c.result.put("preservation.blank_prompt_weight", c.read(f"{where}.{key}", train.get(key), number, 1.0))
    if train.get("train_unet", True) is not True:
        c.note(f"{where}.train_unet", train["train_unet"], "the transformer is always trained")


def _dataset(c: Conversion, where: str, dataset: Table, trigger: str | None) -> None:
    c.table(where, dataset, _DATASET)
    resolution = dataset.get("resolution", 512)
    side = c.read(f"{where}.resolution", resolution, largest_side, 512.0)
    if isinstance(resolution, list) and len(resolution) > 1:
        c.note(f"{where}.resolution", resolution, ONE_BUCKET)
    frames = c.frames(f"{where}.num_frames", dataset.get("num_frames", 1))
    if str(dataset.get("caption_ext") or "txt").lstrip(".") != "txt":
        c.note(f"{where}.caption_ext", dataset["caption_ext"], "captions are read from NAME.txt")
    options = ["--lora-trigger", str(trigger)] if trigger else []
    options += ["--fps", f"{fps:g}"] if (fps := c.read(f"{where}.fps", dataset.get("fps"), number)) else []
    c.source(
        str(dataset.get("folder_path") or dataset.get("dataset_path") or "clips"),
        buckets_of(shapes_of_area(side), frames),
        *options,
        with_audio=bool(dataset.get("do_audio")),
        modality=None if dataset.get("do_audio") or "audio" not in c.result.job else "video",
        repeats=c.read(f"{where}.num_repeats", dataset.get("num_repeats"), integer),
        caption_dropout=c.read(f"{where}.caption_dropout_rate", dataset.get("caption_dropout_rate"), number),
    )


def _sample(c: Conversion, where: str, sample: Table, train: Table, trigger: str | None) -> None:
    texts = sample.get("samples") or [{"prompt": prompt} for prompt in sample.get("prompts") or []]
    seed = c.read(f"{where}.seed", sample.get("seed"), integer, 0)
    default = [c.read(f"{where}.{key}", sample.get(key), integer, 512) for key in ("width", "height")]
    size = [*default, c.read(f"{where}.num_frames", sample.get("num_frames"), integer, 1)]
    samples = []
    for index, text in enumerate(c.tables(f"{where}.samples", texts)):
        entry: Table = {"prompt": str(text.get("prompt", "")).replace("[trigger]", str(trigger or ""))}
        if sample.get("walk_seed") or "seed" in text:
            entry["seed"] = c.read(f"{where}.samples[{index}].seed", text.get("seed"), integer, seed + index)
        if {"width", "height", "num_frames"} & text.keys():
            own = [text.get(key, size[axis]) for axis, key in enumerate(("width", "height", "num_frames"))]
            entry["video_dims"] = c.dims(f"{where}.samples[{index}]", own)
        for key in text.keys() - _ARGUMENTS:
            c.note(f"{where}.samples[{index}].{key}", text[key], "not converted; see [[validation.samples]]")
        samples.append(entry)
    if sample.get("sampler", "flowmatch") != "flowmatch":
        c.note(f"{where}.sampler", sample["sampler"], "clips are sampled with Euler steps")
    c.prompts(
        samples,
        c.read(f"{where}.sample_every", sample.get("sample_every"), integer, 100),
        video_dims=c.dims(where, size),
        frame_rate=c.read(f"{where}.fps", sample.get("fps"), number),
        inference_steps=c.read(f"{where}.sample_steps", sample.get("sample_steps"), integer, 20),
        video_cfg_scale=max(c.read(f"{where}.guidance_scale", sample.get("guidance_scale"), number, 7.0), 1.0),
        guidance_rescale=c.read(f"{where}.guidance_rescale", sample.get("guidance_rescale"), number),
        negative_prompt=sample.get("neg") or None,
        seed=seed,
        skip_initial_validation=train.get("skip_first_sample"),
    )
