"""Inputs of the model with their targets, and the training loss: a masked mean error of the velocity.

Each sample is normalized by its own number of generated tokens, so a sample with few of them weighs as much as a full
one, and audio (about a hundred tokens) as much as video (thousands). The normalization is a weight per token, known
before the forward pass: a rank that holds part of a sequence sums its own part, and the parts add up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ltx_titan.diffusion.objective import MEAN_SQUARED_ERROR, Objective
from ltx_titan.model import Modality, Perturbations


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of the model, and the targets and masks of the loss.

    Attributes:
        video: input of the video stream, references before the target; None if absent.
        audio: the same for audio.
        video_target: velocity [B, S, C], target tokens only; None if no video is generated.
        audio_target: the same for audio.
        video_loss_mask: True for a token with loss [B, S], with S as in `video`: False for references and conditioned
            tokens.
        audio_loss_mask: the same for audio.
        video_present: False for a sample whose video is a placeholder [B]: its two streams must not attend to each
            other. None: every sample has a video.
        audio_present: the same for audio.
        video_loss_weights: weight of each target token relative to the others of its sample [B, S]; None: all alike.
        audio_loss_weights: the same for audio.
        reference_scale: (spatial, temporal) factors of the video references, None without any. Known from shapes in
            every batch, even if the reference does not fire.
    """

    video: Modality | None
    audio: Modality | None
    video_target: Tensor | None
    audio_target: Tensor | None
    video_loss_mask: Tensor | None
    audio_loss_mask: Tensor | None
    video_present: Tensor | None = None
    audio_present: Tensor | None = None
    video_loss_weights: Tensor | None = None
    audio_loss_weights: Tensor | None = None
    reference_scale: tuple[int, int] | None = None


@dataclass(frozen=True)
class Loss:
    """Loss of a micro-batch of `B` samples, float32.

    Attributes:
        total: mean over samples, scalar; what is differentiated.
        per_sample: sum of both streams [B].
        video: video part [B], None if no video is generated.
        audio: audio part [B], None if no audio is generated.
    """

    total: Tensor
    per_sample: Tensor
    video: Tensor | None
    audio: Tensor | None

    def detach(self) -> "Loss":
        """The same values without autograd history."""
        video, audio = (None if part is None else part.detach() for part in (self.video, self.audio))
        return Loss(self.total.detach(), self.per_sample.detach(), video, audio)


def absent_streams(inputs: ModelInputs) -> Perturbations | None:
    """Cuts the cross-modal attention of samples with a placeholder stream; None if every sample has both streams."""
    present = [flags for flags in (inputs.video_present, inputs.audio_present) if flags is not None]
    if not present or inputs.video is None or inputs.audio is None:
        return None
    # A perturbation rather than a missing stream: samples of one batch share a forward.
    return Perturbations(has_both=torch.stack(present).all(dim=0))


def flow_matching_loss(
    video_pred: Tensor | None,
    audio_pred: Tensor | None,
    inputs: ModelInputs,
    objective: Objective = MEAN_SQUARED_ERROR,
) -> Loss:
    """Masked mean error of the velocities, per sample, summed over the generated streams.

    Args:
        video_pred: predicted velocity [B, S, C] of all video tokens, references included; ignored if frozen.
        audio_pred: the same for audio.
        inputs: result of `FlexibleStrategy.prepare`.
        objective: error of the velocity, and its weight over the sigma of each stream.
    """
    video = _generated_loss(
        inputs.video, video_pred, inputs.video_target, inputs.video_loss_mask, inputs.video_loss_weights, objective
    )
    audio = _generated_loss(
        inputs.audio, audio_pred, inputs.audio_target, inputs.audio_loss_mask, inputs.audio_loss_weights, objective
    )
    parts = [part for part in (video, audio) if part is not None]
    assert parts, "no stream is generated"
    # A plain sum without weights, as in the reference trainer; `weigh` serves jobs that set them.
    per_sample = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    return Loss(per_sample.mean(), per_sample, video, audio)


def weighted_loss(loss: Loss, video_weight: float, audio_weight: float) -> Tensor:
    """Weighted sum of the streams' losses, for each sample: [B]."""
    if loss.video is None:
        assert loss.audio is not None, "a job generates at least one stream"
        return loss.audio * audio_weight
    if loss.audio is None:
        return loss.video * video_weight
    return loss.video * video_weight + loss.audio * audio_weight


def token_weights(loss_mask: Tensor, relative: Tensor | None = None) -> Tensor:
    """Weight of each token [B, S], float32: 1 / number of generated tokens of its sample, 0 for a clean token.

    A sample without a generated token has weights 0, and therefore loss 0.

    Args:
        loss_mask: True for a generated token [B, S].
        relative: weights of the generated tokens relative to each other [B, S], above 0; None: all alike.
    """
    if relative is not None:
        weights = torch.where(loss_mask, relative, 0.0)
        return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    # From the mask of the whole sequence: under context parallelism a rank sees some of the tokens and could not count
    # the rest.
    mask = loss_mask.float()
    # The clamp turns 0 / 0 of a fully conditioned sample into 0.
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def stream_loss(
    prediction: Tensor, target: Tensor, weights: Tensor, objective: Objective = MEAN_SQUARED_ERROR
) -> Tensor:
    """Sum over tokens of weight times the error's mean over channels.

    Args:
        prediction: predicted velocity [B, S, C], any dtype.
        target: velocity [B, S, C].
        weights: weight of each token [B, S]; see `token_weights`.
        objective: error of the velocity.

    Returns:
        Loss of each sample [B], float32.
    """
    return (weights * objective.errors(prediction, target).mean(dim=2)).sum(dim=1)


def _generated_loss(
    stream: Modality | None,
    prediction: Tensor | None,
    target: Tensor | None,
    loss_mask: Tensor | None,
    relative: Tensor | None,
    objective: Objective,
) -> Tensor | None:
    if target is None:
        return None
    assert stream is not None and prediction is not None, "a generated stream has no prediction"
    assert loss_mask is not None, "a generated stream has no loss mask"
    # References come first in training, so the target's tokens are the last ones.
    length = target.shape[1]
    weights = token_weights(loss_mask[:, -length:], relative)
    losses = stream_loss(prediction[:, -length:], target, weights, objective)
    by_sigma = objective.weights(stream.sigma)
    return losses if by_sigma is None else losses * by_sigma
