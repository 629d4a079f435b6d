"""Reads a batch: clips become tokens with coordinates, text becomes a context.

A batch is `{source: {field: tensor}}`, on any device:

- a clip has `latents` ([B, C, F, H, W] video, [B, C, T, M] audio), a video also `fps` ([B]; 24 where absent). Its
  optional `present` ([B], bool) is False where a sample has no such stream and the latents are a (finite) stand-in;
- a mask has `mask`;
- `conditions` has `video_prompt_embeds`, `audio_prompt_embeds` (absent: the video's serve both) and
  `prompt_attention_mask` (absent: no text token is masked), as they leave the text connectors.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ltx_titan.conditioning.tokens import (
    Coordinates,
    Grid,
    audio_coordinates,
    patchify_audio,
    patchify_video,
    video_coordinates,
)

Batch = Mapping[str, Mapping[str, Tensor]]

# What older latent files, which have no frame rate, count as.
DEFAULT_FPS = 24.0

_DIMS = {"video": ("batch", "channels", "frames", "rows", "columns"), "audio": ("batch", "channels", "steps", "bins")}


class Clip(NamedTuple):
    """Latents as tokens [B, S, C], their latent sizes and coordinates."""

    tokens: Tensor
    grid: Grid
    coordinates: Coordinates


def read_field(batch: Batch, source: str, name: str) -> Tensor:
    """One field of one source.

    Raises:
        ValueError: if the batch lacks the source, or the source the field.
    """
    if source not in batch:
        raise ValueError(f"the batch has no source {source!r}, only {sorted(batch)}; is its folder among the data's?")
    if name not in batch[source]:
        raise ValueError(f"source {source!r} has no field {name!r}, only {sorted(batch[source])}; prepare it again.")
    return batch[source][name]


def read_clip(batch: Batch, source: str, stream: str, scale_factors: tuple[int, int, int]) -> Clip:
    """A source's latents as tokens, with coordinates from its own grid and frame rate.

    Args:
        batch: the batch.
        source: which source.
        stream: "video" or "audio".
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: if the source is missing or its latents have the wrong number of dims.
    """
    latents = _read_latents(batch, source, stream)
    grid, device = _grid(latents), latents.device
    if stream == "audio":
        return Clip(patchify_audio(latents), grid, audio_coordinates(grid.frames, latents.shape[0], device))
    fps = batch[source].get("fps")
    if fps is None:
        fps = torch.full(latents.shape[:1], DEFAULT_FPS)
    fps = fps.to(device, torch.float32, non_blocking=True)
    return Clip(patchify_video(latents), grid, video_coordinates(grid, fps, scale_factors))


def token_shape(batch: Batch, source: str, stream: str) -> tuple[int, int]:
    """Tokens and channels that `read_clip` would give, from the latents' shape alone."""
    latents = _read_latents(batch, source, stream)
    num_tokens = _grid(latents).num_tokens
    return num_tokens, latents[0].numel() // num_tokens


def read_text(batch: Batch, stream: str) -> tuple[Tensor, Tensor | None]:
    """Context of a stream [B, T, D] and its mask, None where no text token is masked."""
    text = batch.get("conditions", {})
    field = "audio_prompt_embeds" if stream == "audio" and "audio_prompt_embeds" in text else "video_prompt_embeds"
    return read_field(batch, "conditions", field), text.get("prompt_attention_mask")


def _read_latents(batch: Batch, source: str, stream: str) -> Tensor:
    latents = read_field(batch, source, "latents")
    if latents.ndim != len(_DIMS[stream]):
        expected = ", ".join(_DIMS[stream])
        raise ValueError(f"{source}: {stream} latents have shape {list(latents.shape)}; expected [{expected}].")
    return latents


def _grid(latents: Tensor) -> Grid:
    """Latent sizes; audio's bins are part of a token."""
    return Grid(*latents.shape[2:]) if latents.ndim == 5 else Grid(latents.shape[2], 1, 1)
