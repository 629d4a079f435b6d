"""AdaLN: timestep embedding and the modulation computed from it.

In training a token's timestep is 0 or its sample's sigma, so modulation is computed for the K distinct timesteps of a
sample only: [B, K, rows, D] and an index per token instead of [B, S, rows * D], which for 16k tokens is 1.2 GB that
every block reads again.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of the released checkpoints; `linear_1` has this input width.
_SINUSOID_WIDTH = 256


def sinusoid(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Sinusoidal embedding [..., 256]: cosines, then sines, of t * 10000 ** (-j / 128), j = 0 .. 127.

    Computed in float32, result in `dtype`.
    """
    half = _SINUSOID_WIDTH // 2
    # The divisor is `half`, not half - 1 as in some diffusion codebases, and cosines come first: both as the
    # checkpoints were trained.
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    # float32 even in a bfloat16 model: scaled timesteps reach 1000, where bfloat16 has a step of 4.
    phases = t.float()[..., None] * frequencies
    return torch.cat([phases.cos(), phases.sin()], dim=-1).to(dtype)


class TimestepEmbedder(nn.Module):
    """Two-layer MLP on the sinusoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(_SINUSOID_WIDTH, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        return self.linear_2(F.silu(self.linear_1(sinusoid(t, self.linear_1.weight.dtype))))


class _Embedding(nn.Module):
    """Wraps the embedder under the name that the checkpoint uses (`emb.timestep_embedder`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(width)

    def forward(self, t: Tensor) -> Tensor:
        return self.timestep_embedder(t)


class AdaLayerNormSingle(nn.Module):
    """Maps a scaled timestep to modulation embeddings that all blocks share."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.emb = _Embedding(width)
        self.linear = nn.Linear(width, rows * width)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the modulation of each of K timesteps.

        Args:
            t: scaled timesteps [B, K].

        Returns:
            Modulation [B, K, rows, D], and the timestep embedding that it is computed from [B, K, D].
        """
        embedded = self.emb(t)
        # [B, K, rows * D] -> [B, K, rows, D]. The output head reads the embedding itself, not a row of the modulation.
        return self.linear(F.silu(embedded)).unflatten(-1, (self.rows, -1)), embedded


def distinct_timesteps(timesteps: Tensor) -> tuple[Tensor, Tensor | None]:
    """Finds the distinct timesteps of a batch without `timestep_values`; the host waits for the device.

    Args:
        timesteps: [B, S], [B, S, 1] or [B, 1].

    Returns:
        Values [B, K] and the index of each token's value [B, S], or None if each sample has a single timestep.
    """
    flat = timesteps.reshape(timesteps.shape[0], -1)
    if flat.shape[1] == 1:
        return flat, None
    # One list for the whole batch: samples share the values, and K is their number over all samples.
    values, index = flat.unique(return_inverse=True)
    return values.expand(flat.shape[0], -1), index
