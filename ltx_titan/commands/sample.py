"""`ltx-titan sample`: the validation sampler from the command line, with a checkpoint or with a base and a LoRA.

What can be said of samples in a job can be said here: `--job` takes a job's `[validation]` table, and the options
change single values of it.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ltx_titan.config import ValidationSection
from ltx_titan.model import LTXTransformer
from ltx_titan.validation import schedule_of
from ltx_titan.validation.engine import SampledFile, prepare_validation
from ltx_titan.weights import fuse_lora, load_parameters, read_metadata, unused_by

DESCRIPTION = """\
Sample clips: mp4 with audio, png for a single frame, wav for audio alone.

Prompts come from --prompt, or the samples from the [validation] table of a job (--job job.toml), with all of its
conditions; see [[validation.samples]] there. Options win over the table.

A fine-tuned transformer is given as --transformer-path beside the official --model-path, which has the rest (text
connectors, VAEs, vocoder); an adapter as --lora. Distilled checkpoints want --distilled, which also turns guidance off.

examples:
  ltx-titan sample --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized \\
      --prompt "Waves roll onto a beach; gulls cry." --size 768x448x89
  ltx-titan sample --model-path ltx-2.3-22b-dev.safetensors --text-encoder-path gemma-3-12b-it-qat-q4_0-unquantized \\
      --lora outputs/job/export/lora-step-2000.safetensors --job outputs/job/job.toml --output-dir clips
"""

_NO_GUIDANCE = {
    "video_cfg_scale": 1.0,
    "audio_cfg_scale": 1.0,
    "video_stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "video_modality_guidance_scale": 1.0,
    "audio_modality_guidance_scale": 1.0,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `ltx-titan sample`."""
    parser.add_argument("--model-path", type=Path, help="official checkpoint (.safetensors); default: that of the job")
    parser.add_argument(
        "--transformer-path", type=Path, help="fine-tuned transformer to sample with, instead of its own"
    )
    parser.add_argument("--lora", type=Path, help="adapter to add to the transformer")
    parser.add_argument("--lora-strength", type=float, default=1.0, help="factor on the adapter's change (default: 1)")
    parser.add_argument("--text-encoder-path", type=Path, help="local folder of the text encoder")
    parser.add_argument("--job", type=Path, help="job file (.toml) whose [validation] table is used")
    parser.add_argument("--prompt", action="append", help="what is to be seen and heard; may be given several times")
    parser.add_argument("--image", type=Path, help="first frame of the clips of --prompt")
    parser.add_argument("--negative-prompt", help="what to steer away from")
    parser.add_argument("--size", metavar="WxHxF", help="width and height in pixels, and frames; as in 768x448x89")
    parser.add_argument("--frame-rate", type=float, help="frames per second")
    parser.add_argument("--seed", type=int, help="seed of the noise")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--stg-blocks", type=int, nargs="+", help="blocks that spatio-temporal guidance skips")
    parser.add_argument("--distilled", action="store_true", help="noise levels of distilled checkpoints, no guidance")
    parser.add_argument("--modalities", choices=("av", "video", "audio"), help="streams (default: the job's, or av)")
    parser.add_argument("--output-dir", type=Path, default=Path("samples"), help="where to write (default: samples)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: cuda if there is one)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run `ltx-titan sample`."""
    for sample in sample_clips(arguments):
        print(f"{sample.path}  {sample.prompt}")
    return 0


def sample_clips(arguments: argparse.Namespace) -> list[SampledFile]:
    """Samples what the options ask for.

    Raises:
        ValueError: options are missing or contradict each other, or a file cannot be used.
    """
    job = {} if arguments.job is None else _read_job(arguments.job)
    model_path = arguments.model_path or job.get("model", {}).get("checkpoint_path")
    if model_path is None:
        raise ValueError("--model-path is missing: the official checkpoint to sample with, or --job of a job with one.")
    section = _section(arguments, job.get("validation", {}))
    config, modalities = read_metadata(model_path).config, arguments.modalities or _modalities(job)
    # Encoders come and go before the transformer takes its place.
    validation = prepare_validation(
        section,
        checkpoint_path=model_path,
        config=config,
        modalities=modalities,
        device=arguments.device,
        cache_folder=arguments.output_dir / ".contexts",
    )
    model = _load_model(arguments, model_path, modalities)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn()) as bar:
        task = bar.add_task("sampling steps", total=len(section.samples) * (len(schedule_of(section)) - 1))
        return validation.run(model, arguments.output_dir, step=0, on_step=lambda _: bar.advance(task))


def _read_job(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a TOML file ({error}).") from error


def _modalities(job: dict[str, Any]) -> str:
    """The streams that a job trains, as its model was built; both where nothing is said."""
    asked = job.get("model", {}).get("modalities", "auto")
    streams = [stream for stream in ("video", "audio") if stream in job]
    return asked if asked != "auto" else streams[0] if len(streams) == 1 else "av"


def _section(arguments: argparse.Namespace, table: dict[str, Any]) -> ValidationSection:
    """The job's table with the options over it. What concerns training only is left out."""
    training_only = ("interval", "skip_initial_validation", "use_ema", "offload_optimizer", "held_out_root")
    table = {key: value for key, value in table.items() if key not in training_only}
    if arguments.prompt:
        image = [] if arguments.image is None else [{"type": "first_frame", "image_or_video": str(arguments.image)}]
        table["samples"] = [{"prompt": prompt, "conditions": image} for prompt in arguments.prompt]
    elif arguments.image is not None:
        raise ValueError("--image goes with --prompt; samples of a job name their own first frames.")
    if not table.get("samples"):
        raise ValueError("nothing to sample: give --prompt, or --job with [[validation.samples]].")
    if arguments.distilled:
        table.pop("inference_steps", None)
        table |= {"schedule": "distilled", **_NO_GUIDANCE}
    options = {
        "text_encoder_path": None if arguments.text_encoder_path is None else str(arguments.text_encoder_path),
        "negative_prompt": arguments.negative_prompt,
        "video_dims": None if arguments.size is None else _size(arguments.size),
        "frame_rate": arguments.frame_rate,
        "seed": arguments.seed,
        "inference_steps": arguments.steps,
        "stg_blocks": arguments.stg_blocks,
    }
    return ValidationSection.model_validate(table | {key: value for key, value in options.items() if value is not None})


def _size(text: str) -> list[int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--size is {text!r}; it is WxHxF, as in 768x448x89.")
    return [int(part) for part in parts]


def _load_model(arguments: argparse.Namespace, model_path: str | Path, modalities: str) -> LTXTransformer:
    """The transformer on the device, in bfloat16 (on a CPU in float32), with the adapter fused in."""
    path = arguments.transformer_path or model_path
    dtype = torch.float32 if torch.device(arguments.device).type == "cpu" else torch.bfloat16
    with torch.device("meta"):
        model = LTXTransformer.from_config(read_metadata(path).transformer_config(), modalities).to(dtype)
    model.to_empty(device=arguments.device)
    load_parameters(model, path, allow_unused=unused_by(modalities))
    if arguments.lora is not None:
        fuse_lora(model, arguments.lora, arguments.lora_strength)
    return model.requires_grad_(False).eval()
