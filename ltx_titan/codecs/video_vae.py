"""Video VAE: pixels to latents and back, with diffusers' `AutoencoderKLLTX2Video`.

The metadata of a checkpoint lists the blocks of the encoder and the decoder; constructor arguments and parameter names
are derived from these lists, for the 19B, the 2.3 and any other size. diffusers groups blocks into stages (residual
blocks, then a down- or upsampler), the file numbers them one by one, and the decoder runs its list in reverse;
`VideoVaeLayout` maps between them.

Latents are normalized per channel here, z = (raw - mean) / std: diffusers leaves that to the caller, and the
transformer expects it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from torch import Tensor

from ltx_titan.common.tensors import on_meta
from ltx_titan.weights import CheckpointMetadata, Component, load_module, read_metadata, read_tensors, scale_factors

_ENCODER_STEPS = {
    "compress_space_res": "spatial",
    "compress_time_res": "temporal",
    "compress_all_res": "spatiotemporal",
}
_DECODER_STEPS = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}

# A decoder trained with timestep conditioning expects slightly noisy latents and the matching timestep.
_DECODE_NOISE_SCALE = 0.025
_DECODE_TIMESTEP = 0.05

# Size and stride of spatial tiles, in pixels.
TILE, TILE_STRIDE = 512, 384


@dataclass(frozen=True)
class _Stage:
    """Residual blocks and the resampler after them (None in the last stage), with their indices in the file's list."""

    layers: int
    layers_index: int | None
    step: str | None = None
    step_index: int | None = None
    multiplier: int = 1
    residual: bool = False


@dataclass(frozen=True)
class VideoVaeLayout:
    """Architecture of a video VAE, from its metadata.

    Attributes:
        arguments: keyword arguments of `AutoencoderKLLTX2Video`.
        encoder: stages in execution order; the last one is diffusers' `mid_block`.
        decoder: stages in the order of the file's list, which is the reverse of execution; empty if the decoder is not
            convolutional.
        decoder_length: number of blocks in the decoder's list.
    """

    arguments: dict[str, Any]
    encoder: tuple[_Stage, ...]
    decoder: tuple[_Stage, ...]
    decoder_length: int

    def stored_name(self, name: str) -> str:
        """Name in the file, after `vae.`, of the parameter diffusers calls `name` (`encoder....` or `decoder....`)."""
        half, _, rest = name.partition(".")
        return f"{half}.{self._encoder_name(rest) if half == 'encoder' else self._decoder_name(rest)}"

    def _encoder_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "mid_block":
            return ".".join(["down_blocks", str(self.encoder[-1].layers_index), "res_blocks", *parts[2:]])
        if parts[0] == "down_blocks":
            stage = self.encoder[int(parts[1])]
            if parts[2] == "downsamplers":
                return ".".join(["down_blocks", str(stage.step_index), *parts[4:]])
            return ".".join(["down_blocks", str(stage.layers_index), "res_blocks", *parts[3:]])
        return name

    def _decoder_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "mid_block":
            return self._decoder_stage_name(self.decoder[-1], parts[1:])
        if parts[0] == "up_blocks":
            # up_blocks[0] inverts the last step of the list; the residual blocks before that step follow.
            stage = self.decoder[len(self.decoder) - 2 - int(parts[1])]
            if parts[2] == "upsamplers":
                assert stage.step_index is not None
                return ".".join(["up_blocks", str(self.decoder_length - 1 - stage.step_index), *parts[4:]])
            return self._decoder_stage_name(stage, parts[2:])
        renamed = {"time_embedder": "last_time_embedder", "scale_shift_table": "last_scale_shift_table"}
        return ".".join([renamed.get(parts[0], parts[0]), *parts[1:]])

    def _decoder_stage_name(self, stage: _Stage, parts: list[str]) -> str:
        assert stage.layers_index is not None
        head = ["res_blocks", *parts[1:]] if parts[0] == "resnets" else parts
        return ".".join(["up_blocks", str(self.decoder_length - 1 - stage.layers_index), *head])


def video_vae_layout(vae: dict[str, Any], timestep_conditioning: bool = False) -> VideoVaeLayout:
    """Derives the diffusers configuration from the section `vae` of the metadata.

    Args:
        vae: flat (19B, 2.3 and the convolutional 2.5 file), or nested with `encoder.blocks` (2.5).
        timestep_conditioning: whether the decoder's weights include a time embedder. Not read from the metadata, whose
            flag is not reliable.

    Raises:
        ValueError: diffusers has no counterpart for a block.
    """
    nested = vae.get("encoder") or {}
    encoder = _stages(vae.get("encoder_blocks") or nested.get("blocks"), _ENCODER_STEPS, "vae.encoder_blocks")
    # An LTX-2.5 file with a diffusion decoder has the same convolutional encoder; only that half can be built.
    is_convolutional = vae.get("_class_name", "CausalVideoAutoencoder") == "CausalVideoAutoencoder"
    decoder_blocks = vae.get("decoder_blocks") if is_convolutional else None
    decoder = _stages(decoder_blocks, _DECODER_STEPS, "vae.decoder_blocks") if decoder_blocks else ()

    latent_channels = vae.get("latent_channels", 128)
    patch_size = vae.get("patch_size", nested.get("patch_size", 4))
    down, up = encoder[:-1], decoder[:-1]
    arguments = {
        "in_channels": vae.get("in_channels", 3) if is_convolutional else 3,
        "out_channels": vae.get("out_channels", 3) if is_convolutional else 3,
        "latent_channels": latent_channels,
        "patch_size": patch_size,
        "patch_size_t": 1,
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(down),
        "block_out_channels": _widths(latent_channels, down),
        "layers_per_block": tuple(stage.layers for stage in encoder),
        "downsample_type": tuple(stage.step for stage in down),
        "spatio_temporal_scaling": (True,) * len(down),
        "encoder_causal": True,
        # `spatial_padding_mode`, if present, holds for both halves; absent, their defaults differ: zeros and reflect.
        "encoder_spatial_padding_mode": vae.get(
            "spatial_padding_mode", vae.get("encoder_spatial_padding_mode", "zeros")
        ),
        "spatial_compression_ratio": patch_size * 2 ** sum(stage.step != "temporal" for stage in down),
        "temporal_compression_ratio": 2 ** sum(stage.step != "spatial" for stage in down),
    }
    if decoder:
        arguments |= {
            "decoder_block_out_channels": _widths(vae.get("decoder_base_channels", 128), up),
            "decoder_layers_per_block": tuple(stage.layers for stage in decoder),
            "decoder_spatio_temporal_scaling": (True,) * len(up),
            "decoder_inject_noise": (False,) * len(decoder),
            # The only tuple of the decoder that diffusers reads in execution order.
            "upsample_type": tuple(stage.step for stage in reversed(up)),
            "upsample_residual": tuple(stage.residual for stage in up),
            "upsample_factor": tuple(stage.multiplier for stage in up),
            "timestep_conditioning": timestep_conditioning,
            # Explicit, because the default of the diffusers class is True and released decoders are not causal.
            "decoder_causal": vae.get("causal_decoder", False),
            "decoder_spatial_padding_mode": vae.get("spatial_padding_mode", "reflect"),
        }
    return VideoVaeLayout(arguments, encoder, decoder, len(decoder_blocks or ()))


def _stages(blocks: list[Any] | None, steps: dict[str, str], where: str) -> tuple[_Stage, ...]:
    """Groups a block list into stages: each resampler with the residual blocks before it, the rest at the end."""
    if not blocks:
        raise ValueError(f"metadata config: {where} is missing; the sizes of the video VAE are read from it")
    stages: list[_Stage] = []
    pending = _Stage(layers=0, layers_index=None)
    for index, (kind, options) in enumerate(blocks):
        # Some configs write the number alone.
        options = {"num_layers": options} if isinstance(options, int) else options
        if kind == "res_x" and pending.layers_index is None:
            pending = _Stage(layers=options["num_layers"], layers_index=index)
        elif kind in steps:
            stages.append(
                _Stage(
                    layers=pending.layers,
                    layers_index=pending.layers_index,
                    step=steps[kind],
                    step_index=index,
                    multiplier=options.get("multiplier", 1),
                    residual=options.get("residual", False),
                )
            )
            pending = _Stage(layers=0, layers_index=None)
        else:
            raise ValueError(
                f"metadata config: {where}[{index}] is {kind!r}; expected res_x (one between two steps) or one of "
                f"{sorted(steps)}"
            )
    return (*stages, pending)


def _widths(first: int, stages: Iterable[_Stage]) -> tuple[int, ...]:
    widths = [first]
    for stage in stages:
        widths.append(widths[-1] * stage.multiplier)
    return tuple(widths[1:])


@dataclass(frozen=True)
class VideoCodec:
    """A loaded video VAE. Latents are normalized, as the transformer receives them and datasets store them.

    Attributes:
        vae: the diffusers model; encoder or decoder is None if it was not requested.
        mean: per-channel mean of raw latents [C, 1, 1, 1], float32.
        std: per-channel standard deviation of raw latents [C, 1, 1, 1], float32.
        scale_factors: pixels per latent along (time, height, width).
        time_tiles: size and stride of temporal tiles for decoding, in latent frames; None decodes whole clips.
    """

    vae: AutoencoderKLLTX2Video
    mean: Tensor
    std: Tensor
    scale_factors: tuple[int, int, int]
    time_tiles: tuple[int, int] | None = None

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encodes pixels [B, 3, F, H, W] in [-1, 1] to normalized latents [B, 128, F', H', W'], float32.

        F' = (F - 1) / 8 + 1, H' = H / 32, W' = W / 32. Returns the mean of the posterior, without sampling.

        Raises:
            ValueError: a size is not a multiple of its scale factor.
        """
        time, height, width = self.scale_factors
        frames, rows, columns = pixels.shape[2:]
        if (frames - 1) % time or rows % height or columns % width:
            raise ValueError(
                f"a clip of {frames} frames of {columns}x{rows} cannot be encoded: frames must be 1 modulo {time}, "
                f"width a multiple of {width}, height of {height}"
            )
        # Normalized in float32 even if the VAE runs in bfloat16: one rounding less.
        raw = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (raw.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decodes normalized latents [B, 128, F', H', W'] to pixels [B, 3, F, H, W], float32, around [-1, 1].

        Args:
            latents: normalized latents.
            generator: draws the noise that a decoder with timestep conditioning needs (some 19B files).
        """
        latents = latents.to(self.vae.device, torch.float32)
        timestep = None
        if self.vae.config.timestep_conditioning:
            assert generator is not None, "a decoder with timestep conditioning draws noise: pass a generator"
            noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents.device)
            # Noise is added to normalized latents: all channels have a standard deviation of about 1, so one scale fits
            # them.
            latents = _DECODE_NOISE_SCALE * noise + (1 - _DECODE_NOISE_SCALE) * latents
            timestep = torch.full((latents.shape[0],), _DECODE_TIMESTEP, device=latents.device, dtype=self.vae.dtype)
        raw = (latents * self.std + self.mean).to(self.vae.dtype)
        if self.time_tiles is None:
            return self.vae.decode(raw, timestep).sample.float()
        return self._decode_in_time_tiles(raw, timestep, *self.time_tiles)

    def _decode_in_time_tiles(self, raw: Tensor, timestep: Tensor | None, tile: int, stride: int) -> Tensor:
        """Decodes overlapping temporal tiles and cross-fades between them.

        Not diffusers' temporal tiling, which drops the last frame of every later tile instead of the first: everything
        after the first seam is one frame late there, and the cross-fade mixes different frames.
        """
        frames, time = raw.shape[2], self.scale_factors[0]
        parts: list[Tensor] = []
        for start in range(0, frames, stride):
            decoded = self.vae.decode(raw[:, :, start : start + tile], timestep).sample.float()
            if parts:
                # A tile's first latent frame decodes to one frame, as if it started the clip, but covers several.
                decoded = decoded[:, :, 1:]
                end = sum(part.shape[2] for part in parts)
                # Pixel frame of this tile's second latent frame: frame 0, then `time` frames per latent frame.
                overlap = end - (start * time + 1)
                previous, parts[-1] = parts[-1][:, :, -overlap:], parts[-1][:, :, :-overlap]
                # Midpoints: neither tile's edge frame has weight 0 or 1, so both contribute to every frame of the
                # overlap.
                weight = (torch.arange(overlap, device=raw.device) + 0.5)[:, None, None] / overlap
                decoded = torch.cat(
                    [torch.lerp(previous, decoded[:, :, :overlap], weight), decoded[:, :, overlap:]], dim=2
                )
            parts.append(decoded)
            if start + tile >= frames:  # this tile reached the end; another would be within it
                break
        return torch.cat(parts, dim=2)


def load_video_codec(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    part: Literal["both", "encoder", "decoder"] = "both",
    tiling: bool = False,
) -> VideoCodec:
    """Loads the video VAE of a single-file checkpoint or of a split pack's VAE file.

    Args:
        path: the safetensors file.
        device: destination.
        dtype: of its weights; float32 on a CPU, bfloat16 on a GPU.
        part: preprocessing needs the encoder only, sampling the decoder only; the other half is not read.
        tiling: process frames in tiles of 512 px that overlap by 128 px, for large frames on small GPUs. Results
            differ slightly near the seams.

    Raises:
        ValueError: the file has no such VAE, or its weights do not match its metadata.
    """
    metadata = read_metadata(path)
    section = metadata.section("vae", "video VAE")
    prefix = metadata.prefix("vae.")
    has_time_embedder = f"{prefix}decoder.last_scale_shift_table" in metadata.tensors
    layout = video_vae_layout(section, timestep_conditioning=has_time_embedder)
    if part != "encoder" and not layout.decoder:
        # diffusers has the class, but its portable attention materializes a mask of all token pairs: 167 GiB for a clip
        # of 137 frames of 768x512. The practical alternative is a kernel (NATTEN) that diffusers downloads; we do not.
        raise ValueError(
            f"{path}: the decoder is a {section.get('_class_name')}, expected a CausalVideoAutoencoder: diffusers' "
            "LTX2VideoDiffusionDecoderModel needs a kernel from the network (NATTEN) for clips of useful size. Decode "
            "with the pack's convolutional VAE file (its name has '-conv-'), whose encoder is the same"
        )
    with on_meta():
        vae = AutoencoderKLLTX2Video(**layout.arguments)
    mean, std = latent_statistics(metadata, layout.arguments["latent_channels"], device)
    vae.latents_mean, vae.latents_std = mean.flatten(), std.flatten()
    for half in ("encoder", "decoder"):
        if part not in ("both", half):
            setattr(vae, half, None)
            continue
        module = getattr(vae, half)
        keys = {name: prefix + layout.stored_name(f"{half}.{name}") for name in module.state_dict()}
        component = Component.from_keys(f"{half} of the video VAE", keys, prefixes=(f"{prefix}{half}.",))
        load_module(module, metadata, component, device=device, dtype=dtype)
    vae.requires_grad_(False).eval()
    if tiling:
        vae.enable_tiling(TILE, TILE, tile_sample_stride_height=TILE_STRIDE, tile_sample_stride_width=TILE_STRIDE)
    return VideoCodec(vae, mean, std, scale_factors(metadata.config))


def latent_statistics(metadata: CheckpointMetadata, channels: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of raw latents [C, 1, 1, 1], float32.

    Raises:
        ValueError: the file holds no video VAE of that many channels.
    """
    prefix = metadata.prefix("vae.")
    keys = {name: f"{prefix}per_channel_statistics.{name}-of-means" for name in ("mean", "std")}
    component = Component.from_keys("statistics of the video VAE", keys)
    shapes = dict.fromkeys(keys, (channels,))
    found = read_tensors(metadata, shapes, component, device=device, dtype=torch.float32)
    return found["mean"].view(-1, 1, 1, 1), found["std"].view(-1, 1, 1, 1)
