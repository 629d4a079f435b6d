"""The README.md of a model repository: what was trained on what, how to load it, its clips, job and loss."""

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import yaml

from ltx_titan.config import JobConfig

# Identifiers that the Hub knows; any other license is named beside `other`.
_LICENSES = (
    *("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "gpl-3.0", "bsd-3-clause", "cc0-1.0"),
    *("cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0"),
)


def model_card(
    job: JobConfig,
    *,
    weights: Iterable[str],
    clips: Mapping[str, str],
    losses: Mapping[str, float],
    step: int | None,
    license_: str | None,
    trigger: str | None,
) -> str:
    """The card as Markdown with the Hub's metadata in front.

    Args:
        job: the job that trained the model.
        weights: names of the files with weights in the repository.
        clips: path of each clip in the repository -> its prompt.
        losses: name of each loss -> its last value.
        step: last step; None if nothing was logged.
        license_: of the weights, if it is stated.
        trigger: trigger word, if there is one.
    """
    is_lora = job.model.mode == "lora" and not job.lora.dora
    kind = f"LoRA of rank {job.lora.rank}" if is_lora else "fine-tuned transformer"
    name = job.hub.repo or ""
    base = job.hub.base_model
    lines = [f"# {name.partition('/')[2]}", "", job.job.description or f"A {kind} for LTX-2.", ""]
    facts = {
        "kind": kind,
        "base model": f"[{base}](https://huggingface.co/{base})" if base else _file_name(job.model.checkpoint_path),
        "trigger word": f"`{trigger}`" if trigger else None,
        "files": ", ".join(f"`{weight}`" for weight in weights),
        "trained for": None if step is None else f"{step:,} steps of {job.training.global_batch_size} clips",
        **{title: f"{value:.4f} at the last step" for title, value in losses.items()},
        "license": license_,
    }
    lines += ["| | |", "|---|---|", *(f"| {key} | {_cell(value)} |" for key, value in facts.items() if value), ""]
    if is_lora:
        lines += [
            "ComfyUI: copy the file to `models/loras` and load it with *LoraLoaderModelOnly*. diffusers:",
            "",
        ]
        lines += ["```python", f'pipe.load_lora_weights("{name}", weight_name="{next(iter(weights))}")', "```", ""]
    if clips:
        lines += ["## Clips", "", "Validation clips of the last step; the seed is fixed.", ""]
        for path, prompt in clips.items():
            lines += [_player(path), "", f"> {_quoted(prompt)}" if prompt else "", ""]
    lines += ["## Training", "", "Trained with ltx_titan. `job.toml` is the job, `metrics.jsonl` its log.", ""]
    metadata = yaml.safe_dump(_metadata(job, is_lora, license_, trigger, clips), sort_keys=False)
    return "\n".join([f"---\n{metadata}---\n", *lines])


def _metadata(
    job: JobConfig, is_lora: bool, license_: str | None, trigger: str | None, clips: Mapping[str, str]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tags": ["ltx-2", "ltx-titan", *(["lora"] if is_lora else [])]}
    metadata["pipeline_tag"] = "text-to-audio" if job.video is None else "text-to-video"
    if license_:
        known = license_.lower() in _LICENSES
        metadata |= {"license": license_.lower()} if known else {"license": "other", "license_name": license_}
    if job.hub.base_model:
        relation = "adapter" if is_lora else "finetune"
        metadata |= {"base_model": job.hub.base_model, "base_model_relation": relation}
    if trigger:
        metadata["instance_prompt"] = trigger
    if clips:
        metadata["widget"] = [{"text": prompt or "-", "output": {"url": path}} for path, prompt in clips.items()]
    return metadata


def _player(path: str) -> str:
    suffix = PurePosixPath(path).suffix
    if suffix == ".wav":
        return f'<audio controls src="{path}"></audio>'
    return f'<video controls src="{path}"></video>' if suffix == ".mp4" else f"![]({path})"


def _file_name(path: str | None) -> str | None:
    return None if path is None else f"`{PurePosixPath(path).name}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")
