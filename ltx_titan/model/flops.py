"""Model FLOPs of a training step, the numerator of MFU.

A matmul of a token with a weight matrix costs 2 FLOPs per weight. Training runs it forward, and backward once for the
input's gradient and once for the weight's: 6 per weight and token. Attention multiplies queries with keys and scores
with values, 2 x Sq x Sk x width each; backward is twice that: 12 x Sq x Sk x width in all.

Model FLOPs omit what a faster implementation would not do: recomputation under activation checkpointing and inside
flash attention, and padding. Modulation (AdaLN) is omitted as well: its matrices act on the few distinct timesteps of a
clip, not on tokens.
"""

from dataclasses import dataclass
from typing import Literal

from ltx_titan.model.config import TransformerConfig

Trained = Literal["full", "lora"]
Passes = Literal["full", "lora", "none"]
"""What is trained in a step; "none" is a forward pass alone."""

# FLOPs per weight and token of blocks and of input and output projections, and per query, key and width of attention.
_LINEAR = {"full": 6, "lora": 4, "none": 2}
_INTO = {"full": 4, "lora": 2, "none": 2}
_OUT = {"full": 6, "lora": 4, "none": 2}
_ATTENTION = {"full": 12, "lora": 12, "none": 4}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training step in one part of the model."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Both kinds together."""
        return self.linear + self.attention


def layer_flops(
    config: TransformerConfig,
    *,
    video_tokens: int,
    audio_tokens: int,
    text_tokens: int,
    trained: Passes = "full",
) -> Flops:
    """FLOPs of one transformer block for one sample, forward and backward.

    With the widths v (video) and a (audio; also the inner width of both cross-modal attentions), and H heads, the
    weights that each token is multiplied with are

        video: 14 v^2 (self-attention 4, text attention's q and out 2, feed-forward 8) + 4 v a (cross-modal) + 3 H v
            (gates)
        audio: 14 a^2 + 4 a^2 (cross-modal) + 3 H a (gates)
        text:  2 v^2 + 2 a^2 (keys and values of both text attentions)

    Args:
        config: architecture of the transformer.
        video_tokens: tokens of a sample, references included; 0 for an absent stream, without cross-modal attention.
        audio_tokens: the same.
        text_tokens: tokens of the prompt.
        trained: "lora" counts 4 instead of 6 per frozen weight (no weight gradient) and omits the adapters
            themselves, about 1 % at rank 32; "none" counts a forward pass alone.
    """
    video, audio = config.video, config.audio
    v, a = video.width, audio.width
    weights_times_tokens = 0
    scores_times_width = 0
    for stream, tokens in ((video, video_tokens), (audio, audio_tokens)):
        if tokens == 0:
            continue
        width = stream.width
        # Self-attention 4, queries and output of the text attention 2, feed-forward 2 x 4.
        weights_times_tokens += tokens * 14 * width**2
        if config.gated_attention:
            weights_times_tokens += tokens * 2 * stream.heads * width
        # Keys and values of the text attention.
        weights_times_tokens += text_tokens * 2 * width * stream.context_dim
        # Self-attention and text attention.
        scores_times_width += (tokens**2 + tokens * text_tokens) * width
    if video_tokens and audio_tokens:
        # Both cross-modal attentions have the audio width; q and out act on their own stream, k and v on the other one.
        weights_times_tokens += video_tokens * 4 * v * a + audio_tokens * 4 * a**2
        if config.gated_attention:
            weights_times_tokens += video_tokens * audio.heads * v + audio_tokens * audio.heads * a
        # Both directions.
        scores_times_width += 2 * video_tokens * audio_tokens * a
    # Attention scores have no weights, so LoRA saves nothing of the 12.
    return Flops(_LINEAR[trained] * weights_times_tokens, _ATTENTION[trained] * scores_times_width)


def outside_flops(
    config: TransformerConfig,
    *,
    video_tokens: int,
    audio_tokens: int,
    text_tokens: int,
    trained: Passes = "full",
) -> Flops:
    """FLOPs outside the blocks for one sample: input, output and (LTX-2 19B) caption projections.

    Input projections cost 4 per weight and token: latents and text features need no gradient. Frozen, they cost their
    forward 2, and the output projections 4.
    """
    into, out = _INTO[trained], _OUT[trained]
    linear = 0
    for stream, tokens in ((config.video, video_tokens), (config.audio, audio_tokens)):
        if tokens == 0:
            continue
        linear += tokens * stream.width * (into * stream.in_channels + out * stream.out_channels)
        if stream.caption_dim is not None:
            width = stream.context_dim
            # Frozen, both its matrices come before anything that is trained.
            second = out if trained == "full" else into
            linear += text_tokens * width * (into * stream.caption_dim + second * width)
    return Flops(linear, 0)


def training_flops(
    config: TransformerConfig,
    *,
    video_tokens: int,
    audio_tokens: int,
    text_tokens: int,
    batch: int = 1,
    num_layers: int | None = None,
    trained: Passes = "full",
) -> float:
    """Model FLOPs of a training step on `batch` samples of equal token counts.

    Args:
        config: architecture of the transformer.
        video_tokens: tokens of a sample; 0 for an absent stream.
        audio_tokens: the same.
        text_tokens: tokens of the prompt.
        batch: samples in the step.
        num_layers: blocks, if not the config's.
        trained: see `layer_flops`.
    """
    tokens = {"video_tokens": video_tokens, "audio_tokens": audio_tokens, "text_tokens": text_tokens}
    layers = config.num_layers if num_layers is None else num_layers
    layer = layer_flops(config, **tokens, trained=trained)
    outside = outside_flops(config, **tokens, trained=trained)
    return float(batch * (layers * layer.total + outside.total))
