"""One block of the audio-video transformer.

    1. each stream: self-attention, then attention to its text
    2. cross-modal attention, both directions, each reading the other stream as it was before this step
    3. each stream: feed-forward

Every sub-layer reads rms(x) * (1 + scale) + shift, and most add their result times a gate. Scale, shift and gate are
the sum of a learned table of the block and an AdaLN embedding of the timestep (adaln.py). The result of a sub-layer is
not added at once but carried along until the next one reads the sum, so that gated residual, norm and modulation are
one pass over the tokens.
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
    """Inputs of every block for one stream, besides its tokens.

    A tuple, not a dataclass: FSDP2 and activation checkpointing look for tensors inside tuples.

    Attributes:
        modulation: AdaLN embeddings of self-attention, feed-forward (and text attention) [B, K, 6 | 9, D].
        cross_modulation: scale and shift embeddings of the cross-modal attention [B, K, 4, D]; None for one stream.
        cross_gate: embedding of the gate on what comes from the other stream [B, 1, 1, D]; None for one stream.
        index: which of the K timesteps each token has [B, S]; None if K is 1.
        prompt_modulation: shift and scale embeddings of the text [B, 1, 2, D]; None if the checkpoint has none.
        rotation, cross_rotation: RoPE cos/sin of the self-attention and of the cross-modal attention.
        text: [B, T, D_text].
        text_mask: added to the text attention's scores [B, 1, 1, T].
        self_mask: added to the self-attention's scores [B, 1, S, S].
    """

    modulation: Tensor
    cross_modulation: Tensor | None
    cross_gate: Tensor | None
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    prompt_modulation: Tensor | None
    rotation: Rotation | PackedRotation
    cross_rotation: Rotation | PackedRotation | None
    text: Tensor
    text_mask: Tensor | None
    self_mask: Tensor | None


class Update(NamedTuple):
    """Result of a sub-layer that is not yet added to its stream.

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
            # No prefix for video: these names date from the video-only LTX-Video.
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
            # Both directions have the audio's head width, the smaller of the two.
            self.audio_to_video_attn = attention(video, audio.width, audio.head_dim)
            self.video_to_audio_attn = attention(audio, video.width, audio.head_dim)
            # Four rows of scale and shift, two per direction, and the gate.
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
            video, audio: tokens [B, S, D] of each stream, None if absent.
            video_inputs, audio_inputs: the other inputs of each stream.
            keep: attention skipped for some samples.
            video_enabled, audio_enabled: False returns that stream's tokens unchanged.

        Returns:
            The updated video and audio tokens.
        """
        # Tables and sub-layers are looked up in every forward: wrappers replace parameters (FSDP2, TP) and modules
        # (LoRA, float8) after construction. They are plain arguments, not a record per stream, because Dynamo would
        # guard on the class of the record in every block.
        video_update = audio_update = None
        if video is not None and video_enabled:
            assert video_inputs is not None
            rows = rows_of(self.scale_shift_table, video_inputs.modulation)
            prompt_table = self.prompt_scale_shift_table if self.text_modulation else None
            video, video_update = self._attend(
                video, rows, video_inputs, self.attn1, self.attn2, prompt_table, keep.video_self
            )
        if audio is not None and audio_enabled:
            assert audio_inputs is not None
            audio_rows = rows_of(self.audio_scale_shift_table, audio_inputs.modulation)
            prompt_table = self.audio_prompt_scale_shift_table if self.text_modulation else None
            audio, audio_update = self._attend(
                audio, audio_rows, audio_inputs, self.audio_attn1, self.audio_attn2, prompt_table, keep.audio_self
            )
        # Also for a disabled stream: it is not updated, but the other stream still reads it as keys and values.
        if video is not None and audio is not None:
            assert video_inputs is not None and audio_inputs is not None
            video, audio, video_update, audio_update = self._cross_attend(
                video, audio, video_update, audio_update, video_inputs, audio_inputs, keep, video_enabled, audio_enabled
            )
        if video is not None and video_enabled:
            assert video_inputs is not None
            video = self._feed_forward(video, video_update, rows, video_inputs.index, self.ff)
        if audio is not None and audio_enabled:
            assert audio_inputs is not None
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
        """Self-attention, then attention to the text.

        Args:
            x: tokens [B, S, D].
            rows: shift, scale, gate of self-attention (0-2), of feed-forward (3-5), of text attention (6-8).
            inputs: of the stream.
            self_attention, text_attention: sub-layers of the stream.
            prompt_table: shift and scale of the text [2, D_text], None if the text attention is not modulated (LTX-2).
            keep: self-attention skipped for some samples [B, 1, 1].

        Returns:
            The tokens, and the text attention's update of them.
        """
        # rows[1] before rows[0]: operators take (scale, shift), the checkpoint's tables store shift first.
        h = self.operators.norm_modulate(x, rows[1], rows[0], inputs.index, self.eps)
        h = self_attention(h, q_rotation=inputs.rotation, k_rotation=inputs.rotation, mask=inputs.self_mask, keep=keep)
        update = Update(h, rows[2])
        if prompt_table is None:
            # The text attention's queries then have a bare norm.
            x, (h,) = self._add_and_norm(x, update, (None,), inputs.index)
            return x, Update(text_attention(h, inputs.text, mask=inputs.text_mask), None)
        # The text's own modulation depends on sigma, not on the tokens' timesteps, hence no index.
        prompt = prompt_table[None, None]
        if inputs.prompt_modulation is not None:
            prompt = prompt + inputs.prompt_modulation
        # Recomputed in every block, because each has its own table; the text is short compared with the video.
        text = modulate(inputs.text, Row(prompt[:, :, 1]), Row(prompt[:, :, 0]), None)
        x, (h,) = self._add_and_norm(x, update, ((rows[7], rows[6]),), inputs.index)
        return x, Update(text_attention(h, text, mask=inputs.text_mask), rows[8])

    def _cross_attend(
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
        """Cross-modal attention.

        Rows of its two tables: scale, shift for audio-to-video, then for video-to-audio, then the gate. Scale comes
        before shift, unlike in all other tables.
        """
        assert video_inputs.cross_modulation is not None and video_inputs.cross_gate is not None
        assert audio_inputs.cross_modulation is not None and audio_inputs.cross_gate is not None
        # The gates (row 4) follow another sigma than scale and shift: the other stream's, one per sample instead of one
        # per token.
        video_rows = rows_of(self.scale_shift_table_a2v_ca_video[:4], video_inputs.cross_modulation)
        audio_rows = rows_of(self.scale_shift_table_a2v_ca_audio[:4], audio_inputs.cross_modulation)
        # Each stream is normed once per direction that runs: as queries of its own and as keys of the other one.
        video_pairs, audio_pairs = [], []
        if video_enabled:
            video_pairs.append((video_rows[0], video_rows[1]))
            audio_pairs.append((audio_rows[0], audio_rows[1]))
        if audio_enabled:
            video_pairs.append((video_rows[2], video_rows[3]))
            audio_pairs.append((audio_rows[2], audio_rows[3]))
        video, video_h = self._add_and_norm(video, video_update, video_pairs, video_inputs.index)
        audio, audio_h = self._add_and_norm(audio, audio_update, audio_pairs, audio_inputs.index)
        video_update = audio_update = None
        v_rotation, a_rotation = video_inputs.cross_rotation, audio_inputs.cross_rotation
        if video_enabled:
            to_video = self.audio_to_video_attn(video_h[0], audio_h[0], q_rotation=v_rotation, k_rotation=a_rotation)
            gate = self.scale_shift_table_a2v_ca_video[4] + video_inputs.cross_gate[:, :, 0]
            video_update = _masked_update(to_video, gate, keep.audio_to_video)
        if audio_enabled:
            # [-1], not [1]: with a disabled video stream the audio-to-video direction is skipped and the list has one
            # entry.
            to_audio = self.video_to_audio_attn(audio_h[-1], video_h[-1], q_rotation=a_rotation, k_rotation=v_rotation)
            gate = self.scale_shift_table_a2v_ca_audio[4] + audio_inputs.cross_gate[:, :, 0]
            audio_update = _masked_update(to_audio, gate, keep.video_to_audio)
        return video, audio, video_update, audio_update

    def _feed_forward(
        self, x: Tensor, update: Update | None, rows: tuple[Row, ...], index: Tensor | None, feed_forward: FeedForward
    ) -> Tensor:
        x, (h,) = self._add_and_norm(x, update, ((rows[4], rows[3]),), index)
        # Added here and not carried into the next block: full checkpointing saves a block's inputs, which a pending
        # update would double.
        return self.operators.gated_residual(x, feed_forward(h), rows[5], index)

    def _add_and_norm(
        self,
        x: Tensor,
        update: Update | None,
        modulations: Sequence[Modulation | None],
        index: Tensor | None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Adds the pending update, and norms and modulates the sum once per modulation."""
        if update is None:
            return x, norm_modulate_each(self.operators.norm_modulate, x, modulations, index, self.eps)
        x, *h = self.operators.gated_residual_norm(x, update.value, update.gate, modulations, index, self.eps)
        return x, h


def _masked_update(value: Tensor, gate_B1D: Tensor, keep: Tensor | None) -> Update:
    """An update that is 0 for samples whose cross-modal attention is skipped (`keep` [B, 1, 1])."""
    return Update(value, Row(gate_B1D if keep is None else gate_B1D * keep))
