"""One block of the audio-video transformer.

    1. each stream: self-attention, then attention to its text
    2. attention between the streams, both ways, each reading the other as it was before this step
    3. each stream: feed-forward

Every sub-layer reads rms(x) * (1 + scale) + shift, and most add their result times a gate. Scale, shift and gate are
rows of a learned table of the block plus rows made from the timestep (adaln.py). What a sub-layer adds is kept apart
until the next one reads the sum, so that adding, norm and modulation are one pass over the tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltx_titan.model.attention import Attention, FeedForward
from ltx_titan.model.config import StreamConfig, TransformerConfig
from ltx_titan.model.ops import TORCH, Modulation, Operators, Row, modulate, norm_modulate_each, rows_of
from ltx_titan.model.perturbations import KeepMasks
from ltx_titan.model.rope import PackedRotation, Rotation


class StreamInputs(NamedTuple):
    """What every block reads about one stream besides its tokens.

    A tuple, not a dataclass: FSDP2 and activation checkpointing look for tensors inside tuples.

    Attributes:
        modulation: rows for self-attention, feed-forward (and text attention) [B, K, 6 | 9, D].
        cross_modulation: scale and shift rows for the attention between the streams [B, K, 4, D]; None for one stream.
        cross_gate: gate row for what the other stream adds [B, 1, 1, D]; None for one stream.
        index: which of the K timesteps each token has [B, S]; None where K is 1.
        prompt_modulation: shift and scale rows for the text [B, 1, 2, D], where the checkpoint has them.
        rotation, cross_rotation: rotary angles for self-attention and for the attention between the streams.
        text: [B, T, D_text].
        text_mask: added to the text attention's scores [B, 1, 1, T].
        self_mask: added to the self-attention's scores [B, 1, S, S].
    """

    modulation: Tensor
    cross_modulation: Tensor | None
    cross_gate: Tensor | None
    index: Tensor | None
    prompt_modulation: Tensor | None
    rotation: Rotation | PackedRotation
    cross_rotation: Rotation | PackedRotation | None
    text: Tensor
    text_mask: Tensor | None
    self_mask: Tensor | None


class Update(NamedTuple):
    """What a sub-layer adds to its stream, not yet added.

    Attributes:
        value: [B, S, D].
        gate: factor on it; None is 1.
    """

    value: Tensor
    gate: Row | None


class AVTransformerBlock(nn.Module):
    """A block with a video stream, an audio stream, or both. Parameter names are the checkpoint's."""

    def __init__(
        self, config: TransformerConfig, *, has_video: bool, has_audio: bool, operators: Operators = TORCH
    ) -> None:
        super().__init__()
        self.operators = operators
        self.eps = config.norm_eps
        self.text_modulation = config.text_modulation

        def attention(queries: StreamConfig, context_dim: int, head_dim: int) -> Attention:
            return Attention(
                queries.width,
                context_dim,
                queries.heads,
                head_dim,
                gated=config.gated_attention,
                eps=config.norm_eps,
                rope_interleaved=config.rope_interleaved,
                operators=operators,
            )

        video, audio = config.video, config.audio
        if has_video:
            self.attn1 = attention(video, video.width, video.head_dim)
            self.attn2 = attention(video, video.context_dim, video.head_dim)
            self.ff = FeedForward(video.width, video.ff_bias)
            self.scale_shift_table = nn.Parameter(torch.empty(config.table_rows, video.width))
            if config.text_modulation:
                self.prompt_scale_shift_table = nn.Parameter(torch.empty(2, video.width))
        if has_audio:
            self.audio_attn1 = attention(audio, audio.width, audio.head_dim)
            self.audio_attn2 = attention(audio, audio.context_dim, audio.head_dim)
            self.audio_ff = FeedForward(audio.width, audio.ff_bias)
            self.audio_scale_shift_table = nn.Parameter(torch.empty(config.table_rows, audio.width))
            if config.text_modulation:
                self.audio_prompt_scale_shift_table = nn.Parameter(torch.empty(2, audio.width))
        if has_video and has_audio:
            self.audio_to_video_attn = attention(video, audio.width, audio.head_dim)
            self.video_to_audio_attn = attention(audio, video.width, audio.head_dim)
            self.scale_shift_table_a2v_ca_video = nn.Parameter(torch.empty(5, video.width))
            self.scale_shift_table_a2v_ca_audio = nn.Parameter(torch.empty(5, audio.width))

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        video_inputs: StreamInputs | None,
        audio_inputs: StreamInputs | None,
        keep: KeepMasks,
        video_enabled: bool,
        audio_enabled: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Updates the tokens of both streams.

        Args:
            video, audio: tokens [B, S, D] of each stream, None where absent.
            video_inputs, audio_inputs: the rest of what is known of each stream.
            keep: attention skipped for some samples.
            video_enabled, audio_enabled: False leaves that stream's tokens as they are.

        Returns:
            The updated video and audio tokens.
        """
        video_update = audio_update = None
        if video is not None and video_enabled:
            rows = rows_of(self.scale_shift_table, video_inputs.modulation)
            prompt_table = self.prompt_scale_shift_table if self.text_modulation else None
            video, video_update = self._attend(
                video, rows, video_inputs, self.attn1, self.attn2, prompt_table, keep.video_self
            )
        if audio is not None and audio_enabled:
            audio_rows = rows_of(self.audio_scale_shift_table, audio_inputs.modulation)
            prompt_table = self.audio_prompt_scale_shift_table if self.text_modulation else None
            audio, audio_update = self._attend(
                audio, audio_rows, audio_inputs, self.audio_attn1, self.audio_attn2, prompt_table, keep.audio_self
            )
        if video is not None and audio is not None:
            video, audio, video_update, audio_update = self._exchange(
                video, audio, video_update, audio_update, video_inputs, audio_inputs, keep, video_enabled, audio_enabled
            )
        if video is not None and video_enabled:
            video = self._feed_forward(video, video_update, rows, video_inputs.index, self.ff)
        if audio is not None and audio_enabled:
            audio = self._feed_forward(audio, audio_update, audio_rows, audio_inputs.index, self.audio_ff)
        return video, audio

    def _attend(
        self,
        x: Tensor,
        rows: tuple[Row, ...],
        inputs: StreamInputs,
        self_attention: Attention,
        text_attention: Attention,
        prompt_table: Tensor | None,
        keep: Tensor | None,
    ) -> tuple[Tensor, Update]:
        """Self-attention, then attention to the text. Rows: shift, scale, gate, ... (6, 7, 8 for the text)."""
        h = self.operators.norm_modulate(x, rows[1], rows[0], inputs.index, self.eps)
        h = self_attention(h, q_rotation=inputs.rotation, k_rotation=inputs.rotation, mask=inputs.self_mask, keep=keep)
        update = Update(h, rows[2])
        if prompt_table is None:
            x, (h,) = self._add_and_norm(x, update, (None,), inputs.index)
            return x, Update(text_attention(h, inputs.text, mask=inputs.text_mask), None)
        prompt = prompt_table[None, None]
        if inputs.prompt_modulation is not None:
            prompt = prompt + inputs.prompt_modulation
        text = modulate(inputs.text, Row(prompt[:, :, 1]), Row(prompt[:, :, 0]), None)
        x, (h,) = self._add_and_norm(x, update, ((rows[7], rows[6]),), inputs.index)
        return x, Update(text_attention(h, text, mask=inputs.text_mask), rows[8])

    def _exchange(
        self,
        video: Tensor,
        audio: Tensor,
        video_update: Update | None,
        audio_update: Update | None,
        video_inputs: StreamInputs,
        audio_inputs: StreamInputs,
        keep: KeepMasks,
        video_enabled: bool,
        audio_enabled: bool,
    ) -> tuple[Tensor, Tensor, Update | None, Update | None]:
        """Attention between the streams. Rows: scale, shift for audio-to-video, then for video-to-audio, then gate."""
        # Scale comes before shift in these two tables, unlike in all others.
        video_rows = rows_of(self.scale_shift_table_a2v_ca_video[:4], video_inputs.cross_modulation)
        audio_rows = rows_of(self.scale_shift_table_a2v_ca_audio[:4], audio_inputs.cross_modulation)
        used = [slice(0, 2)] * video_enabled + [slice(2, 4)] * audio_enabled
        video, video_h = self._add_and_norm(video, video_update, [video_rows[s] for s in used], video_inputs.index)
        audio, audio_h = self._add_and_norm(audio, audio_update, [audio_rows[s] for s in used], audio_inputs.index)
        video_update = audio_update = None
        v_rotation, a_rotation = video_inputs.cross_rotation, audio_inputs.cross_rotation
        if video_enabled:
            to_video = self.audio_to_video_attn(video_h[0], audio_h[0], q_rotation=v_rotation, k_rotation=a_rotation)
            gate = self.scale_shift_table_a2v_ca_video[4] + video_inputs.cross_gate[:, :, 0]
            video_update = _kept(to_video, gate, keep.audio_to_video)
        if audio_enabled:
            to_audio = self.video_to_audio_attn(audio_h[-1], video_h[-1], q_rotation=a_rotation, k_rotation=v_rotation)
            gate = self.scale_shift_table_a2v_ca_audio[4] + audio_inputs.cross_gate[:, :, 0]
            audio_update = _kept(to_audio, gate, keep.video_to_audio)
        return video, audio, video_update, audio_update

    def _feed_forward(
        self, x: Tensor, update: Update, rows: tuple[Row, ...], index: Tensor | None, feed_forward: FeedForward
    ) -> Tensor:
        x, (h,) = self._add_and_norm(x, update, ((rows[4], rows[3]),), index)
        return self.operators.gated_residual(x, feed_forward(h), rows[5], index)

    def _add_and_norm(
        self,
        x: Tensor,
        update: Update | None,
        modulations: Sequence[Modulation | None],
        index: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """The stream with its update added, and what is read of it under each modulation."""
        if update is None:
            return x, norm_modulate_each(self.operators.norm_modulate, x, modulations, index, self.eps)
        x, *h = self.operators.gated_residual_norm(x, update.value, update.gate, modulations, index, self.eps)
        return x, h


def _kept(received: Tensor, gate_B1D: Tensor, keep: Tensor | None) -> Update:
    return Update(received, Row(gate_B1D if keep is None else gate_B1D * keep))
