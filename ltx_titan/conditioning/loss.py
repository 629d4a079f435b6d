"""The training loss: a mean squared error over generated tokens, per sample and stream.

Each sample is normalised by its own count of generated tokens, so one with few of them weighs as much as a full one,
and audio (about a hundred tokens) as much as video (thousands). The normalisation is a weight per token, known before
the forward pass: a rank that holds part of a sequence sums its own part, and the parts add up.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """Loss of a micro-batch of `B` samples, float32.

    Attributes:
        total: mean over samples, scalar; what is differentiated.
        per_sample: sum of both streams [B].
        video: video part [B], None where no video is generated.
        audio: audio part [B], None where no audio is generated.
    """

    total: Tensor
    per_sample: Tensor
    video: Tensor | None
    audio: Tensor | None

    def detach(self) -> "Loss":
        """The same values without autograd history."""
        parts = (self.total, self.per_sample, self.video, self.audio)
        return Loss(*(None if part is None else part.detach() for part in parts))


def token_weights(loss_mask: Tensor) -> Tensor:
    """Weight of each token [B, S], float32: 1 / number of generated tokens of its sample, 0 for a given token.

    A sample without a generated token has weights 0, and therefore loss 0.
    """
    mask = loss_mask.float()
    return mask / mask.sum(dim=1, keepdim=True).clamp(min=1)


def stream_loss(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of weight times the squared error's mean over channels.

    Args:
        prediction: predicted velocity [B, S, C], any dtype.
        target: velocity [B, S, C].
        weights: weight of each token [B, S]; see `token_weights`.

    Returns:
        Loss of each sample [B], float32.
    """
    error = (prediction.float() - target.float()).square().mean(dim=2)
    return (weights * error).sum(dim=1)
