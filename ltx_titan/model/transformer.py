"""The LTX audio-video diffusion transformer: noisy tokens of two streams in, velocities out.

Plain single-device code. Parameter names and shapes are those of the official checkpoints (without their prefix
`model.diffusion_model.`). Parallelism, compilation and checkpointing are applied from outside.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.model.adaln import AdaLayerNormSingle, distinct_timesteps
from ltx_titan.model.block import AVTransformerBlock, StreamInputs
from ltx_titan.model.config import StreamConfig, TransformerConfig
from ltx_titan.model.kernel_ops import for_rotation
from ltx_titan.model.modality import Modality
from ltx_titan.model.ops import TORCH, Operators, Row, modulate
from ltx_titan.model.perturbations import KeepMasks, Perturbations
from ltx_titan.model.rope import PackedRotation, Rotation, distinct_coordinates, midpoints, rotary_tables

Modalities = Literal["av", "video", "audio"]


class CaptionProjection(nn.Module):
    """Brings text features to the width of the stream (LTX-2; later models do it before the connectors)."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """[B, T, in_dim] -> [B, T, width]."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class LTXTransformer(nn.Module):
    """The transformer of LTX-2, LTX-2.3 or LTX-2.5, as its checkpoint's metadata says. Build with `from_config`."""

    def __init__(self, config: TransformerConfig, modalities: Modalities, operators: Operators = TORCH) -> None:
        super().__init__()
        if modalities not in ("av", "video", "audio"):
            raise ValueError(f"modalities: expected 'av', 'video' or 'audio', found {modalities!r}.")
        self.config = config
        self.modalities = modalities
        self.operators = for_rotation(operators, config.rope_interleaved)
        has_video, has_audio = modalities != "audio", modalities != "video"
        if has_video:
            self._add_stream(config.video, "")
            if config.keyframe_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, config.video.width))
        if has_audio:
            self._add_stream(config.audio, "audio_")
        if has_video and has_audio:
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(config.video.width, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(config.audio.width, 4)
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(config.video.width, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(config.audio.width, 1)
        self.transformer_blocks = nn.ModuleList(
            AVTransformerBlock(config, has_video=has_video, has_audio=has_audio, operators=self.operators)
            for _ in range(config.num_layers)
        )

    def _add_stream(self, stream: StreamConfig, prefix: str) -> None:
        width = stream.width
        self.add_module(f"{prefix}patchify_proj", nn.Linear(stream.in_channels, width))
        self.add_module(f"{prefix}adaln_single", AdaLayerNormSingle(width, self.config.table_rows))
        if self.config.text_modulation and self.config.prompt_adaln:
            self.add_module(f"{prefix}prompt_adaln_single", AdaLayerNormSingle(width, 2))
        if stream.caption_dim is not None:
            self.add_module(f"{prefix}caption_projection", CaptionProjection(stream.caption_dim, width))
        self.register_parameter(f"{prefix}scale_shift_table", nn.Parameter(torch.empty(2, width)))
        self.add_module(f"{prefix}proj_out", nn.Linear(width, stream.out_channels))

    @classmethod
    def from_config(cls, config: dict, modalities: Modalities = "av", operators: Operators = TORCH) -> "LTXTransformer":
        """Builds the transformer that checkpoint metadata describes.

        Parameters that are not layers of torch.nn are left uninitialised: load a checkpoint or call `init_random_`.

        Args:
            config: the `transformer` object of the checkpoint's metadata.
            modalities: which streams to build. One stream alone has no attention between the streams.
            operators: what the blocks compute with (kernel_ops.select_operators).

        Raises:
            ValueError: the metadata describes something else; the message names the key.
        """
        return cls(TransformerConfig.from_metadata(config), modalities, operators)

    def forward(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predicts the velocity (noise - data) of every token.

        Args:
            video, audio: the streams; None is absent altogether, and then nothing attends to it.
            perturbations: attention to skip, for guidance.

        Returns:
            Video velocity [B, S, C] and audio velocity [B, A, C], None where the stream is absent.

        Raises:
            ValueError: no stream is given, or one that the model was built without.
        """
        if video is None and audio is None:
            raise ValueError("LTXTransformer: give at least one of video and audio.")
        for name, stream in (("video", video), ("audio", audio)):
            if stream is not None and self.modalities not in ("av", name):
                raise ValueError(f"LTXTransformer: built with modalities={self.modalities!r}, but {name} was given.")

        both = video is not None and audio is not None
        video_x, video_e, video_inputs = self._enter("", self.config.video, video, audio) if video else (None,) * 3
        audio_x, audio_e, audio_inputs = (
            self._enter("audio_", self.config.audio, audio, video) if audio else (None,) * 3
        )
        anchor = video_x if video_x is not None else audio_x
        for number, block in enumerate(self.transformer_blocks):
            keep = KeepMasks()
            if perturbations is not None:
                keep = perturbations.keep_masks(number, anchor.device, anchor.dtype)
            video_x, audio_x = block(
                video_x,
                audio_x,
                video_inputs,
                audio_inputs,
                keep,
                video is not None and video.enabled,
                audio is not None and audio.enabled,
            )
        assert both == (video_x is not None and audio_x is not None)
        return (
            self._leave("", video_x, video_e, video_inputs) if video else None,
            self._leave("audio_", audio_x, audio_e, audio_inputs) if audio else None,
        )

    def _enter(
        self, prefix: str, stream: StreamConfig, own: Modality, other: Modality | None
    ) -> tuple[Tensor, Tensor, StreamInputs]:
        """Embeds one stream's tokens and gathers what all blocks will read.

        Returns:
            Tokens [B, S, D], timestep embedding [B, K, D] for the output head, and the block inputs.
        """
        config = self.config
        embed = getattr(self, f"{prefix}patchify_proj")
        dtype = embed.weight.dtype
        x = embed(own.latent.to(dtype))
        if prefix == "" and config.keyframe_embedding and own.keyframes_mask is not None:
            x = x + (own.keyframes_mask > 0).to(dtype) * self.keyframes_abs_pos_embedding.to(dtype)

        values, index = own.timestep_values, own.timestep_index
        if values is None:
            values, index = distinct_timesteps(own.timesteps)
        elif values.shape[1] == 1:
            index = None
        modulation, embedded = getattr(self, f"{prefix}adaln_single")(values * config.timestep_scale)

        prompt_modulation = None
        if config.text_modulation and config.prompt_adaln:
            prompt_adaln = getattr(self, f"{prefix}prompt_adaln_single")
            prompt_modulation, _ = prompt_adaln(own.sigma[:, None] * config.timestep_scale)

        text = own.context.to(dtype)
        if stream.caption_dim is not None:
            text = getattr(self, f"{prefix}caption_projection")(text)

        cross_modulation = cross_gate = None
        if other is not None:
            # Scale and shift follow the stream's own tokens, the gate the other stream's noise level.
            scale_shift = (
                self.av_ca_audio_scale_shift_adaln_single if prefix else self.av_ca_video_scale_shift_adaln_single
            )
            gate = self.av_ca_v2a_gate_adaln_single if prefix else self.av_ca_a2v_gate_adaln_single
            cross_modulation, _ = scale_shift(values * config.timestep_scale)
            cross_gate, _ = gate(other.sigma[:, None] * config.cross_gate_timestep_scale)

        rotation, cross_rotation = self._rotations(stream, own, with_cross=other is not None)
        inputs = StreamInputs(
            modulation=modulation,
            cross_modulation=cross_modulation,
            cross_gate=cross_gate,
            index=index,
            prompt_modulation=prompt_modulation,
            rotation=rotation,
            cross_rotation=cross_rotation,
            text=text,
            text_mask=_text_mask(own.context_mask, dtype),
            self_mask=_self_mask(own.attention_mask, dtype),
        )
        return x, embedded, inputs

    @torch.compiler.disable
    def _rotations(
        self, stream: StreamConfig, own: Modality, with_cross: bool
    ) -> tuple[Rotation | PackedRotation, Rotation | PackedRotation | None]:
        """Rotary angles over all axes, and over time alone for the attention between the streams."""
        values, index = own.coordinate_values, own.coordinate_index
        if values is None:
            values, index = distinct_coordinates(midpoints(own.positions.float()))
        config = self.config
        settings = {"heads": stream.heads, "theta": config.rope_theta, "double_precision": config.rope_double_precision}
        tables = rotary_tables(values, index, width=stream.width, max_positions=stream.max_positions, **settings)
        rotation = self.operators.rotation(tables)
        if not with_cross:
            return rotation, None
        cross = rotary_tables(
            values[:1],
            index[:, :1],
            width=config.audio.width,
            max_positions=(max(config.video.max_positions[0], config.audio.max_positions[0]),),
            **settings,
        )
        return rotation, self.operators.rotation(cross)

    def _leave(self, prefix: str, x: Tensor, embedded: Tensor, inputs: StreamInputs) -> Tensor:
        """Output head: LayerNorm (it subtracts the mean, unlike all other norms), modulation, projection."""
        table = getattr(self, f"{prefix}scale_shift_table")
        shift, scale = Row(embedded, table[0]), Row(embedded, table[1])
        x = F.layer_norm(x.float(), (x.shape[-1],), eps=self.config.norm_eps).to(x.dtype)
        return getattr(self, f"{prefix}proj_out")(modulate(x, scale, shift, inputs.index))


def _text_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """[B, T] of 0/1, or already additive floats -> additive [B, 1, 1, T]."""
    if mask is None:
        return None
    if not mask.is_floating_point():
        mask = (mask.to(dtype) - 1) * torch.finfo(dtype).max
    return mask.to(dtype)[:, None, None, :] if mask.ndim == 2 else mask.to(dtype)


def _self_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Strength in [0, 1], broadcastable to [B, S, S] -> additive [B, 1, S, S]: the logarithm of the strength."""
    if mask is None:
        return None
    limits = torch.finfo(dtype)
    logarithm = mask.float().clamp(min=limits.tiny).log()
    return torch.where(mask > 0, logarithm, limits.min).to(dtype)[:, None]
