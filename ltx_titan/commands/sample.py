"""`ltx-titan sample`: the validation sampler as a command, for a checkpoint with or without a LoRA.

`--job` uses the `[validation]` table of a job with all of its settings, and the options override single values of it.
"""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ltx_titan.common.options import Flag, Maybe, Repeated, default_device, parse_size, placeholder
from ltx_titan.config import ValidationSection
from ltx_titan.model import LTXTransformer
from ltx_titan.model.transformer import Modalities
from ltx_titan.validation.check import NO_GUIDANCE, with_schedule
from ltx_titan.validation.engine import SampledFile, prepare_validation
from ltx_titan.validation.sampling import count_steps
from ltx_titan.weights import fuse_lora, load_parameters, read_metadata, unused_by

DESCRIPTION = """\
Sample clips: mp4 with audio, png for a single frame, wav for audio alone.

Samples are described by --prompt, or by [[validation.samples]] of a job (--job job.toml) with all of its conditions.
Options override the job's [validation] table.

--transformer-path loads a fine-tuned transformer and takes everything else (text connectors, VAEs, vocoder) from the
official --model-path; --lora fuses a LoRA. A distilled checkpoint is known by the name of its file, and sampled without
guidance where none is set; --distilled says so for a renamed one, or a distilled LoRA.

examples:
  ltx-titan sample --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized \\
      --prompt "Waves roll onto a beach; gulls cry." --size 768x448x89
  ltx-titan sample --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized \\
      --lora outputs/job/export/lora-step-2000.safetensors --job outputs/job/job.toml --output-dir clips
"""


@dataclass(frozen=True)
class SampleOptions:
    """Options of `ltx-titan sample`."""

    model_path: Maybe[Path] = None
    """Official checkpoint (.safetensors). Default: the checkpoint of the job."""

    transformer_path: Maybe[Path] = None
    """Fine-tuned transformer that replaces the one of the checkpoint."""

    lora: Repeated[Path] = ()
    """LoRA to fuse into the transformer. May be passed several times: their changes are added."""

    lora_strength: Repeated[float] = ()
    """Factor on the change that a LoRA makes, one for each --lora, or one for all. Default: 1."""

    text_encoder_path: Maybe[Path] = None
    """Local folder of the text encoder."""

    job: Maybe[Path] = None
    """Job file (.toml) whose [validation] table is used."""

    prompt: Repeated[str] = ()
    """Description of video and audio. May be passed several times."""

    prompts_file: Maybe[Path] = None
    """Text file with a prompt in every line, sampled after those of --prompt."""

    image: Maybe[Path] = None
    """First frame of the clips of --prompt."""

    keyframe: Annotated[Repeated[str], placeholder("FILE@AT")] = ()
    """Image or video for the clips of --prompt, and where it starts: a latent frame (negative from the end), first,
    middle or last, such as end.png@last. May be passed several times."""

    negative_prompt: Maybe[str] = None
    """Text that guidance steers away from."""

    size: Annotated[Maybe[str], placeholder("WxHxF")] = None
    """Width and height in pixels, and frames, for example 768x448x89."""

    frame_rate: Maybe[float] = None
    """Frames per second."""

    upscaler: Maybe[Path] = None
    """File of a spatial upscaler: sample at a fraction of the size, upscale, and refine in three steps."""

    seed: Maybe[int] = None
    """Seed of the noise."""

    steps: Maybe[int] = None
    """Sampling steps."""

    stg_blocks: tuple[int, ...] = ()
    """Transformer blocks that spatio-temporal guidance skips."""

    distilled: Flag = False
    """Sigma schedule of distilled checkpoints, without guidance."""

    modalities: Maybe[Modalities] = None
    """Streams to sample. Default: those of the job, or av."""

    output_dir: Path = Path("samples")
    """Folder to write to."""

    device: str = field(default_factory=default_device)
    """Device of the models."""


def run(options: SampleOptions) -> int:
    """Runs the command and prints the path and the prompt of each file."""
    for sample in sample_clips(options):
        print(f"{sample.path}  {sample.prompt}")
    return 0


def sample_clips(options: SampleOptions) -> list[SampledFile]:
    """Samples all clips and writes them.

    Raises:
        ValueError: options are missing or contradict each other, or a file cannot be used.
    """
    strengths = _strengths(options)
    job = {} if options.job is None else _read_job(options.job)
    model_path = options.model_path or job.get("model", {}).get("checkpoint_path")
    if model_path is None:
        raise ValueError("--model-path is missing: the official checkpoint to sample with, or --job of a job with one.")
    # The table alone and not the whole job: its data and paths need not exist where clips are sampled.
    section = _section(options, job.get("validation", {}))
    metadata, modalities = read_metadata(model_path), options.modalities or _modalities(job)
    section = with_schedule(section, model_path, metadata.model_version)
    # Encodes the prompts and frees the encoders before the transformer is loaded.
    validation = prepare_validation(
        section,
        checkpoint_path=model_path,
        config=metadata.config,
        modalities=modalities,
        device=options.device,
        cache_folder=options.output_dir / ".contexts",
        connectors_path=job.get("model", {}).get("connectors_path"),
    )
    model = _load_model(options, model_path, modalities, strengths)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as bar:
        task = bar.add_task("sampling steps", total=count_steps(section, validation.samples))
        return validation.run(model, options.output_dir, step=0, on_step=lambda _: bar.advance(task))


def _read_job(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a TOML file ({error}).") from error


def _modalities(job: dict[str, Any]) -> Modalities:
    """The streams of a job's model, by the same rule as in training; both without a job."""
    modalities = job.get("model", {}).get("modalities", "auto")
    if modalities != "auto":
        return modalities
    streams = [stream for stream in ("video", "audio") if stream in job]
    return streams[0] if len(streams) == 1 else "av"


def _section(options: SampleOptions, table: dict[str, Any]) -> ValidationSection:
    """The job's table, overridden by the options; keys that concern training only are dropped."""
    training_only = (
        "interval",
        "skip_initial_validation",
        "use_ema",
        "offload_optimizer",
        "held_out_root",
        "dataset_samples",
        "quality",
    )
    # They have no meaning outside training.
    table = {key: value for key, value in table.items() if key not in training_only}
    conditions = [_keyframe(text) for text in options.keyframe]
    if options.image is not None:
        conditions.insert(0, {"type": "first_frame", "image_or_video": str(options.image)})
    if options.prompt or options.prompts_file is not None:
        table.pop("prompts_file", None)
        table["samples"] = [{"prompt": prompt, "conditions": conditions} for prompt in options.prompt]
        if options.prompts_file is not None:
            table["prompts_file"] = str(options.prompts_file)
    elif conditions:
        option = "--keyframe" if options.keyframe else "--image"
        raise ValueError(f"{option} needs --prompt; samples of a job name their own conditions.")
    if not table.get("samples") and not table.get("prompts_file"):
        raise ValueError(
            "nothing to sample: add --prompt or --prompts-file, or --job with [[validation.samples]] (dataset_samples "
            "need the dataset and are sampled in training only)."
        )
    if options.distilled:
        table.pop("inference_steps", None)
        # As in the released pipelines: distilled checkpoints are sampled without guidance.
        table |= {"schedule": "distilled", **NO_GUIDANCE}
    overrides = {
        "text_encoder_path": None if options.text_encoder_path is None else str(options.text_encoder_path),
        "negative_prompt": options.negative_prompt,
        "upscaler": None if options.upscaler is None else str(options.upscaler),
        "video_dims": None if options.size is None else list(parse_size(options.size, "--size")),
        "frame_rate": options.frame_rate,
        "seed": options.seed,
        "inference_steps": options.steps,
        "stg_blocks": list(options.stg_blocks) or None,
    }
    return ValidationSection.model_validate(
        table | {key: value for key, value in overrides.items() if value is not None}
    )


def _keyframe(text: str) -> dict[str, Any]:
    """Parses FILE@AT to a condition of a sample."""
    path, _, at = text.rpartition("@")
    if not path:
        raise ValueError(f"--keyframe {text}: expected FILE@AT, such as end.png@last or middle.png@6.")
    is_number = at.removeprefix("-").isdecimal()
    return {"type": "keyframe", "image_or_video": path, "at": int(at) if is_number else at}


def _load_model(
    options: SampleOptions, model_path: str | Path, modalities: Modalities, strengths: tuple[float, ...]
) -> LTXTransformer:
    """The transformer on the device, in bfloat16 (on a CPU in float32), with the LoRAs fused in."""
    # An exported transformer has no codecs; those come from the official file.
    path = options.transformer_path or model_path
    dtype = torch.float32 if torch.device(options.device).type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = LTXTransformer.from_config(read_metadata(path).transformer_config(), modalities).to(dtype)
    # Straight to the device: the host never holds the model.
    model.to_empty(device=options.device)
    load_parameters(model, path, allow_unused=unused_by(modalities))
    # Fused rather than wrapped: sampling never changes the adapter, and a fused layer adds no matmul.
    for path, strength in zip(options.lora, strengths, strict=True):
        fuse_lora(model, path, strength)
    return model.requires_grad_(False).eval()


def _strengths(options: SampleOptions) -> tuple[float, ...]:
    """Factor of each LoRA."""
    given, count = options.lora_strength, len(options.lora)
    if len(given) not in (0, 1, count):
        raise ValueError(
            f"--lora-strength: expected one for each of {count} --lora, or one for all, found {len(given)}."
        )
    return given if len(given) == count else (given or (1.0,)) * count
