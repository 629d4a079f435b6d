"""Placeholders for a job's missing files, so that it can be planned on a laptop.

A missing checkpoint is replaced by a released shape, a missing dataset by one synthetic sample with everything that the
job's conditions read. The job is then planned like any other; every replacement is reported.
"""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.data import read_sample, write_sample
from ltx_titan.data.layout import AUDIO_BINS, AUDIO_CHANNELS, AUDIO_STEPS_PER_SECOND, VIDEO_CHANNELS, Fields, Value
from ltx_titan.model import TransformerConfig
from ltx_titan.weights import read_metadata, released_config, scale_factors
from ltx_titan.weights.shapes import RELEASED

Tables = dict[str, Any]
Clip = tuple[int, int, int]

# The shortest clip of docs/benchmarks, 4,032 video tokens; released models pad prompts to 1,024 tokens.
DEFAULT_CLIP: Clip = (768, 448, 89)
_TEXT_TOKENS = 1024
_FPS = 24.0


def add_placeholders(tables: Tables, folder: Path, *, shape: str | None = None, clip: Clip | None = None) -> list[str]:
    """Replaces missing files in a job's tables, in place.

    Args:
        tables: section -> key -> value.
        folder: folder for a synthetic sample.
        shape: released model, or JSON file, in place of a missing checkpoint; None derives it from the file's name.
        clip: width, height and frames of the synthetic sample; if set, it also replaces existing data.

    Returns:
        One line per placeholder.

    Raises:
        ValueError: neither `shape` nor the file's name identifies the model, or the codecs cannot encode such a clip.
    """
    notes = _checkpoint(tables, shape)
    model = tables["model"]
    has_connectors = model.get("init", "checkpoint") == "checkpoint" or bool(model.get("connectors_path"))
    if tables.pop("validation", None) is not None:
        # Its files need not be on this machine.
        notes.append("validation: not counted")
    data = tables.setdefault("data", {})
    if data.get("source") == "media" and (clip is not None or not _has_media(tables)):
        notes.append("data.source: clips are prepared beforehand; encoding them in each step takes more of both")
        data["source"] = "precomputed"
        data.pop("media", None)
        data.pop("root", None)
    elif data.get("source") == "media":
        return notes
    sources = data.get("sources") or []
    roots = [source["root"] for source in sources] or ([data["root"]] if data.get("root") else [])
    if clip is None and not has_connectors and any(map(_holds_features, roots)):
        data.pop("sources", None)
        _sample(tables, folder, DEFAULT_CLIP)
        width, height, frames = DEFAULT_CLIP
        notes.append(
            f"data: the connectors that {' and '.join(roots)} needs are in the checkpoint; assuming clips of "
            f"{width}x{height}x{frames}, set --clip to the size of yours"
        )
        return notes
    if sources and (clip is not None or not all(Path(source["root"]).expanduser().is_dir() for source in sources)):
        notes.append("data.sources: not all found (or overridden by --clip); assuming one dataset without them")
        del data["sources"]
    elif sources:
        return notes
    if data.get("source") == "synthetic":
        if clip is not None:
            width, height, frames = clip
            data["synthetic"] = {**data.get("synthetic", {}), "width": width, "height": height, "num_frames": frames}
        return notes
    root = data.get("root")
    if clip is not None or not root or not Path(root).expanduser().is_dir():
        notes.append(_sample(tables, folder, clip or DEFAULT_CLIP))
    return notes


def _holds_features(root: str) -> bool:
    """Whether prepared data holds text features, which need text connectors; False for finished contexts."""
    first = next((Path(root).expanduser() / "conditions").rglob("*.pt"), None)
    return first is not None and not any(name.endswith("_context") for name in read_sample(first, "text"))


def _has_media(tables: Tables) -> bool:
    """Whether a job's clips can be read and encoded on this machine."""
    media = tables["data"].get("media", {})
    paths = [media.get(key) for key in ("dataset_path", "text_encoder_path")]
    has_checkpoint = tables["model"].get("init", "checkpoint") == "checkpoint"
    return has_checkpoint and all(path and Path(path).expanduser().exists() for path in paths)


def _checkpoint(tables: Tables, shape: str | None) -> list[str]:
    model = tables.setdefault("model", {})
    path, notes = model.get("checkpoint_path"), []
    if model.get("init", "checkpoint") == "checkpoint" and not (path and Path(path).expanduser().is_file()):
        # Official files have the model in their name, such as ltx-2.3-22b-dev.safetensors.
        shape = shape or next((name for name in RELEASED if name in Path(path or "").name.lower()), None)
        if shape is None:
            raise ValueError(
                f"model.checkpoint_path = {path!r}: file not found, and its name is not a released model's; set "
                f"--shape ({', '.join(RELEASED)}, or a JSON file with checkpoint metadata)."
            )
        model |= {"init": "random", "shape": shape}
        model.pop("checkpoint_path", None)
        # Nothing is exported, and a job with DoRA cannot export without a base checkpoint.
        tables["checkpoint"] = {**tables.get("checkpoint", {}), "export": False}
        notes.append(f"checkpoint: {path} not found; assuming {shape}")
    # Their values change neither memory nor time, but planning requires the files.
    for key in ("adapter_path", "connectors_path"):
        if model.get(key) and not Path(model[key]).expanduser().is_file():
            notes.append(f"model.{key}: {model.pop(key)} not found; ignored")
    return notes


def _sample(tables: Tables, folder: Path, clip: Clip) -> str:
    """Writes one sample with everything that the job reads, references in the clip's size; returns a note."""
    config = _config(tables["model"])
    factors = scale_factors(config)
    blocks = {name: tables.get(name) for name in ("video", "audio")}
    strategy = FlexibleStrategy.from_config({"name": "flexible", **deepcopy(blocks)}, factors)
    width, height, frames = clip
    time, rows, columns = factors
    # The causal video VAE encodes the first frame alone and then groups of `time` frames.
    if frames % time != 1 or height % rows or width % columns:
        raise ValueError(
            f"--clip {width}x{height}x{frames}: expected sizes that divide by {columns} and {rows}, and 1 frame more "
            f"than a multiple of {time}."
        )
    grid = ((frames - 1) // time + 1, height // rows, width // columns)
    steps = max(round(AUDIO_STEPS_PER_SECOND * frames / _FPS), 1)
    architecture = TransformerConfig.from_metadata(config["transformer"])
    video: Fields = {
        "latents": torch.zeros(VIDEO_CHANNELS, *grid, dtype=torch.bfloat16),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
        "fps": _FPS,
    }
    audio: Fields = {"latents": torch.zeros(AUDIO_CHANNELS, steps, AUDIO_BINS), "num_time_steps": steps}
    text = {
        f"{name}_context": torch.zeros(_TEXT_TOKENS, stream.stored_context_dim, dtype=torch.bfloat16)
        for name, stream in (("video", architecture.video), ("audio", architecture.audio))
    }
    # Half of a mask is conditioned: with all of it a sample would train nothing. Masks change neither memory nor time.
    masks = {"video": torch.ones(grid), "audio": torch.ones(steps)}
    masks["video"][:, :, : grid[2] // 2] = 0
    masks["audio"][: steps // 2] = 0
    # References have the clip's own size: the largest that training accepts, hence the most memory.
    for source in strategy.sources:
        fields: Mapping[str, Value]
        if source == "conditions":
            fields = text
        else:
            stream, is_mask = _purpose(blocks, source)
            fields = {"mask": masks[stream]} if is_mask else (video if stream == "video" else audio)
        write_sample(folder / source / "sample.pt", fields)
    data = tables["data"]
    root = data.get("root")
    # Contexts have passed the connectors, which is where captions are dropped; the plan refuses both together.
    data |= {"root": str(folder), "caption_dropout": 0.0}
    # Needs text features, too. The estimate counts its passes by the job's own values.
    if "preservation" in tables:
        tables["preservation"] = {**tables["preservation"], "blank_prompt_weight": 0.0}
    return (
        f"data: {root} not found (or overridden by --clip); assuming clips of {width}x{height}x{frames} at {_FPS:g} "
        f"fps with text contexts of {_TEXT_TOKENS} tokens"
    )


def _config(model: Mapping[str, Any]) -> dict[str, Any]:
    if model.get("init", "checkpoint") == "random":
        return released_config(model["shape"])
    return read_metadata(Path(model["checkpoint_path"]).expanduser()).config


def _purpose(blocks: Mapping[str, Any], source: str) -> tuple[str, bool]:
    """The stream that reads a folder, and whether the folder holds masks."""
    for stream, block in blocks.items():
        if block is None:
            continue
        if block.get("latents_dir") == source:
            return stream, False
        if block.get("loss_mask_dir") == source:
            return stream, True
        for condition in block.get("conditions", ()):
            if condition.get("mask_dir") == source:
                return stream, True
            if condition.get("latents_dir") == source:
                return stream, False
    raise AssertionError(f"no block reads {source}")
