"""Useful floating-point operations of a training step, and the share of the hardware's peak they reach (MFU).

A product of a token with a weight matrix costs 2 operations per weight. Training runs it forward, and backward once
for the input's gradient and once for the weight's: 6 per weight and token. Attention multiplies queries with keys and
scores with values, 2 x Sq x Sk x width each; backward is twice that: 12 x Sq x Sk x width in all.

"Useful" leaves out what a faster implementation would not do: recomputation under activation checkpointing, the
recomputation inside flash attention, padding. Modulation (AdaLN) is left out as well: its matrices act on the few
distinct timesteps of a clip, not on tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Trained = Literal["full", "lora"]


@dataclass(frozen=True)
class Flops:
    """Operations of one training step for one part of the model."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        """Both kinds together."""
        return self.linear + self.attention


def layer_flops(
    config: Mapping[str, Any], *, video_tokens: int, audio_tokens: int, text_tokens: int, trained: Trained = "full"
) -> Flops:
    """Operations of one transformer block for one sample, forward and backward.

    With the widths v (video) and a (audio; also the inner width of both cross-modal attentions), and H heads, the
    weights that a token meets are

        video: 14 v^2 (self-attention 4, text attention's q and out 2, feed-forward 8) + 4 v a (cross-modal) + 3 H v
            (gates)
        audio: 14 a^2 + 4 a^2 (cross-modal) + 3 H a (gates)
        text:  2 v^2 + 2 a^2 (keys and values of both text attentions)

    Args:
        config: the `transformer` section of a checkpoint's config.
        video_tokens: tokens of a sample, references included; 0 for an absent stream, which takes the cross-modal
            terms away.
        audio_tokens: the same.
        text_tokens: tokens of the prompt.
        trained: "lora" counts 4 instead of 6 per frozen weight (no weight gradient) and leaves out the adapters
            themselves, about 1 % at rank 32.
    """
    video, audio = _Stream.video(config), _Stream.audio(config)
    is_gated = bool(config.get("apply_gated_attention", False))
    v, a = video.width, audio.width
    weights_times_tokens = 0
    scores_times_width = 0
    for stream, tokens in ((video, video_tokens), (audio, audio_tokens)):
        if tokens == 0:
            continue
        width = stream.width
        weights_times_tokens += tokens * (14 * width**2 + is_gated * 2 * stream.heads * width)
        weights_times_tokens += text_tokens * 2 * width * stream.context_width
        scores_times_width += (tokens**2 + tokens * text_tokens) * width
    if video_tokens and audio_tokens:
        # Both cross-modal attentions work at the audio width; q and out act on their own stream, k and v on the other
        # one.
        weights_times_tokens += video_tokens * 4 * v * a + audio_tokens * 4 * a**2
        weights_times_tokens += is_gated * (video_tokens * audio.heads * v + audio_tokens * audio.heads * a)
        scores_times_width += 2 * video_tokens * audio_tokens * a
    return Flops((6 if trained == "full" else 4) * weights_times_tokens, 12 * scores_times_width)


def outside_flops(
    config: Mapping[str, Any], *, video_tokens: int, audio_tokens: int, text_tokens: int, trained: Trained = "full"
) -> Flops:
    """Operations outside the blocks for one sample: input, output and (LTX-2 19B) caption projections.

    Input projections cost 4 per weight and token: nothing asks for the gradient of latents or text features. When
    they are frozen, they cost their forward 2, and the output projections 4.
    """
    into, out = (4, 6) if trained == "full" else (2, 4)
    projects_captions = not config.get("caption_proj_before_connector", False)
    linear = 0
    for stream, tokens in ((_Stream.video(config), video_tokens), (_Stream.audio(config), audio_tokens)):
        if tokens == 0:
            continue
        linear += tokens * stream.width * (into * stream.in_channels + out * stream.out_channels)
        if projects_captions:
            width = stream.context_width
            # Frozen, both its matrices lie before anything that is trained.
            second = out if trained == "full" else into
            linear += text_tokens * width * (into * config.get("caption_channels", 3840) + second * width)
    return Flops(linear, 0)


def training_flops(
    config: Mapping[str, Any],
    *,
    video_tokens: int,
    audio_tokens: int,
    text_tokens: int,
    batch: int = 1,
    num_layers: int | None = None,
    trained: Trained = "full",
) -> float:
    """Useful operations of a training step on `batch` samples of equal token counts.

    Args:
        config: the `transformer` section of a checkpoint's config.
        video_tokens: tokens of a sample; 0 where the stream is absent.
        audio_tokens: the same.
        text_tokens: tokens of the prompt.
        batch: samples in the step.
        num_layers: blocks, if not the config's.
        trained: see `layer_flops`.
    """
    tokens = {"video_tokens": video_tokens, "audio_tokens": audio_tokens, "text_tokens": text_tokens}
    layers = config.get("num_layers", 48) if num_layers is None else num_layers
    layer = layer_flops(config, **tokens, trained=trained)
    outside = outside_flops(config, **tokens, trained=trained)
    return float(batch * (layers * layer.total + outside.total))


@dataclass(frozen=True)
class _Stream:
    width: int
    heads: int
    context_width: int
    in_channels: int
    out_channels: int

    @classmethod
    def video(cls, config: Mapping[str, Any]) -> "_Stream":
        return cls._read(config, "", 128, 4096)

    @classmethod
    def audio(cls, config: Mapping[str, Any]) -> "_Stream":
        return cls._read(config, "audio_", 64, 2048)

    @classmethod
    def _read(cls, config: Mapping[str, Any], prefix: str, head_size: int, context_width: int) -> "_Stream":
        heads = config.get(f"{prefix}num_attention_heads", 32)
        return cls(
            width=heads * config.get(f"{prefix}attention_head_dim", head_size),
            heads=heads,
            context_width=config.get(f"{prefix}cross_attention_dim", context_width),
            in_channels=config.get(f"{prefix}in_channels", 128),
            out_channels=config.get(f"{prefix}out_channels", 128),
        )
