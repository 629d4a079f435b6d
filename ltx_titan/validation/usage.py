"""Commands and nodes that use an exported file, for the report of a run."""

import shlex
from pathlib import Path
from typing import NamedTuple

from ltx_titan.config import JobConfig
from ltx_titan.config.streams import Reference


class Recipe(NamedTuple):
    """One way to use the result: the program, what to do there, and code to copy (may be empty)."""

    program: str
    text: str
    code: str


def usage(job: JobConfig, export: Path) -> list[Recipe]:
    """Describes how to use an export of a job in this project, ComfyUI, ltx-pipelines and diffusers.

    Args:
        job: the job that wrote it.
        export: a LoRA file, or a transformer in the layout of `checkpoint.export_layout`.
    """
    if job.model.mode == "lora" and not job.lora.dora:
        return _lora_usage(job, export)
    return _transformer_usage(job, export)


def has_references(job: JobConfig) -> bool:
    """Whether the job trains an in-context model, which needs a reference at inference."""
    sections = [section for section in (job.video, job.audio) if section is not None]
    conditions = [condition for section in sections for condition in section.conditions]
    for source in job.data.sources:
        conditions += [*(source.video_conditions or ()), *(source.audio_conditions or ())]
    return any(isinstance(condition, Reference) for condition in conditions)


def _base(job: JobConfig) -> str:
    return shlex.quote(job.model.checkpoint_path or "BASE.safetensors")


def _encoder(job: JobConfig) -> str:
    return shlex.quote(job.validation.text_encoder_path or "TEXT_ENCODER_FOLDER")


def _sample(job: JobConfig, option: str, export: Path) -> Recipe:
    own = f"--job {shlex.quote(str(Path(job.job.dump_folder) / 'job.toml'))}"
    # What the job does not name.
    missing = "" if job.model.checkpoint_path else f" --model-path {_base(job)}"
    missing += "" if job.validation.text_encoder_path else f" --text-encoder-path {_encoder(job)}"
    code = f'ltx-titan sample {own}{missing} \\\n    {option} {shlex.quote(str(export))} --prompt "..."'
    return Recipe("ltx-titan", "The sampler of the validation clips above, with their settings.", code)


def _lora_usage(job: JobConfig, export: Path) -> list[Recipe]:
    file = shlex.quote(str(export))
    pipelines = (
        "python -m ltx_pipelines.ti2vid_two_stages \\\n"
        f"    --checkpoint-path {_base(job)} --gemma-root {_encoder(job)} \\\n"
        f"    --lora {file} 1.0 --distilled-lora DISTILLED_LORA.safetensors 0.8 \\\n"
        '    --spatial-upsampler-path UPSCALER.safetensors --prompt "..." --output-path clip.mp4'
    )
    if has_references(job):
        comfy = (
            f"Copy {export.name} to ComfyUI/models/loras. Load it with the node LTX IC-LoRA Loader Model Only of "
            "ComfyUI-LTXVideo between the base model and the sampler, and pass the reference through LTX Add Video "
            "IC-LoRA Guide. The file states the scale of its references."
        )
        text = "In-context adapters have a pipeline of their own, which takes the reference as well."
        pipelines = "python -m ltx_pipelines.ic_lora --help"
        diffusers_pipeline = "LTX2InContextPipeline"
    else:
        comfy = (
            f"Copy {export.name} to ComfyUI/models/loras. Put the node LoraLoaderModelOnly between the base model and "
            "the sampler, with strength 1."
        )
        text = "Two stages: the base with this adapter, then the upscaler with the distilled adapter."
        diffusers_pipeline = "LTX2Pipeline"
    code = (
        "import torch\n"
        f"from diffusers import {diffusers_pipeline}\n\n"
        f'pipe = {diffusers_pipeline}.from_pretrained("BASE_IN_DIFFUSERS_LAYOUT", torch_dtype=torch.bfloat16)\n'
        f"pipe.load_lora_weights({str(export)!r})\n"
        "pipe.enable_model_cpu_offload()"
    )
    return [
        _sample(job, "--lora", export),
        Recipe("ComfyUI", comfy, ""),
        Recipe("ltx-pipelines", text, pipelines),
        Recipe("diffusers", "Requires peft. The base must be in diffusers' own layout.", code),
    ]


def _transformer_usage(job: JobConfig, export: Path) -> list[Recipe]:
    file = shlex.quote(str(export))
    layout = job.checkpoint.export_layout
    pipelines = (
        "python -m ltx_pipelines.ti2vid_two_stages \\\n"
        f"    --checkpoint-path {file} --gemma-root {_encoder(job)} \\\n"
        "    --distilled-lora DISTILLED_LORA.safetensors 0.8 \\\n"
        '    --spatial-upsampler-path UPSCALER.safetensors --prompt "..." --output-path clip.mp4'
    )
    comfy = {
        "complete": f"Copy {export.name} to ComfyUI/models/checkpoints and load it with CheckpointLoaderSimple, as the "
        "released file.",
        "with_connectors": f"Copy {export.name} to ComfyUI/models/diffusion_models and load it with UNETLoader (Load "
        "Diffusion Model); the VAEs and the text encoder come from their own files.",
        "transformer": "This file holds the transformer alone, and ComfyUI needs the text connectors, too: export it "
        'again with checkpoint.export_layout = "with_connectors" or "complete".',
    }[layout]
    recipes = [_sample(job, "--transformer-path", export), Recipe("ComfyUI", comfy, "")]
    if layout == "complete":
        recipes.append(Recipe("ltx-pipelines", "The file replaces the released checkpoint.", pipelines))
    else:
        text = 'A single file must hold VAEs and vocoder: export with checkpoint.export_layout = "complete".'
        recipes.append(Recipe("ltx-pipelines", text, ""))
    code = (
        "import torch\n"
        "from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel\n\n"
        'base = "BASE_IN_DIFFUSERS_LAYOUT"\n'
        "transformer = LTX2VideoTransformer3DModel.from_single_file(\n"
        f'    {str(export)!r}, config=base, subfolder="transformer", torch_dtype=torch.bfloat16\n'
        ")\n"
        "pipe = LTX2Pipeline.from_pretrained(base, transformer=transformer, torch_dtype=torch.bfloat16)"
    )
    return [*recipes, Recipe("diffusers", "The base must be in diffusers' own layout.", code)]
