"""Latent upscalers of the two-stage pipelines: latents to latents of more rows and columns, with diffusers' model.

A convolutional network between the two stages of sampling: the first stage samples a clip at a fraction of its size,
the second one refines the upscaled result. The network works on raw latents, and the transformer on normalized ones;
the statistics of the video VAE translate.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from torch import Tensor

from ltx_titan.codecs.video_vae import latent_statistics
from ltx_titan.weights import CheckpointMetadata, Component, load_module, read_metadata

# Key of the file's config -> argument of diffusers' class and the value that a file without the key means.
_ARGUMENTS: dict[str, tuple[str, int | float | bool]] = {
    "in_channels": ("in_channels", 128),
    "mid_channels": ("mid_channels", 1024),
    "num_blocks_per_stage": ("num_blocks_per_stage", 4),
    "dims": ("dims", 3),
    "spatial_upsample": ("spatial_upsample", True),
    "temporal_upsample": ("temporal_upsample", False),
    "spatial_scale": ("rational_spatial_scale", 2.0),
    "rational_resampler": ("use_rational_resampler", False),
}
_SCALES = (1.5, 2.0, 4.0)


@dataclass(frozen=True)
class LatentUpsampler:
    """A loaded upscaler.

    Attributes:
        model: the diffusers model.
        mean, std: of each channel of raw latents [C, 1, 1, 1], float32.
    """

    model: LTX2LatentUpsamplerModel
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        """Upscales normalized latents [B, C, F, H, W] to [B, C, F, scale * H, scale * W], float32."""
        raw = latents.to(self.mean) * self.std + self.mean
        return (self.model(raw.to(self.model.dtype)).float() - self.mean) / self.std


def upscaler_scale(path: str | Path) -> float:
    """Ratio between the sizes after and before a spatial upscaler, from the header of its file.

    Raises:
        ValueError: the file is not a spatial upscaler.
    """
    arguments = _arguments(read_metadata(path))
    return arguments["rational_spatial_scale"] if arguments["use_rational_resampler"] else 2.0


def load_upscaler(
    path: str | Path, vae_path: str | Path, device: str | torch.device, dtype: torch.dtype
) -> LatentUpsampler:
    """Loads a spatial upscaler.

    Args:
        path: official file of the upscaler.
        vae_path: file with the video VAE, whose statistics normalize latents.
        device: destination.
        dtype: of the weights; float32 on a CPU, bfloat16 on a GPU.

    Raises:
        ValueError: a file is not what it should be, or its weights do not match its metadata.
    """
    metadata = read_metadata(path)
    arguments = _arguments(metadata)
    with torch.device("meta"):
        model = LTX2LatentUpsamplerModel(**arguments)
    keys = {name: name for name in model.state_dict()}
    load_module(model, metadata, Component.from_keys("latent upscaler", keys, ("",)), device=device, dtype=dtype)
    mean, std = latent_statistics(read_metadata(vae_path), arguments["in_channels"], device)
    return LatentUpsampler(model.requires_grad_(False).eval(), mean, std)


def _arguments(metadata: CheckpointMetadata) -> dict[str, Any]:
    """Arguments of diffusers' class. The config of an upscaler is not nested in a section of its own."""
    config = metadata.config
    if not any(name.startswith("post_upsample_res_blocks.") for name in metadata.tensors):
        raise ValueError(
            f"{metadata.path}: expected a latent upscaler (ltx-...-spatial-upscaler-...safetensors), found none; use "
            "the official file."
        )
    arguments = {}
    for key, (argument, default) in _ARGUMENTS.items():
        value = config.get(key, default)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, wanted):
            raise ValueError(f"{metadata.path}: config.{key} = {value!r}: expected {default!r} or another of its type.")
        arguments[argument] = value
    if arguments["temporal_upsample"] or not arguments["spatial_upsample"]:
        raise ValueError(
            f"{metadata.path}: expected a spatial upscaler, found a temporal one; use the file with 'spatial' in its "
            "name."
        )
    if arguments["rational_spatial_scale"] not in _SCALES:
        raise ValueError(
            f"{metadata.path}: config.spatial_scale = {arguments['rational_spatial_scale']}: expected one of {_SCALES}."
        )
    return arguments
