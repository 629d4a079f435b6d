"""What the transformer is told about one stream of tokens (video or audio), as one immutable record.

`sigma` and `timesteps` are two inputs on purpose: a conditioning token has timestep 0 while its sample's `sigma` still
drives the prompt modulation and the gates between the streams.

The optional fields at the end carry the same facts as `timesteps` and `positions` in a smaller form. Whoever builds
the batch knows them without looking (a token's timestep is 0 or its sample's sigma; a clip has few distinct
coordinates), and handing them over saves the transformer a search that would make the host wait for the device. The
transformer finds them itself where they are None.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """One stream. `B` samples, `S` tokens, `C` latent channels, `T` text tokens, `D` text width, `n` position axes.

    Attributes:
        latent: noisy tokens [B, S, C].
        sigma: noise level of each sample [B], in [0, 1], float32; 0 for a frozen stream.
        timesteps: noise level of each token [B, S], [B, S, 1] or [B, 1], in [0, 1], float32; 0 for a given token.
        positions: half-open intervals [start, end) of each token [B, n, S, 2], float32: seconds, pixels down, pixels
            right for video (n = 3); seconds for audio (n = 1).
        context: text the stream attends to [B, T, D].
        enabled: False leaves the tokens as they are; they still serve the other stream as keys and values.
        context_mask: None where no text token is masked; integer 0/1 [B, T], or float added to the scores.
        attention_mask: self-attention strength in [0, 1], [B, S, S] or broadcastable to it, added as a logarithm.
        keyframes_mask: [B, S, 1], > 0 marks a token that stands for a single pixel frame (LTX-2.5).
        timestep_values: the distinct timesteps of each sample [B, K], float32. K is the same for every batch of a job.
        timestep_index: which of them each token has [B, S], int64.
        coordinate_values: per axis, the distinct interval midpoints in the batch [N_axis], float32.
        coordinate_index: which of them each token has [B, n, S], int64.
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
