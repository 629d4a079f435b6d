"""Stand-ins for what a job names and this machine does not have, so that it can be planned on a laptop.

A checkpoint that is not here becomes a released shape, a data set one made-up sample that has everything the job's
conditions read. The job is planned with them like any other; what was put in whose place is said.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.data import write_sample
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, AUDIO_STEPS_PER_SECOND, VIDEO_CHANNELS
from ltx_titan.weights import read_metadata, released_config, scale_factors
from ltx_titan.weights.shapes import RELEASED

Tables = dict[str, Any]
Clip = tuple[int, int, int]

DEFAULT_CLIP: Clip = (768, 448, 89)
_TEXT_TOKENS = 1024
_FPS = 24.0


def parse_clip(text: str) -> Clip:
    """`768x448x89` as width, height, frames.

    Raises:
        ValueError: it is written otherwise.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--clip {text}: expected WIDTHxHEIGHTxFRAMES in pixels, such as 768x448x89.")
    return tuple(int(part) for part in parts)


def stand_in(tables: Tables, folder: Path, *, shape: str | None = None, clip: Clip | None = None) -> list[str]:
    """Replaces what is missing in a job's tables, in place.

    Args:
        tables: section -> key -> value.
        folder: where a made-up sample may be written.
        shape: released model, or JSON file, in place of a checkpoint that is missing; None goes by the file's name.
        clip: width, height and frames of the made-up sample; given, it also replaces data that is here.

    Returns:
        A line for each stand-in.

    Raises:
        ValueError: neither `shape` nor the file's name says which model it is, or no codec makes such a clip.
    """
    notes = _checkpoint(tables, shape)
    data = tables.setdefault("data", {})
    made_up = data.get("source") == "synthetic"
    if made_up and clip is not None:
        width, height, frames = clip
        data["synthetic"] = {**data.get("synthetic", {}), "width": width, "height": height, "num_frames": frames}
    elif not made_up and (clip is not None or not Path(data.get("root") or "").expanduser().is_dir()):
        notes.append(_sample(tables, folder, clip or DEFAULT_CLIP))
    return notes


def _checkpoint(tables: Tables, shape: str | None) -> list[str]:
    model = tables.setdefault("model", {})
    path, notes = model.get("checkpoint_path"), []
    if model.get("init", "checkpoint") == "checkpoint" and not (path and Path(path).expanduser().is_file()):
        shape = shape or next((name for name in RELEASED if name in Path(path or "").name.lower()), None)
        if shape is None:
            raise ValueError(
                f"model.checkpoint_path = {path!r} is not on this machine and its name is not a released model's; say "
                f"which it is with --shape ({', '.join(RELEASED)}, or a JSON file with checkpoint metadata)."
            )
        model |= {"init": "random", "shape": shape}
        model.pop("checkpoint_path", None)
        notes.append(f"checkpoint: {path} is not here, taken as {shape}")
    for key in ("adapter_path", "connectors_path"):
        if model.get(key) and not Path(model[key]).expanduser().is_file():
            notes.append(f"model.{key}: {model.pop(key)} is not here, left out")
    return notes


def _sample(tables: Tables, folder: Path, clip: Clip) -> str:
    """Writes one sample with all that the job reads; references are as large as the clip."""
    config = _config(tables["model"])
    factors = scale_factors(config)
    blocks = {name: tables.get(name) for name in ("video", "audio")}
    strategy = FlexibleStrategy.from_config({"name": "flexible", **deepcopy(blocks)}, factors)
    width, height, frames = clip
    time, rows, columns = factors
    if frames % time != 1 or height % rows or width % columns:
        raise ValueError(
            f"--clip {width}x{height}x{frames}: expected sizes that divide by {columns} and {rows}, and 1 frame more "
            f"than a multiple of {time}."
        )
    grid = ((frames - 1) // time + 1, height // rows, width // columns)
    steps = max(round(AUDIO_STEPS_PER_SECOND * frames / _FPS), 1)
    transformer = config["transformer"]
    video = {
        "latents": torch.zeros(VIDEO_CHANNELS, *grid, dtype=torch.bfloat16),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "fps": _FPS,
    }
    audio = {"latents": torch.zeros(AUDIO_CHANNELS, steps, AUDIO_BINS), "num_time_steps": steps}
    text = {
        "video_context": torch.zeros(_TEXT_TOKENS, transformer.get("cross_attention_dim", 4096), dtype=torch.bfloat16),
        "audio_context": torch.zeros(
            _TEXT_TOKENS, transformer.get("audio_cross_attention_dim", 2048), dtype=torch.bfloat16
        ),
    }
    if not transformer.get("caption_proj_before_connector"):
        width_of_features = transformer.get("caption_channels", 3840)
        text = {key: torch.zeros(_TEXT_TOKENS, width_of_features, dtype=torch.bfloat16) for key in text}
    masks = {"video": torch.ones(grid), "audio": torch.ones(steps)}
    for source in strategy.sources:
        if source == "conditions":
            fields = text
        else:
            stream, is_mask = _purpose(blocks, source)
            fields = {"mask": masks[stream]} if is_mask else (video if stream == "video" else audio)
        write_sample(folder / source / "sample.pt", fields)
    data = tables["data"]
    root = data.get("root")
    data |= {"root": str(folder), "caption_dropout": 0.0}
    return (
        f"data: {root} is not here or set aside, taken as clips of {width}x{height}x{frames} at {_FPS:g} fps with "
        f"finished text contexts of {_TEXT_TOKENS} tokens"
    )


def _config(model: Mapping[str, Any]) -> dict[str, Any]:
    if model.get("init", "checkpoint") == "random":
        return released_config(model["shape"])
    return read_metadata(Path(model["checkpoint_path"]).expanduser()).config


def _purpose(blocks: Mapping[str, Any], source: str) -> tuple[str, bool]:
    """Whose a folder is, and whether it holds masks."""
    for stream, block in blocks.items():
        if block is None:
            continue
        if block.get("latents_dir") == source:
            return stream, False
        for condition in block.get("conditions", ()):
            if condition.get("mask_dir") == source:
                return stream, True
            if condition.get("latents_dir") == source:
                return stream, False
    raise AssertionError(f"no block reads {source}")
