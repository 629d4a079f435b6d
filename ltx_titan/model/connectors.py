"""Text connectors: small transformers that turn text features into the context of each stream.

Prompt tokens are moved to the front and the rest of the sequence is filled with learned registers, so the result has no
padding and needs no mask. Connectors are frozen in training and run without gradients.
"""

import torch
from torch import Tensor, nn

from ltx_titan.model.attention import Attention, FeedForward
from ltx_titan.model.config import TransformerConfig
from ltx_titan.model.ops import rms_norm
from ltx_titan.model.rope import Rotation, rotary_tables

_EPS = 1e-6


class _ConnectorBlock(nn.Module):
    def __init__(self, width: int, heads: int, gated: bool, ff_bias: bool, rope_interleaved: bool) -> None:
        super().__init__()
        self.attn1 = Attention(
            width, width, heads, width // heads, gated=gated, eps=_EPS, rope_interleaved=rope_interleaved
        )
        self.ff = FeedForward(width, ff_bias)

    def forward(self, x: Tensor, rotation: Rotation, mask: Tensor | None) -> Tensor:
        """[B, S, width] -> [B, S, width]."""
        # Pre-norm without modulation: text has no timestep.
        x = x + self.attn1(rms_norm(x, _EPS), q_rotation=rotation, k_rotation=rotation, mask=mask)
        return x + self.ff(rms_norm(x, _EPS))


class TextConnector(nn.Module):
    """The connector of one stream.

    Args:
        attention_head_dim, num_attention_heads, num_layers: sizes.
        positional_embedding_theta, positional_embedding_max_pos, rope_type, double_precision_rope: see rope.py;
            coordinates are token indices.
        num_learnable_registers: length of the register cycle, or None to keep and mask the padding.
        apply_gated_attention: per-head output gates.
        ff_bias: bias in the feed-forward.
    """

    def __init__(
        self,
        attention_head_dim: int,
        num_attention_heads: int,
        num_layers: int,
        positional_embedding_theta: float = 10000.0,
        positional_embedding_max_pos: tuple[float, ...] = (1,),
        num_learnable_registers: int | None = 128,
        rope_type: str = "split",
        double_precision_rope: bool = False,
        apply_gated_attention: bool = False,
        ff_bias: bool = True,
    ) -> None:
        super().__init__()
        self.width = num_attention_heads * attention_head_dim
        self.heads = num_attention_heads
        self.theta = positional_embedding_theta
        self.max_positions = tuple(positional_embedding_max_pos)
        self.double_precision_rope = double_precision_rope
        self.learnable_registers = None
        if num_learnable_registers is not None:
            self.learnable_registers = nn.Parameter(torch.empty(num_learnable_registers, self.width))
        self.transformer_1d_blocks = nn.ModuleList(
            _ConnectorBlock(self.width, num_attention_heads, apply_gated_attention, ff_bias, rope_type == "interleaved")
            for _ in range(num_layers)
        )

    def forward(self, features: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Refines the features of one stream.

        Args:
            features: [B, S, width].
            attention_mask: [B, S], 1 marks a prompt token; padding may be on either side.

        Returns:
            Context [B, S, width] and its mask [B, S]: all ones with registers.

        Raises:
            ValueError: S is not a multiple of the register count.
        """
        x, mask = features, attention_mask
        additive = None
        # Registers fill the padding, so attention needs no mask.
        if self.learnable_registers is not None:
            x, mask = self._fill_with_registers(x, mask), torch.ones_like(mask)
        else:
            # [B, S] -> [B, 1, 1, S].
            additive = ((mask.to(x.dtype) - 1) * torch.finfo(x.dtype).max)[:, None, None, :]
        rotation = self._rotation(x)
        for block in self.transformer_1d_blocks:
            x = block(x, rotation, additive)
        return rms_norm(x, _EPS), mask

    def _fill_with_registers(self, features: Tensor, mask: Tensor) -> Tensor:
        assert self.learnable_registers is not None
        registers = self.learnable_registers.to(features.dtype)
        tokens = features.shape[1]
        if tokens % registers.shape[0] != 0:
            raise ValueError(
                f"text length {tokens} is not a multiple of the connector's {registers.shape[0]} registers; "
                f"encode captions padded to 1024 tokens."
            )
        # A stable sort moves prompt tokens to the front and keeps their order, whichever side the padding was on.
        order = (1 - mask.int()).argsort(dim=1, stable=True)
        packed = features.gather(1, order[..., None].expand_as(features))
        is_prompt = mask.gather(1, order).bool()[..., None]
        # A register belongs to its absolute position, whatever the length of the prompt before it.
        return torch.where(is_prompt, packed, registers.repeat(tokens // registers.shape[0], 1))

    @torch.compiler.disable
    def _rotation(self, x: Tensor) -> Rotation:
        batch, tokens, _ = x.shape
        # Plain indices, not interval midpoints as for video and audio tokens.
        indices = torch.arange(tokens, device=x.device)
        tables = rotary_tables(
            (indices.float(),),
            indices.expand(batch, 1, tokens),
            width=self.width,
            heads=self.heads,
            max_positions=self.max_positions,
            theta=self.theta,
            double_precision=self.double_precision_rope,
        )
        return tables.expand()


class TextConnectors(nn.Module):
    """The connectors of both streams, under their official names. Build with `from_config`."""

    def __init__(self, video: TextConnector, audio: TextConnector) -> None:
        super().__init__()
        self.video_embeddings_connector = video
        self.audio_embeddings_connector = audio

    @property
    def fills_padding(self) -> bool:
        """Whether registers replace the padding, so that the returned mask masks nothing."""
        return self.video_embeddings_connector.learnable_registers is not None

    @classmethod
    def from_config(cls, config: dict) -> "TextConnectors":
        """Builds both connectors from the `config` object of checkpoint metadata (with the key `transformer`)."""
        t = config["transformer"]
        heads, head_dim = t.get("connector_num_attention_heads", 30), t.get("connector_attention_head_dim", 128)
        layers = t.get("connector_num_layers", 2)
        transformer = TransformerConfig.from_metadata(t)
        shared = {
            "positional_embedding_theta": transformer.rope_theta,
            # Released files have 4096. With the reference's default of 1 all phases are off by that factor, and nothing
            # fails.
            "positional_embedding_max_pos": tuple(t.get("connector_positional_embedding_max_pos", (1,))),
            "num_learnable_registers": t.get("connector_num_learnable_registers", 128),
            "rope_type": "interleaved" if transformer.rope_interleaved else "split",
            "double_precision_rope": transformer.rope_double_precision,
            "apply_gated_attention": t.get("connector_apply_gated_attention", False),
            "ff_bias": t.get("connector_ff_bias", True),
        }
        video = TextConnector(head_dim, heads, layers, **shared)
        audio = TextConnector(
            t.get("audio_connector_attention_head_dim", head_dim),
            t.get("audio_connector_num_attention_heads", heads),
            t.get("audio_connector_num_layers", layers),
            **shared,
        )
        return cls(video, audio)

    def forward(
        self, video_features: Tensor, audio_features: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the contexts of both streams.

        Args:
            video_features, audio_features: [B, S, D] from the feature extractor.
            attention_mask: [B, S], 1 marks a prompt token.

        Returns:
            Video context, audio context, and the mask of both [B, S].
        """
        # Both connectors reorder by the same mask, so one returned mask serves both streams.
        video, mask = self.video_embeddings_connector(video_features, attention_mask)
        audio, _ = self.audio_embeddings_connector(audio_features, attention_mask)
        return video, audio, mask
