"""Context parallelism after Ulysses: video tokens are split over ranks, and heads are exchanged where all must meet.

    video self-attention    all-to-all: all heads of some tokens -> all tokens of some heads; back after the softmax
    audio to video          video queries are split, audio keys are on every rank: nothing to exchange
    video to audio          video keys and values go to head shards, audio queries take the same heads; heads are joined
    audio self, text        audio is on every rank, text too: nothing to exchange

Only the parameterless softmax inside an attention is replaced. It also cuts padding off, so that attention has true
lengths and needs no mask; tensor parallelism and float8, which pad as well, use it for that with a cp axis of 1.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.collectives import Axis, exchange, gather
from ltx_titan.parallel.tokens import TokenLayout

Stream = Literal["video", "audio"]

# Attention of a block -> stream of its queries, stream of its keys. Text is never padded or split.
_STREAMS: dict[str, tuple[Stream, Stream]] = {
    "attn1": ("video", "video"),
    "audio_attn1": ("audio", "audio"),
    "audio_to_video_attn": ("video", "audio"),
    "video_to_audio_attn": ("audio", "video"),
}


def apply_context_parallel(model: LTXTransformer, layout: TokenLayout) -> None:
    """Gives the attentions between tokens the heads, tokens and lengths they need, in place.

    Args:
        model: its tokens are split by `shard_tokens`.
        layout: what `shard_tokens` returned.
    """
    for block in model.transformer_blocks:
        for name, (queries, keys) in _STREAMS.items():
            attention = getattr(block, name, None)
            if attention is not None:
                attention.softmax = _SplitSoftmax(attention.softmax, layout, queries, keys)


class _SplitSoftmax(nn.Module):
    """Softmax attention whose arguments are this rank's part: heads [B, H, S, K] of tp, video tokens of cp."""

    def __init__(self, core: nn.Module, layout: TokenLayout, queries: Stream, keys: Stream) -> None:
        super().__init__()
        self.core = core
        self.layout = layout
        self.queries = queries
        self.keys = keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """This rank's part of the result; `mask` is of true lengths, without padding."""
        cp = self.layout.cp
        exchanged = cp.size > 1 and self.keys == "video"
        if exchanged and self.queries == "video":
            q, k, v = _tokens_of_some_heads((q, k, v), cp)
        elif exchanged:
            k, v = _tokens_of_some_heads((k, v), cp)
            heads = q.shape[1] // cp.size
            q = q[:, cp.rank * heads : (cp.rank + 1) * heads]

        length = self.layout.video if self.keys == "video" else self.layout.audio
        k, v = k[:, :, :length], v[:, :, :length]
        padding = 0
        if self.queries == self.keys:
            padding = q.shape[2] - length
            q = q[:, :, :length]
        out = F.pad(self.core(q, k, v, mask), (0, 0, 0, padding))

        if exchanged and self.queries == "video":
            return _heads_of_some_tokens(out, cp)
        return gather(out, 1, cp) if exchanged else out


def _tokens_of_some_heads(tensors: tuple[Tensor, ...], cp: Axis) -> tuple[Tensor, ...]:
    """All heads of this rank's tokens -> all tokens of this rank's heads: [B, H, S / cp, K] -> [B, H / cp, S, K]."""
    parts = torch.stack([x.unflatten(1, (cp.size, -1)).movedim(1, 0) for x in tensors], dim=1)
    return exchange(parts, cp).movedim(0, -3).flatten(-3, -2).unbind(0)


def _heads_of_some_tokens(x: Tensor, cp: Axis) -> Tensor:
    """The way back: [B, H / cp, S, K] -> [B, H, S / cp, K]."""
    parts = x.unflatten(2, (cp.size, -1)).movedim(2, 0)
    return exchange(parts, cp).movedim(0, 1).flatten(1, 2)
