"""Attention of the blocks and of the text connectors, and the feed-forward network.

    q = RMSNorm(to_q(x)),  k = RMSNorm(to_k(c)),  v = to_v(c)         norms over the full inner width, before the heads
    o = softmax(rotate(q) rotate(k)^T / sqrt(head_dim) + mask) v
    out = to_out(o * 2 sigmoid(to_gate_logits(x)))                    gate per head, if the checkpoint has it

Letters: `B` samples, `S` query tokens, `T` key tokens, `H` heads, `K` head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltx_titan.model.adapted_linear import project
from ltx_titan.model.float8_trained import feed_forward
from ltx_titan.model.ops import TORCH, HeadShare, Operators
from ltx_titan.model.rope import PackedRotation, Rotation


class SoftmaxAttention(nn.Module):
    """Softmax attention without parameters: a separate module so that context parallelism can wrap it from outside.

    Args:
        backends: implementations to try, the preferred one first; None: torch chooses.
    """

    def __init__(self, backends: tuple[SDPBackend, ...] | None = None) -> None:
        super().__init__()
        self.backends = backends

    def forward(self, q_BHSK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Tensor | None) -> Tensor:
        """[B, H, S, K]; `mask` is added to the scores and broadcasts to [B, H, S, T]."""
        if self.backends is None:
            return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=mask)
        with sdpa_kernel(list(self.backends), set_priority=True):
            return F.scaled_dot_product_attention(q_BHSK, k_BHTK, v_BHTK, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head attention from one stream to itself, to its text, or to the other stream.

    Attributes:
        share: the heads of this rank; set by tensor parallelism, None on one device.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int,
        heads: int,
        head_dim: int,
        *,
        gated: bool,
        eps: float,
        rope_interleaved: bool,
        operators: Operators = TORCH,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        self.head_dim = head_dim
        self.eps = eps
        self.rope_interleaved = rope_interleaved
        self.operators = operators
        self.share: HeadShare | None = None
        self.to_q = nn.Linear(query_dim, inner)
        self.to_k = nn.Linear(context_dim, inner)
        self.to_v = nn.Linear(context_dim, inner)
        # Over all heads at once, not per head. Under tensor parallelism the mean square therefore needs a sum over
        # ranks, see `share`.
        self.q_norm = nn.RMSNorm(inner, eps=eps)
        self.k_norm = nn.RMSNorm(inner, eps=eps)
        self.to_gate_logits = nn.Linear(query_dim, heads) if gated else None
        # A list, because the checkpoint names the projection `to_out.0`.
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim)])
        self.softmax = SoftmaxAttention(operators.attention_backends)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        q_rotation: Rotation | PackedRotation | None = None,
        k_rotation: Rotation | PackedRotation | None = None,
        mask: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Attends from `x` to `context`.

        Args:
            x: [B, S, query_dim].
            context: [B, T, context_dim]; None attends to `x`.
            q_rotation, k_rotation: RoPE cos/sin of all heads, in the form of the operators; None rotates nothing.
            mask: added to the scores, broadcastable to [B, H, S, T].
            keep: [B, 1, 1]; 0 returns the values unmixed (self-attention only), between 0 and 1 blends.

        Returns:
            [B, S, query_dim].
        """
        # Only the weights of the norms are used, in the fused operator: the forward of a replacement would never run.
        assert isinstance(self.q_norm, nn.RMSNorm), "set `share` instead of replacing the norms"
        # Layers of one input together, which is cheaper for adapters. The gates are computed from the queries' input
        # `x`, not from the attention's output.
        if context is None or context is x:
            (q, k, v), gate_logits = project(x, [self.to_q, self.to_k, self.to_v], self.to_gate_logits)
        else:
            (q,), gate_logits = project(x, [self.to_q], self.to_gate_logits)
            (k, v), _ = project(context, [self.to_k, self.to_v])
        q, k = self.operators.qk_norm_rope(
            q,
            k,
            self.q_norm.weight,
            self.k_norm.weight,
            q_rotation,
            k_rotation,
            head_dim=self.head_dim,
            eps=self.eps,
            interleaved=self.rope_interleaved,
            share=self.share,
        )
        # -1: under tensor parallelism a rank has only its share of the heads.
        v = v.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        # The scale 1 / sqrt(head_dim) is torch's default: `head_dim` is the last dim of `q`.
        out_BHSK = self.softmax(q, k, v, mask)
        if keep is not None:
            keep = keep[..., None]
            # Guidance (STG) removes only the mixing of tokens: gate, output projection and AdaLN gate still act on the
            # values. Skipping the whole attention would be another, stronger perturbation.
            out_BHSK = out_BHSK * keep + v * (1 - keep)
        # [B, H, S, K] -> [B, S, H, K]: the gates are [B, S, H], and the heads are merged below.
        out_BSHK = out_BHSK.transpose(1, 2)
        if gate_logits is not None:
            # The factor 2 makes a gate of logit 0 neutral.
            out_BSHK = out_BSHK * (2 * torch.sigmoid(gate_logits))[..., None]
        return self.to_out[0](out_BSHK.flatten(2))


class _Gelu(nn.Module):
    """Input projection and activation, named as in the checkpoint (`net.0.proj`)."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Feed-forward network with tanh GELU and an inner width of 4D. `net.1` has no weights in the checkpoint."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        inner = 4 * width
        # A list with an `Identity` in the middle, so that the second projection gets the checkpoint's name `net.2`.
        self.net = nn.ModuleList([_Gelu(width, inner, bias), nn.Identity(), nn.Linear(inner, width, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, width] -> [B, S, width]."""
        # Trained float8 layers quantize with the activation.
        first = self.net[0]
        assert isinstance(first, _Gelu)
        y = feed_forward(x, first.proj, self.net[2])
        return self.net[2](first(x)) if y is None else y
