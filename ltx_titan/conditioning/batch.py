"""Reads a batch: latents become tokens with coordinates, text features become contexts.

A batch is `{source: {field: tensor}}`, on any device:

- a clip has `latents` ([B, C, F, H, W] video, [B, C, T, M] audio), a video also `fps` ([B]; 24 if absent). Its optional
  `present` ([B], bool) is False for a sample without this stream, whose latents are a (finite) placeholder;
- a mask has `mask`;
- `conditions` has `video_prompt_embeds`, `audio_prompt_embeds` (absent: the video's serve both streams) and
  `prompt_attention_mask` (absent: no text token is masked). A dataset stores text either as features, as they leave the
  feature extractor, or as contexts, as they leave the text connectors; `to_contexts` turns the former into the latter.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ltx_titan.conditioning.tokens import (
    Clip,
    Grid,
    audio_coordinates,
    patchify_audio,
    patchify_video,
    video_coordinates,
)
from ltx_titan.config.streams import AudioSection, Mask, Reference, VideoSection
from ltx_titan.data.layout import DEFAULT_FPS
from ltx_titan.model import TextConnectors

Batch = Mapping[str, Mapping[str, Tensor]]


class StreamBatch(NamedTuple):
    """Everything that a batch holds for one stream.

    Attributes:
        target: the clip to generate, or the frozen one, in float32.
        references: clips of the `reference` conditions, by folder.
        masks: stored masks of the `mask` conditions that have an effect [B, ...], by folder.
        present: False for a sample whose latents are a placeholder [B]; None if every sample has the stream.
        context: text that the stream attends to [B, T, D].
        context_mask: 1 for a text token [B, T]; None if no text token is masked.
    """

    target: Clip
    references: dict[str, Clip]
    masks: dict[str, Tensor]
    present: Tensor | None
    context: Tensor
    context_mask: Tensor | None


_DIMS = {"video": ("batch", "channels", "frames", "rows", "columns"), "audio": ("batch", "channels", "steps", "bins")}


def read_stream(
    batch: Batch, stream: str, section: VideoSection | AudioSection, scale_factors: tuple[int, int, int]
) -> StreamBatch:
    """Reads everything of one stream: target, references, masks and text.

    Args:
        batch: the batch.
        stream: "video" or "audio".
        section: the stream's section of the job, whose conditions name the folders of references and masks.
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: a source or field is missing, or latents have the wrong number of dims.
    """
    source = f"{stream}_latents"
    context, context_mask = read_text(batch, stream)
    masks = {
        condition.mask_dir: read_field(batch, condition.mask_dir, "mask")
        for condition, is_applied in zip(section.conditions, section.applied, strict=True)
        if isinstance(condition, Mask) and is_applied
    }
    # References are read whether or not they fire in this step: their sizes are checked in every batch.
    references = {
        condition.latents_dir: read_clip(batch, condition.latents_dir, stream, scale_factors)
        for condition in section.conditions
        if isinstance(condition, Reference)
    }
    target = read_clip(batch, source, stream, scale_factors)
    # Noising is float32 arithmetic; the model casts its inputs itself.
    target = target._replace(tokens=target.tokens.float())
    return StreamBatch(target, references, masks, batch[source].get("present"), context, context_mask)


def read_field(batch: Batch, source: str, name: str) -> Tensor:
    """Reads one field of one source.

    Raises:
        ValueError: the batch lacks the source, or the source the field.
    """
    if source not in batch:
        raise ValueError(f"the batch has no source {source!r}, only {sorted(batch)}; add its folder to the data root.")
    if name not in batch[source]:
        raise ValueError(f"source {source!r} has no field {name!r}, only {sorted(batch[source])}; prepare it again.")
    return batch[source][name]


def read_clip(batch: Batch, source: str, stream: str, scale_factors: tuple[int, int, int]) -> Clip:
    """Reads a source's latents as tokens, with coordinates from its own grid and frame rate.

    Args:
        batch: the batch.
        source: key of the clip.
        stream: "video" or "audio".
        scale_factors: compression factors of the video codec (time, height, width).

    Raises:
        ValueError: the source is missing or its latents have the wrong number of dims.
    """
    latents = _read_latents(batch, source, stream)
    grid, device = latent_grid(latents), latents.device
    if stream == "audio":
        # Audio has no frame rate: its steps have the same length in every file.
        return Clip(patchify_audio(latents), grid, audio_coordinates(grid.frames, latents.shape[0], device))
    fps = batch[source].get("fps")
    if fps is None:
        fps = torch.full(latents.shape[:1], DEFAULT_FPS)
    # The rate of every sample, where the reference trainer takes the first one's for the whole batch. Not blocking: the
    # host must not wait for the device in a training step.
    fps = fps.to(device, torch.float32, non_blocking=True)
    return Clip(patchify_video(latents), grid, video_coordinates(grid, fps, scale_factors))


def token_shape(batch: Batch, source: str, stream: str) -> tuple[int, int]:
    """Number and width of the tokens of `read_clip`, from the shape of the latents alone."""
    latents = _read_latents(batch, source, stream)
    # From shapes, in the loader's threads: patchifying only to measure would copy the latents.
    num_tokens = latent_grid(latents).num_tokens
    return num_tokens, latents[0].numel() // num_tokens


def latent_grid(latents: Tensor) -> Grid:
    """Latent sizes of [B, C, F, H, W] (video) or [B, C, T, M] (audio, whose bins are part of a token)."""
    return Grid(*latents.shape[2:]) if latents.ndim == 5 else Grid(latents.shape[2], 1, 1)


def read_text(batch: Batch, stream: str) -> tuple[Tensor, Tensor | None]:
    """Reads the context of a stream [B, T, D] and its mask, None if no text token is masked."""
    text = batch.get("conditions", {})
    # LTX-2 (19B) has one feature for both streams, which a dataset may store once.
    field = "audio_prompt_embeds" if stream == "audio" and "audio_prompt_embeds" in text else "video_prompt_embeds"
    return read_field(batch, "conditions", field), text.get("prompt_attention_mask")


@torch.no_grad()
def to_contexts(
    conditions: Mapping[str, Tensor], connectors: TextConnectors | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Runs the frozen text connectors on a batch that stores text features; contexts pass through.

    Args:
        conditions: `video_prompt_embeds` [B, T, D_video], optionally `audio_prompt_embeds` [B, T, D_audio] (the video's
            serve both streams if it is missing); features come with `prompt_attention_mask` [B, T], 1 for a prompt
            token.
        connectors: None if the whole dataset stores contexts.
        dtype: dtype to run the connectors in.

    Returns:
        The same fields with contexts instead of features. The mask is dropped if it masks nothing, as after connectors
        with registers: attention without a mask is a third faster.
    """
    mask = conditions.get("prompt_attention_mask")
    if mask is None:
        return dict(conditions)
    # A mask distinguishes features from contexts: contexts are stored without one, because registers fill their
    # padding.
    assert connectors is not None, "the batch holds text features, but no connectors were loaded"
    video = conditions["video_prompt_embeds"].to(dtype)
    audio = conditions["audio_prompt_embeds"].to(dtype) if "audio_prompt_embeds" in conditions else video
    video, audio, mask = connectors(video, audio, mask)
    contexts = {"video_prompt_embeds": video, "audio_prompt_embeds": audio}
    return contexts if connectors.fills_padding else {**contexts, "prompt_attention_mask": mask}


def _read_latents(batch: Batch, source: str, stream: str) -> Tensor:
    latents = read_field(batch, source, "latents")
    if latents.ndim != len(_DIMS[stream]):
        expected = ", ".join(_DIMS[stream])
        raise ValueError(f"{source}: {stream} latents have shape {list(latents.shape)}; expected [{expected}].")
    return latents
