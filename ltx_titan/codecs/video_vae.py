"""Video VAE: pixels to latents and back, with diffusers' `AutoencoderKLLTX2Video`.

The metadata of a checkpoint lists the blocks of the encoder and the decoder; from these lists come the constructor
arguments and the names of the parameters, for the 19B, the 2.3 and any other size. diffusers groups blocks into
stages (residual blocks, then the change of resolution after them), the file counts them one by one, and the decoder
runs its list from the end; `VideoVaeLayout` holds that correspondence.

Latents are normalised per channel here, z = (raw - mean) / std, since diffusers leaves that to the caller and the
transformer sees nothing else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from torch import Tensor

from ltx_titan.weights.metadata import scale_factors
from ltx_titan.weights.single_file import load_strictly, open_single_file, read_tensors

_ENCODER_STEPS = {
    "compress_space_res": "spatial",
    "compress_time_res": "temporal",
    "compress_all_res": "spatiotemporal",
}
_DECODER_STEPS = {"compress_space": "spatial", "compress_time": "temporal", "compress_all": "spatiotemporal"}

# A decoder trained with timestep conditioning expects slightly noisy latents and the timestep that says so.
_DECODE_NOISE_SCALE = 0.025
_DECODE_TIMESTEP = 0.05

# Pixels of a tile of a frame, and from the start of one to that of the next.
TILE, TILE_STRIDE = 512, 384


@dataclass(frozen=True)
class _Stage:
    """Residual blocks and the change of resolution after them (None in the last stage), with their list places."""

    layers: int
    layers_at: int | None
    step: str | None = None
    step_at: int | None = None
    multiplier: int = 1
    residual: bool = False


@dataclass(frozen=True)
class VideoVaeLayout:
    """A video VAE as its metadata describes it.

    Attributes:
        arguments: keyword arguments of `AutoencoderKLLTX2Video`.
        encoder: stages in execution order; the last one is diffusers' `mid_block`.
        decoder: stages in the order of the file's list, which is the reverse of execution; empty where the decoder
            is not a convolutional one.
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
            return ".".join(["down_blocks", str(self.encoder[-1].layers_at), "res_blocks", *parts[2:]])
        if parts[0] == "down_blocks":
            stage = self.encoder[int(parts[1])]
            if parts[2] == "downsamplers":
                return ".".join(["down_blocks", str(stage.step_at), *parts[4:]])
            return ".".join(["down_blocks", str(stage.layers_at), "res_blocks", *parts[3:]])
        return name

    def _decoder_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "mid_block":
            return self._decoder_stage_name(self.decoder[-1], parts[1:])
        if parts[0] == "up_blocks":
            # up_blocks[0] undoes the last step of the list, then come the residual blocks in front of that step.
            stage = self.decoder[len(self.decoder) - 2 - int(parts[1])]
            if parts[2] == "upsamplers":
                return ".".join(["up_blocks", str(self.decoder_length - 1 - stage.step_at), *parts[4:]])
            return self._decoder_stage_name(stage, parts[2:])
        renamed = {"time_embedder": "last_time_embedder", "scale_shift_table": "last_scale_shift_table"}
        return ".".join([renamed.get(parts[0], parts[0]), *parts[1:]])

    def _decoder_stage_name(self, stage: _Stage, parts: list[str]) -> str:
        head = ["res_blocks", *parts[1:]] if parts[0] == "resnets" else parts
        return ".".join(["up_blocks", str(self.decoder_length - 1 - stage.layers_at), *head])


def video_vae_layout(vae: dict[str, Any], timestep_conditioning: bool = False) -> VideoVaeLayout:
    """Derive the diffusers configuration from the section `vae` of the metadata.

    Args:
        vae: flat (19B, 2.3 and the convolutional 2.5 file), or nested with `encoder.blocks` (2.5).
        timestep_conditioning: whether the decoder's weights include a time embedder; reports about the flag in the
            metadata differ, the weights do not.

    Raises:
        ValueError: a block is of a kind that diffusers has no counterpart for.
    """
    nested = vae.get("encoder") or {}
    encoder = _stages(vae.get("encoder_blocks") or nested.get("blocks"), _ENCODER_STEPS, "vae.encoder_blocks")
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
            # The one tuple of the decoder that diffusers reads in execution order.
            "upsample_type": tuple(stage.step for stage in reversed(up)),
            "upsample_residual": tuple(stage.residual for stage in up),
            "upsample_factor": tuple(stage.multiplier for stage in up),
            "timestep_conditioning": timestep_conditioning,
            "decoder_causal": vae.get("causal_decoder", False),
            "decoder_spatial_padding_mode": vae.get("spatial_padding_mode", "reflect"),
        }
    return VideoVaeLayout(arguments, encoder, decoder, len(decoder_blocks or ()))


def _stages(blocks: list[Any] | None, steps: dict[str, str], where: str) -> tuple[_Stage, ...]:
    """Group a block list: each change of resolution with the residual blocks in front of it, the rest at the end."""
    if not blocks:
        raise ValueError(f"metadata config: {where} is missing; the sizes of the video VAE are read from it")
    stages: list[_Stage] = []
    pending = _Stage(layers=0, layers_at=None)
    for at, (kind, options) in enumerate(blocks):
        options = {"num_layers": options} if isinstance(options, int) else options
        if kind == "res_x" and pending.layers_at is None:
            pending = _Stage(layers=options["num_layers"], layers_at=at)
        elif kind in steps:
            stages.append(
                _Stage(
                    layers=pending.layers,
                    layers_at=pending.layers_at,
                    step=steps[kind],
                    step_at=at,
                    multiplier=options.get("multiplier", 1),
                    residual=options.get("residual", False),
                )
            )
            pending = _Stage(layers=0, layers_at=None)
        else:
            raise ValueError(
                f"metadata config: {where}[{at}] is {kind!r}; expected res_x (one between two steps) or one of "
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
    """A loaded video VAE. Latents are normalised, the form in which the transformer sees them and datasets store them.

    Attributes:
        vae: the diffusers model; the half that was not asked for is None.
        mean: per-channel mean of raw latents [C, 1, 1, 1], float32.
        std: per-channel standard deviation of raw latents [C, 1, 1, 1], float32.
        scale_factors: pixels per latent along (time, height, width).
        time_tiles: latent frames that are decoded at once, and from the start of one such tile to that of the next;
            None decodes whole clips.
    """

    vae: AutoencoderKLLTX2Video
    mean: Tensor
    std: Tensor
    scale_factors: tuple[int, int, int]
    time_tiles: tuple[int, int] | None = None

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels [B, 3, F, H, W] in [-1, 1] to normalised latents [B, 128, F', H', W'], float32.

        F' = (F - 1) / 8 + 1, H' = H / 32, W' = W / 32. The mean of the posterior is taken, nothing is drawn.

        Raises:
            ValueError: a size that does not fit the factors.
        """
        time, height, width = self.scale_factors
        frames, rows, columns = pixels.shape[2:]
        if (frames - 1) % time or rows % height or columns % width:
            raise ValueError(
                f"a clip of {frames} frames of {columns}x{rows} cannot be encoded: frames must be 1 modulo {time}, "
                f"width a multiple of {width}, height of {height}"
            )
        raw = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (raw.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Decode normalised latents [B, 128, F', H', W'] to pixels [B, 3, F, H, W], float32, around [-1, 1].

        Args:
            latents: normalised latents.
            generator: draws the decode noise of a decoder with timestep conditioning (some 19B files); unused else.
        """
        latents = latents.to(self.vae.device, torch.float32)
        timestep = None
        if self.vae.config.timestep_conditioning:
            assert generator is not None, "a decoder with timestep conditioning draws noise: pass a generator"
            noise = torch.randn(latents.shape, generator=generator, device=generator.device).to(latents.device)
            latents = _DECODE_NOISE_SCALE * noise + (1 - _DECODE_NOISE_SCALE) * latents
            timestep = torch.full((latents.shape[0],), _DECODE_TIMESTEP, device=latents.device, dtype=self.vae.dtype)
        raw = (latents * self.std + self.mean).to(self.vae.dtype)
        if self.time_tiles is None:
            return self.vae.decode(raw, timestep).sample.float()
        return self._decode_in_time_tiles(raw, timestep, *self.time_tiles)

    def _decode_in_time_tiles(self, raw: Tensor, timestep: Tensor | None, tile: int, stride: int) -> Tensor:
        """Decodes overlapping parts of a clip and fades from each to the next.

        diffusers' own way drops a later tile's last frame and not its first one, so that all that follows the first
        seam is a frame late and two different moments are mixed in the seam.
        """
        frames, time = raw.shape[2], self.scale_factors[0]
        parts: list[Tensor] = []
        for start in range(0, frames, stride):
            decoded = self.vae.decode(raw[:, :, start : start + tile], timestep).sample.float()
            if parts:
                # A tile's first latent frame becomes one frame, as that of a clip does; it stood for several.
                decoded = decoded[:, :, 1:]
                end = sum(part.shape[2] for part in parts)
                overlap = end - (start * time + 1)
                before, parts[-1] = parts[-1][:, :, -overlap:], parts[-1][:, :, :-overlap]
                share = (torch.arange(overlap, device=raw.device) + 0.5)[:, None, None] / overlap
                decoded = torch.cat(
                    [torch.lerp(before, decoded[:, :, :overlap], share), decoded[:, :, overlap:]], dim=2
                )
            parts.append(decoded)
            if start + tile >= frames:
                break
        return torch.cat(parts, dim=2)


def load_video_codec(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    part: Literal["both", "encoder", "decoder"] = "both",
    tiling: bool = False,
) -> VideoCodec:
    """Load the video VAE of a single-file checkpoint or of a split pack's VAE file.

    Args:
        path: the safetensors file.
        device: where it runs.
        dtype: of its weights; float32 on a CPU, bfloat16 on a GPU.
        part: preprocessing needs the encoder only, sampling the decoder only; the other half is not read.
        tiling: work through frames in tiles of 512 px that overlap by 128 px, for large frames on small GPUs.
            Results change slightly near the seams.

    Raises:
        ValueError: the file holds no such VAE, or its weights do not match its metadata.
    """
    file = open_single_file(path)
    section = file.section("vae", "video VAE")
    prefix = file.prefix("vae.")
    has_time_embedder = f"{prefix}decoder.last_scale_shift_table" in file.names
    layout = video_vae_layout(section, timestep_conditioning=has_time_embedder)
    if part != "encoder" and not layout.decoder:
        # diffusers has the class, but its portable attention makes a mask of all pairs of tokens: 167 GiB for a clip of
        # 137 frames of 768x512. What is practical is a kernel (NATTEN) that it downloads, which nothing here does.
        raise ValueError(
            f"{path}: its decoder is a {section.get('_class_name')}, expected a CausalVideoAutoencoder: diffusers' "
            "LTX2VideoDiffusionDecoderModel needs a kernel from the network (NATTEN) for clips of useful size. Decode "
            "with the pack's convolutional VAE file (its name has '-conv-'), whose encoder is the same"
        )
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**layout.arguments)
    stored = {key: f"{prefix}per_channel_statistics.{key}-of-means" for key in ("mean", "std")}
    channels = layout.arguments["latent_channels"]
    statistics = read_tensors(file, dict.fromkeys(stored.values(), (channels,)), device)
    mean, std = (statistics[stored[key]].float() for key in ("mean", "std"))
    vae.latents_mean, vae.latents_std = mean, std
    for half in ("encoder", "decoder"):
        if part not in ("both", half):
            setattr(vae, half, None)
            continue
        module = getattr(vae, half)
        names = {name: prefix + layout.stored_name(f"{half}.{name}") for name in module.state_dict()}
        load_strictly(module, file, names, covers=(f"{prefix}{half}.",), dtype=dtype, device=device)
    vae.requires_grad_(False).eval()
    if tiling:
        vae.enable_tiling(TILE, TILE, tile_sample_stride_height=TILE_STRIDE, tile_sample_stride_width=TILE_STRIDE)
    return VideoCodec(vae, mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1), scale_factors(file.config))
