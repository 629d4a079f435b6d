"""LTX audio-video diffusion transformer: noisy tokens of two streams in, velocities out.

Plain single-device code. Parameter names and shapes are those of the official checkpoints (without their prefix
`model.diffusion_model.`). Parallelism, compilation and checkpointing are applied from outside.
"""

from functools import partial
from typing import Literal, NamedTuple

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
    """Projects text features to the width of the stream (LTX-2; later models do it before the connectors)."""

    def __init__(self, in_dim: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, text: Tensor) -> Tensor:
        """[B, T, in_dim] -> [B, T, width]."""
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class StreamEnds(NamedTuple):
    """One stream's modules and tables outside the blocks, and those that condition it on the other stream.

    Built in every forward and not in `__init__`: wrappers replace modules (LoRA, float8) and parameters (FSDP2, TP)
    after construction, and a record made before would keep the old ones.

    Attributes:
        config: sizes of the stream.
        embed: input projection, or the LoRA layer in its place, which has a `weight` too.
        keyframe_embedding: added to tokens of a single pixel frame [1, D], None if the model has none.
        adaln: timestep -> modulation of self-attention, feed-forward (and text attention).
        prompt_adaln: sigma -> modulation of the text, None if the model has none.
        caption_projection: text features -> width of the stream, None if it happens before the connectors.
        cross_adaln, cross_gate_adaln: modulation of the cross-modal attention, None in a model of one stream.
        output_table: shift and scale of the output head [2, D].
        project_out: output projection.
    """

    config: StreamConfig
    embed: nn.Linear
    keyframe_embedding: Tensor | None
    adaln: nn.Module
    prompt_adaln: nn.Module | None
    caption_projection: nn.Module | None
    cross_adaln: nn.Module | None
    cross_gate_adaln: nn.Module | None
    output_table: Tensor
    project_out: nn.Module


class LTXTransformer(nn.Module):
    """Transformer of LTX-2, LTX-2.3 or LTX-2.5, built from a checkpoint's metadata with `from_config`."""

    def __init__(self, config: TransformerConfig, modalities: Modalities, operators: Operators = TORCH) -> None:
        super().__init__()
        if modalities not in ("av", "video", "audio"):
            raise ValueError(f"modalities: expected 'av', 'video' or 'audio', found {modalities!r}.")
        self.config = config
        self.modalities = modalities
        self.operators = for_rotation(operators, config.rope_interleaved)
        has_video, has_audio = modalities != "audio", modalities != "video"
        # LTX-2 does not modulate its text at all; without prompt AdaLN only the blocks' tables do, the same at every
        # sigma.
        has_prompt_adaln = config.text_modulation and config.prompt_adaln
        video, audio = config.video, config.audio
        if has_video:
            self.patchify_proj = nn.Linear(video.in_channels, video.width)
            self.adaln_single = AdaLayerNormSingle(video.width, config.table_rows)
            if has_prompt_adaln:
                self.prompt_adaln_single = AdaLayerNormSingle(video.width, 2)
            if video.caption_dim is not None:
                self.caption_projection = CaptionProjection(video.caption_dim, video.width)
            self.scale_shift_table = nn.Parameter(torch.empty(2, video.width))
            self.proj_out = nn.Linear(video.width, video.out_channels)
            if config.keyframe_embedding:
                self.keyframes_abs_pos_embedding = nn.Parameter(torch.empty(1, video.width))
        if has_audio:
            self.audio_patchify_proj = nn.Linear(audio.in_channels, audio.width)
            self.audio_adaln_single = AdaLayerNormSingle(audio.width, config.table_rows)
            if has_prompt_adaln:
                self.audio_prompt_adaln_single = AdaLayerNormSingle(audio.width, 2)
            if audio.caption_dim is not None:
                self.audio_caption_projection = CaptionProjection(audio.caption_dim, audio.width)
            self.audio_scale_shift_table = nn.Parameter(torch.empty(2, audio.width))
            self.audio_proj_out = nn.Linear(audio.width, audio.out_channels)
        if has_video and has_audio:
            self.av_ca_video_scale_shift_adaln_single = AdaLayerNormSingle(video.width, 4)
            self.av_ca_audio_scale_shift_adaln_single = AdaLayerNormSingle(audio.width, 4)
            # A gate is as wide as the stream that it writes into.
            self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(video.width, 1)
            self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(audio.width, 1)
        self.transformer_blocks = nn.ModuleList(
            AVTransformerBlock(config, has_video=has_video, has_audio=has_audio, operators=self.operators)
            for _ in range(config.num_layers)
        )

    @classmethod
    def from_config(cls, config: dict, modalities: Modalities = "av", operators: Operators = TORCH) -> "LTXTransformer":
        """Builds the transformer that checkpoint metadata describes.

        Parameters that are not layers of torch.nn are left uninitialized: load a checkpoint or call `init_random_`.

        Args:
            config: the `transformer` object of the checkpoint's metadata.
            modalities: which streams to build. One stream alone has no cross-modal attention.
            operators: implementation of the blocks' memory-bound operations (kernel_ops.select_operators).

        Raises:
            ValueError: the metadata describes another architecture; the message names the key.
        """
        return cls(TransformerConfig.from_metadata(config), modalities, operators)

    def forward(
        self, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Predicts the velocity (noise - data) of every token.

        Args:
            video, audio: the streams; nothing attends to an absent one (None).
            perturbations: attention to skip, for guidance.

        Returns:
            Video velocity [B, S, C] and audio velocity [B, A, C], None for an absent stream.

        Raises:
            ValueError: both streams are absent, or the model was built without one that is present.
        """
        if video is None and audio is None:
            raise ValueError("LTXTransformer: give at least one of video and audio.")
        for name, stream in (("video", video), ("audio", audio)):
            if stream is not None and self.modalities not in ("av", name):
                raise ValueError(f"LTXTransformer: built with modalities={self.modalities!r}, but {name} was given.")

        video_x = video_inputs = None
        if video is not None:
            video_ends = self._video_ends()
            video_x, video_embedded, video_inputs = self._embed_stream(video_ends, video, audio)
        audio_x = audio_inputs = None
        if audio is not None:
            audio_ends = self._audio_ends()
            audio_x, audio_embedded, audio_inputs = self._embed_stream(audio_ends, audio, video)
        # Masks are made on the device and in the dtype of whichever stream is present.
        anchor = video_x if video_x is not None else audio_x
        assert anchor is not None
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
        video_velocity = audio_velocity = None
        if video_x is not None and video_inputs is not None:
            video_velocity = self._project_out(video_ends, video_x, video_embedded, video_inputs.index)
        if audio_x is not None and audio_inputs is not None:
            audio_velocity = self._project_out(audio_ends, audio_x, audio_embedded, audio_inputs.index)
        return video_velocity, audio_velocity

    def _video_ends(self) -> StreamEnds:
        config, has_audio = self.config, self.modalities == "av"
        return StreamEnds(
            config=config.video,
            embed=self.patchify_proj,
            keyframe_embedding=self.keyframes_abs_pos_embedding if config.keyframe_embedding else None,
            adaln=self.adaln_single,
            prompt_adaln=self.prompt_adaln_single if config.text_modulation and config.prompt_adaln else None,
            caption_projection=self.caption_projection if config.video.caption_dim is not None else None,
            cross_adaln=self.av_ca_video_scale_shift_adaln_single if has_audio else None,
            cross_gate_adaln=self.av_ca_a2v_gate_adaln_single if has_audio else None,
            output_table=self.scale_shift_table,
            project_out=self.proj_out,
        )

    def _audio_ends(self) -> StreamEnds:
        config, has_video = self.config, self.modalities == "av"
        return StreamEnds(
            config=config.audio,
            embed=self.audio_patchify_proj,
            keyframe_embedding=None,
            adaln=self.audio_adaln_single,
            prompt_adaln=self.audio_prompt_adaln_single if config.text_modulation and config.prompt_adaln else None,
            caption_projection=self.audio_caption_projection if config.audio.caption_dim is not None else None,
            cross_adaln=self.av_ca_audio_scale_shift_adaln_single if has_video else None,
            cross_gate_adaln=self.av_ca_v2a_gate_adaln_single if has_video else None,
            output_table=self.audio_scale_shift_table,
            project_out=self.audio_proj_out,
        )

    def _embed_stream(
        self, ends: StreamEnds, own: Modality, other: Modality | None
    ) -> tuple[Tensor, Tensor, StreamInputs]:
        """Embeds one stream's tokens and computes the inputs that all blocks share.

        Returns:
            Tokens [B, S, D], timestep embedding [B, K, D] for the output head, and the block inputs.
        """
        config = self.config
        # Not autocast: latents and text are cast here, sigma, timesteps and positions stay float32.
        dtype = ends.embed.weight.dtype
        x = ends.embed(own.latent.to(dtype))
        if ends.keyframe_embedding is not None and own.keyframes_mask is not None:
            x = x + (own.keyframes_mask > 0).to(dtype) * ends.keyframe_embedding.to(dtype)

        values, index = own.timestep_values, own.timestep_index
        if values is None:
            values, index = distinct_timesteps(own.timesteps)
        elif values.shape[1] == 1:
            index = None
        modulation, embedded = ends.adaln(values * config.timestep_scale)

        # Text modulation follows the sample's sigma, also for clean tokens with timestep 0.
        prompt_modulation = None
        if ends.prompt_adaln is not None:
            # [B, 1]: one "distinct timestep" per sample, so the module is the same as for tokens.
            prompt_modulation, _ = ends.prompt_adaln(own.sigma[:, None] * config.timestep_scale)

        text = own.context.to(dtype)
        if ends.caption_projection is not None:
            text = ends.caption_projection(text)

        cross_modulation = cross_gate = None
        if other is not None:
            assert ends.cross_adaln is not None and ends.cross_gate_adaln is not None
            # Scale and shift follow the stream's own timesteps, the gate the other stream's sigma.
            cross_modulation, _ = ends.cross_adaln(values * config.timestep_scale)
            cross_gate, _ = ends.cross_gate_adaln(other.sigma[:, None] * config.cross_gate_timestep_scale)

        rotation, cross_rotation = self._rotations(ends.config, own, with_cross=other is not None)
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
        """RoPE cos/sin over all axes, and over time alone for the cross-modal attention."""
        # Disabled for torch.compile: a rewritten division moves cos by 2e-3, see rope.py.
        values, index = own.coordinate_values, own.coordinate_index
        if values is None:
            # Positions never reach the dtype of the model: bfloat16 coordinates would make phases meaningless.
            values, index = distinct_coordinates(midpoints(own.positions.float()))
        assert index is not None, "coordinate_values without coordinate_index"
        config = self.config
        tables_of = partial(
            rotary_tables, heads=stream.heads, theta=config.rope_theta, double_precision=config.rope_double_precision
        )
        tables = tables_of(values, index, width=stream.width, max_positions=stream.max_positions)
        rotation = self.operators.rotation(tables)
        if not with_cross:
            return rotation, None
        # Both streams share width and max_position here, so that equal times have equal phases.
        cross = tables_of(
            values[:1],
            index[:, :1],
            width=config.audio.width,
            max_positions=(max(config.video.max_positions[0], config.audio.max_positions[0]),),
        )
        return rotation, self.operators.rotation(cross)

    def _project_out(self, ends: StreamEnds, x: Tensor, embedded: Tensor, index: Tensor | None) -> Tensor:
        """Output head: LayerNorm (it subtracts the mean, unlike all other norms), modulation, projection."""
        shift, scale = Row(embedded, ends.output_table[0]), Row(embedded, ends.output_table[1])
        x = F.layer_norm(x.float(), (x.shape[-1],), eps=self.config.norm_eps).to(x.dtype)
        return ends.project_out(modulate(x, scale, shift, index))


def _text_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Mask [B, T] of 0/1, or already additive floats -> additive [B, 1, 1, T]."""
    if mask is None:
        return None
    # finfo.max instead of infinity: a row that is masked entirely gives a uniform softmax instead of NaN.
    if not mask.is_floating_point():
        mask = (mask.to(dtype) - 1) * torch.finfo(dtype).max
    return mask.to(dtype)[:, None, None, :] if mask.ndim == 2 else mask.to(dtype)


def _self_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Strength in [0, 1], broadcastable to [B, S, S] -> additive [B, 1, S, S]: the logarithm of the strength."""
    if mask is None:
        return None
    limits = torch.finfo(dtype)
    # A strength multiplies the softmax weight, so its logarithm is added to the score.
    logarithm = mask.float().clamp(min=limits.tiny).log()
    return torch.where(mask > 0, logarithm, limits.min).to(dtype)[:, None]
