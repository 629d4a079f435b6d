"""One stream of a training step: its clean tokens, what is given of them, and its draws become the model's input.

Video and audio are treated alike here; what differs (patchifying, positions, folders) is in `strategy`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_titan.conditioning.tokens import Coordinates
from ltx_titan.diffusion.flow import add_noise, velocity_target
from ltx_titan.model import Modality


@dataclass(frozen=True)
class Stream:
    """Input of the model, and what the loss needs; `target` and `loss_mask` are None for a frozen stream.

    Attributes:
        modality: the model's input, references before the target.
        target: velocity [B, S, C], target tokens only.
        loss_mask: True where a token counts [B, S], False for references.
    """

    modality: Modality
    target: Tensor | None
    loss_mask: Tensor | None


def build_stream(
    clean: Tensor,
    coordinates: Coordinates,
    *,
    sigma: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    references: list[tuple[Tensor, Coordinates]],
    present: Tensor | None,
    num_marked: int,
    context: Tensor,
    context_mask: Tensor | None,
) -> Stream:
    """Noises the tokens of a stream and puts its references before them.

    Given tokens stay clean, with timestep 0 and out of the loss; `sigma` stays the sample's for all of them.

    Args:
        clean: target tokens [B, S, C].
        coordinates: of the target tokens.
        sigma: noise level of each sample [B], None for a frozen stream.
        noise: standard normal noise [B, S, C], None for a frozen stream.
        given: True for a given token [B, S], None for a stream without conditions; also all False where there are
            conditions and none of them fires, so that the number of distinct timesteps is the same in every step.
        references: clean tokens [B, R, C] and coordinates of each reference; a later one goes before an earlier one.
        present: False for a sample whose stream is a stand-in [B]: it has no loss. None: all are present.
        num_marked: target tokens at the start that stand for a single pixel frame and are marked; 0 passes no marker.
        context: text [B, T, D].
        context_mask: mask of the text, or None.
    """
    clean = clean.float()
    batch, length, _ = clean.shape
    if sigma is None or noise is None:
        sigma, target, loss_mask, tokens = clean.new_zeros(batch), None, None, clean
        timestep_values = sigma[:, None]
        timestep_index = torch.zeros(batch, length, dtype=torch.int64, device=clean.device)
    else:
        tokens, target = add_noise(clean, noise, sigma), velocity_target(clean, noise)
        loss_mask = torch.ones(batch, length, dtype=torch.bool, device=clean.device)
        if given is None:
            timestep_values, timestep_index = sigma[:, None], torch.zeros_like(loss_mask, dtype=torch.int64)
        else:
            tokens = torch.where(given[:, :, None], clean, tokens)
            loss_mask = ~given
            timestep_values = torch.stack([torch.zeros_like(sigma), sigma], dim=1)
            timestep_index = loss_mask.long()
        if present is not None:
            loss_mask = loss_mask & present[:, None]
    marker = _marker(clean, num_marked)
    for reference, reference_coordinates in references:
        tokens = torch.cat([reference.float(), tokens], dim=1)
        coordinates = coordinates.prepend(reference_coordinates)
        # Index 0 is timestep 0: a stream with a reference always has it among its values.
        timestep_index = _prepend_zeros(timestep_index, reference.shape[1])
        loss_mask = None if loss_mask is None else _prepend_zeros(loss_mask, reference.shape[1])
        marker = None if marker is None else _prepend_zeros(marker, reference.shape[1])
    modality = Modality(
        latent=tokens,
        sigma=sigma,
        timesteps=timestep_values.gather(1, timestep_index),
        positions=coordinates.positions,
        context=context,
        context_mask=context_mask,
        keyframes_mask=marker,
        timestep_values=timestep_values,
        timestep_index=timestep_index,
        coordinate_values=coordinates.midpoints,
        coordinate_index=coordinates.index,
    )
    return Stream(modality, target, loss_mask)


def _marker(clean: Tensor, num_marked: int) -> Tensor | None:
    if num_marked == 0:
        return None
    marker = clean.new_zeros(*clean.shape[:2], 1)
    marker[:, :num_marked] = 1
    return marker


def _prepend_zeros(per_token: Tensor, count: int) -> Tensor:
    """Zeros (False) for `count` tokens before those of [B, S, ...]."""
    zeros = per_token.new_zeros(per_token.shape[0], count, *per_token.shape[2:])
    return torch.cat([zeros, per_token], dim=1)
