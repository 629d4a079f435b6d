"""Context parallelism after Ulysses: video tokens are sharded, and attention over all of them shards heads instead.

    video self-attention    all-to-all: all heads of some tokens -> all tokens of some heads; reversed after attention
    audio to video          video queries are sharded, audio keys are on every rank: no communication
    video to audio          all-to-all of video keys and values, audio queries of the same heads; all-gather of heads
    audio self, text        audio and text are on every rank: no communication

Only the parameterless softmax attention inside an attention layer is replaced. It also removes padding, so that
attention sees true lengths and needs no mask. Tensor parallelism and float8 pad as well, and use it with `cp = 1`.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.model import LTXTransformer
from ltx_titan.parallel.collectives import Axis, exchange, gather
from ltx_titan.parallel.tokens import TokenLayout

Stream = Literal["video", "audio"]

# Attention of a block -> streams of its queries and keys. Text is never padded or sharded.
_STREAMS: dict[str, tuple[Stream, Stream]] = {
    "attn1": ("video", "video"),
    "audio_attn1": ("audio", "audio"),
    "audio_to_video_attn": ("video", "audio"),
    "video_to_audio_attn": ("audio", "video"),
}


def apply_context_parallel(model: LTXTransformer, layout: TokenLayout) -> None:
    """Replaces the softmax attention of every attention between tokens, in place.

    Args:
        model: a transformer prepared by `shard_tokens`.
        layout: as returned by `shard_tokens`.
    """
    for block in model.transformer_blocks:
        for name, (queries, keys) in _STREAMS.items():
            attention = getattr(block, name, None)
            if attention is not None:
                attention.softmax = _SplitSoftmax(attention.softmax, layout, queries, keys)


class _SplitSoftmax(nn.Module):
    """Softmax attention on this rank's shard [B, H, S, K]: heads over tp, video tokens over cp."""

    def __init__(self, core: nn.Module, layout: TokenLayout, queries: Stream, keys: Stream) -> None:
        super().__init__()
        self.core = core
        self.layout = layout
        self.queries = queries
        self.keys = keys

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attends and returns this rank's shard of the result; `mask` has true lengths, without padding."""
        cp = self.layout.cp
        # Audio keys are on every rank, so only video keys need the other ranks' tokens.
        exchanged = cp.size > 1 and self.keys == "video"
        if exchanged and self.queries == "video":
            q, k, v = _tokens_of_some_heads((q, k, v), cp)
        elif exchanged:
            k, v = _tokens_of_some_heads((k, v), cp)
            heads = q.shape[1] // cp.size
            q = q[:, cp.rank * heads : (cp.rank + 1) * heads]

        # Narrowing to the true length is cheaper than a mask, which costs half of the attention's speed.
        length = self.layout.video if self.keys == "video" else self.layout.audio
        k, v = k[:, :, :length], v[:, :, :length]
        padding = 0
        if self.queries == self.keys:
            # Queries are whole only here; in cross-modal attention they are a shard, and padding is dropped at the end.
            padding = q.shape[2] - length
            q = q[:, :, :length]
        out = F.pad(self.core(q, k, v, mask), (0, 0, 0, padding))

        if exchanged and self.queries == "video":
            return _heads_of_some_tokens(out, cp)
        return gather(out, 1, cp) if exchanged else out


def _tokens_of_some_heads(tensors: tuple[Tensor, ...], cp: Axis) -> tuple[Tensor, ...]:
    """All-to-all from token shards to head shards: each [B, H, S / cp, K] -> [B, H / cp, S, K]."""
    # Stacked, so that queries, keys and values travel in one collective.
    # [cp, n, B, H / cp, S / cp, K], dim 0 the receiving rank; after the all-to-all it is the sending rank, whose tokens
    # are concatenated in rank order.
    parts = torch.stack([x.unflatten(1, (cp.size, -1)).movedim(1, 0) for x in tensors], dim=1)
    return exchange(parts, cp).movedim(0, -3).flatten(-3, -2).unbind(0)


def _heads_of_some_tokens(x: Tensor, cp: Axis) -> Tensor:
    """All-to-all from head shards to token shards: [B, H / cp, S, K] -> [B, H, S / cp, K]."""
    # [cp, B, H / cp, S / cp, K] likewise: each rank gets its own tokens, and heads are concatenated in rank order.
    parts = x.unflatten(2, (cp.size, -1)).movedim(2, 0)
    return exchange(parts, cp).movedim(0, 1).flatten(1, 2)
