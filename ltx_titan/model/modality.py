"""Input of the transformer for one stream of tokens (video or audio), as one immutable record.

`sigma` and `timesteps` are two inputs on purpose: a conditioned token has timestep 0 while its sample's `sigma` still
drives the prompt modulation and the gates of the cross-modal attention.

The optional fields at the end hold `timesteps` and `positions` in a compact form: distinct values and an index per
token. Whoever builds a batch knows them from shapes and masks alone. Without them the transformer calls `unique`,
which makes the host wait for the device, and whose result size may change from step to step and recompile the blocks.
`Modality.from_sigma` and `Modality.from_fractions` are the only code that fills the compact timesteps.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """One stream. `B` samples, `S` tokens, `C` latent channels, `T` text tokens, `D` text width, `n` position axes.

    Attributes:
        latent: noisy tokens [B, S, C].
        sigma: sigma of each sample [B], in [0, 1], float32; 0 for a frozen stream.
        timesteps: timestep of each token [B, S], [B, S, 1] or [B, 1], in [0, 1], float32; 0 for a clean token.
        positions: half-open intervals [start, end) of each token [B, n, S, 2], float32: seconds, pixels down, pixels
            right for video (n = 3); seconds for audio (n = 1).
        context: text that the stream attends to [B, T, D].
        enabled: False returns the tokens unchanged; they still serve the other stream as keys and values.
        context_mask: integer 0/1 [B, T], or float added to the scores; None masks no text token.
        attention_mask: self-attention strength in [0, 1], [B, S, S] or broadcastable to it, added as a logarithm.
        keyframes_mask: [B, S, 1], > 0 marks a token of a single pixel frame (LTX-2.5).
        timestep_values: distinct timesteps of each sample [B, K], float32. K is the same for every batch of a job.
        timestep_index: index into them for each token [B, S], int64.
        coordinate_values: per axis, the distinct interval midpoints of the batch [N_axis], float32.
        coordinate_index: index into them for each token and axis [B, n, S], int64.
    """

    latent: Tensor
    sigma: Tensor
    timesteps: Tensor
    positions: Tensor
    context: Tensor
    enabled: bool = True
    context_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    keyframes_mask: Tensor | None = None
    timestep_values: Tensor | None = None
    timestep_index: Tensor | None = None
    coordinate_values: tuple[Tensor, ...] | None = None
    coordinate_index: Tensor | None = None

    @classmethod
    def from_sigma(cls, latent: Tensor, sigma: Tensor, clean_mask: Tensor | None = None, **fields: Any) -> Self:
        """Builds a stream whose tokens are clean (timestep 0) or as noisy as their sample (timestep sigma).

        K is 2 with a mask, even if it is all False, and 1 without: pass a mask whenever any batch of the job may have a
        clean token, so that compiled blocks see one K.

        Args:
            latent: tokens [B, S, C], clean ones included.
            sigma: sigma of each sample [B], float32.
            clean_mask: True for a clean token [B, S], or None if no token can be clean.
            **fields: the remaining fields of `Modality` but the timesteps.
        """
        if clean_mask is None:
            fractions = torch.ones(1, device=sigma.device)
            index = torch.zeros(latent.shape[:2], dtype=torch.int64, device=latent.device)
        else:
            # 0 for clean and 1 for noisy tokens; `arange` fills on the device, `tensor` would copy from the host.
            fractions = torch.arange(2, dtype=torch.float32, device=sigma.device)
            index = (~clean_mask).long()
        return cls.from_fractions(latent, sigma, fractions, index, **fields)

    @classmethod
    def from_fractions(cls, latent: Tensor, sigma: Tensor, fractions: Tensor, index: Tensor, **fields: Any) -> Self:
        """Builds a stream whose tokens' timesteps are fractions of their sample's sigma.

        The four coupled fields follow from `sigma`, `fractions` and `index`, so that for every token

            timesteps[b, s] == timestep_values[b, timestep_index[b, s]] == fractions[index[b, s]] * sigma[b]

        Args:
            latent: tokens [B, S, C].
            sigma: sigma of each sample [B], float32.
            fractions: distinct fractions [K] in [0, 1], float32: 0 is clean, 1 fully noised.
            index: index into them for each token [B, S], int64.
            **fields: the remaining fields of `Modality` but the timesteps.
        """
        # Shapes and dtypes only: a check of values would make the host wait for the device.
        batch, tokens, _ = latent.shape
        assert sigma.shape == (batch,), f"sigma {list(sigma.shape)} of {batch} samples"
        assert fractions.ndim == 1, f"fractions {list(fractions.shape)}"
        assert index.shape == (batch, tokens), f"index {list(index.shape)} of latent {list(latent.shape)}"
        assert sigma.dtype == fractions.dtype == torch.float32, f"sigma {sigma.dtype}, fractions {fractions.dtype}"
        # [B, 1] * [K] -> [B, K].
        values = sigma[:, None] * fractions
        return cls(
            latent=latent,
            sigma=sigma,
            timesteps=values.gather(1, index),
            timestep_values=values,
            timestep_index=index,
            **fields,
        )
