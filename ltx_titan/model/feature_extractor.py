"""Feature extractor: hidden states of all text encoder layers -> one feature per text token, before the connectors.

V1 (LTX-2): every layer is centered and scaled by its range over a prompt's tokens; one projection serves both streams.
V2 (2.3 and later): every token of every layer is RMS-normalized; one projection per stream.
Layers and channels are flattened with the channel outermost: index = channel * layers + layer.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from ltx_titan.model.config import TransformerConfig, caption_projected_before_connector

_EPS = 1e-6


class FeatureExtractor(nn.Module):
    """The text projection of a checkpoint (`text_embedding_projection.*`). Build with `from_config`."""

    def __init__(self, hidden_size: int, num_states: int, video_dim: int, audio_dim: int, per_stream: bool) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.per_stream = per_stream
        flat = hidden_size * num_states
        if per_stream:
            self.video_aggregate_embed = nn.Linear(flat, video_dim)
            self.audio_aggregate_embed = nn.Linear(flat, audio_dim)
        else:
            self.aggregate_embed = nn.Linear(flat, hidden_size, bias=False)

    @classmethod
    def from_config(cls, config: dict, text_encoder: dict) -> "FeatureExtractor":
        """Builds the projection that the metadata describes.

        Args:
            config: the `config` object of checkpoint metadata, with the key `transformer`.
            text_encoder: `hidden_size` and `num_hidden_layers` of the text encoder.
        """
        transformer = config["transformer"]
        streams = TransformerConfig.from_metadata(transformer)
        return cls(
            hidden_size=text_encoder["hidden_size"],
            # The token embeddings count as the first state.
            num_states=text_encoder["num_hidden_layers"] + 1,
            video_dim=streams.video.context_dim,
            audio_dim=streams.audio.context_dim,
            per_stream=caption_projected_before_connector(transformer),
        )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Projects the hidden states.

        Args:
            hidden_states: [B, S, D, L], layer last: embeddings first, the last layer after the final norm.
            attention_mask: [B, S], 1 marks a prompt token.

        Returns:
            Video features [B, S, D_video] and audio features [B, S, D_audio]; twice the same tensor for V1.
        """
        valid = attention_mask.bool()[:, :, None, None]
        if not self.per_stream:
            features = self.aggregate_embed(_scale_by_range(hidden_states, valid).flatten(2))
            return features, features
        # Over channels (dim 2): each token of each layer has its own statistic, so padding cannot change it.
        normed = hidden_states * torch.rsqrt(hidden_states.square().mean(dim=2, keepdim=True) + _EPS)
        # [B, S, D, L] -> [B, S, D * L].
        flat = torch.where(valid, normed, 0).flatten(2)
        video, audio = self.video_aggregate_embed, self.audio_aggregate_embed
        # On the input rather than the result, because the projections have a bias; the factor is the reference's.
        return (
            video(flat * sqrt(video.out_features / self.hidden_size)),
            audio(flat * sqrt(audio.out_features / self.hidden_size)),
        )


def _scale_by_range(states_BSDL: Tensor, valid_BS11: Tensor) -> Tensor:
    """8 * (x - mean) / (max - min) per sample and layer, over prompt tokens and channels; 0 at padding.

    Computed in float32 or higher, because the number of tokens is; cast back to the input dtype.
    """
    count = valid_BS11.sum(dim=(1, 2), keepdim=True) * states_BSDL.shape[2]
    mean = torch.where(valid_BS11, states_BSDL, 0).sum(dim=(1, 2), keepdim=True) / (count + _EPS)
    # Padding must not win the minimum or the maximum.
    highest = torch.where(valid_BS11, states_BSDL, -torch.inf).amax(dim=(1, 2), keepdim=True)
    lowest = torch.where(valid_BS11, states_BSDL, torch.inf).amin(dim=(1, 2), keepdim=True)
    scaled = 8 * (states_BSDL - mean) / (highest - lowest + _EPS)
    return torch.where(valid_BS11, scaled, 0).to(states_BSDL.dtype)
