"""One block of the audio-video transformer.

    1. each stream: self-attention, then attention to its text
    2. attention between the streams, both ways, each reading the other as it was before this step
    3. each stream: feed-forward

Every sub-layer reads rms(x) * (1 + scale) + shift, and most add their result times a gate. Scale, shift and gate are
rows of a learned table of the block plus rows made from the timestep (adaln.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ltx_titan.model.attention import Attention, FeedForward
from ltx_titan.model.config import StreamConfig, TransformerConfig
from ltx_titan.model.ops import gated_residual, modulate, norm_modulate, rms_norm
from ltx_titan.model.perturbations import KeepMasks
from ltx_titan.model.rope import Rotation


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
    rotation: Rotation
    cross_rotation: Rotation | None
    text: Tensor
    text_mask: Tensor | None
    self_mask: Tensor | None


class AVTransformerBlock(nn.Module):
    """A block with a video stream, an audio stream, or both. Parameter names are the checkpoint's."""

    def __init__(self, config: TransformerConfig, *, has_video: bool, has_audio: bool) -> None:
        super().__init__()
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
        if video is not None and video_enabled:
            rows = (self.scale_shift_table + video_inputs.modulation).unbind(2)
            prompt_table = self.prompt_scale_shift_table if self.text_modulation else None
            video = self._attend(video, rows, video_inputs, self.attn1, self.attn2, prompt_table, keep.video_self)
        if audio is not None and audio_enabled:
            audio_rows = (self.audio_scale_shift_table + audio_inputs.modulation).unbind(2)
            prompt_table = self.audio_prompt_scale_shift_table if self.text_modulation else None
            audio = self._attend(
                audio, audio_rows, audio_inputs, self.audio_attn1, self.audio_attn2, prompt_table, keep.audio_self
            )
        if video is not None and audio is not None:
            video, audio = self._exchange(video, audio, video_inputs, audio_inputs, keep, video_enabled, audio_enabled)
        if video is not None and video_enabled:
            video = self._feed_forward(video, rows, video_inputs.index, self.ff)
        if audio is not None and audio_enabled:
            audio = self._feed_forward(audio, audio_rows, audio_inputs.index, self.audio_ff)
        return video, audio

    def _attend(
        self,
        x: Tensor,
        rows: tuple[Tensor, ...],
        inputs: StreamInputs,
        self_attention: Attention,
        text_attention: Attention,
        prompt_table: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """Self-attention, then attention to the text. Rows: shift, scale, gate, ... (6, 7, 8 for the text)."""
        h = norm_modulate(x, rows[1], rows[0], inputs.index, self.eps)
        h = self_attention(h, q_rotation=inputs.rotation, k_rotation=inputs.rotation, mask=inputs.self_mask, keep=keep)
        x = gated_residual(x, h, rows[2], inputs.index)
        if prompt_table is None:
            return x + text_attention(rms_norm(x, self.eps), inputs.text, mask=inputs.text_mask)
        prompt = prompt_table[None, None]
        if inputs.prompt_modulation is not None:
            prompt = prompt + inputs.prompt_modulation
        text = modulate(inputs.text, prompt[:, :, 1], prompt[:, :, 0], None)
        h = norm_modulate(x, rows[7], rows[6], inputs.index, self.eps)
        return gated_residual(x, text_attention(h, text, mask=inputs.text_mask), rows[8], inputs.index)

    def _exchange(
        self,
        video: Tensor,
        audio: Tensor,
        video_inputs: StreamInputs,
        audio_inputs: StreamInputs,
        keep: KeepMasks,
        video_enabled: bool,
        audio_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attention between the streams. Rows: scale, shift for audio-to-video, then for video-to-audio, then gate."""
        # Scale comes before shift in these two tables, unlike in all others.
        video_rows = (self.scale_shift_table_a2v_ca_video[:4] + video_inputs.cross_modulation).unbind(2)
        audio_rows = (self.scale_shift_table_a2v_ca_audio[:4] + audio_inputs.cross_modulation).unbind(2)
        v_index, a_index = video_inputs.index, audio_inputs.index
        v_rotation, a_rotation = video_inputs.cross_rotation, audio_inputs.cross_rotation
        to_video = to_audio = None
        if video_enabled:
            to_video = self.audio_to_video_attn(
                norm_modulate(video, video_rows[0], video_rows[1], v_index, self.eps),
                norm_modulate(audio, audio_rows[0], audio_rows[1], a_index, self.eps),
                q_rotation=v_rotation,
                k_rotation=a_rotation,
            )
        if audio_enabled:
            to_audio = self.video_to_audio_attn(
                norm_modulate(audio, audio_rows[2], audio_rows[3], a_index, self.eps),
                norm_modulate(video, video_rows[2], video_rows[3], v_index, self.eps),
                q_rotation=a_rotation,
                k_rotation=v_rotation,
            )
        if to_video is not None:
            gate = self.scale_shift_table_a2v_ca_video[4:] + video_inputs.cross_gate
            video = _add_exchanged(video, to_video, gate[:, :, 0], keep.audio_to_video)
        if to_audio is not None:
            gate = self.scale_shift_table_a2v_ca_audio[4:] + audio_inputs.cross_gate
            audio = _add_exchanged(audio, to_audio, gate[:, :, 0], keep.video_to_audio)
        return video, audio

    def _feed_forward(
        self, x: Tensor, rows: tuple[Tensor, ...], index: Tensor | None, feed_forward: FeedForward
    ) -> Tensor:
        h = feed_forward(norm_modulate(x, rows[4], rows[3], index, self.eps))
        return gated_residual(x, h, rows[5], index)


def _add_exchanged(x: Tensor, received: Tensor, gate_B1D: Tensor, keep: Tensor | None) -> Tensor:
    return gated_residual(x, received, gate_B1D if keep is None else gate_B1D * keep, None)
