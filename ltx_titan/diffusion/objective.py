"""Error of a predicted velocity, and its weight over sigma.

With x_s = (1 - s) x + s e, velocity u = e - x and a prediction û:

    mse         (û - u)^2
    huber       (û - u)^2 up to delta, then 2 delta |û - u| - delta^2: continuous, equal to mse for a large delta

    sigma_sqrt  s^-2
    cosmap      2 / (pi (1 - 2 s + 2 s^2))                      mean 1 over uniform sigmas
    min_snr     min((1 - s)^2, gamma s^2)

`sigma_sqrt` and `cosmap` are diffusers' `compute_loss_weighting_for_sd3` (Esser et al., 2024); `sigma_sqrt` keeps its
name, although it is a square. Min-SNR (Hang et al., 2023) weighs the error of the predicted clean sample by
min(SNR, gamma), with SNR = ((1 - s) / s)^2. The clean sample x_s - s û has the error s^2 (û - u)^2, hence the weight
s^2 min(SNR, gamma) of the velocity's: largest at s = 1 / (1 + sqrt(gamma)), 0 at both ends.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ltx_titan.config import LossSection
from ltx_titan.config.optimization import ErrorName, WeightingName


@dataclass(frozen=True)
class Objective:
    """The error that is averaged over the tokens of a sample.

    Attributes:
        error: of one number of the velocity.
        huber_delta: largest difference whose error is quadratic.
        weighting: of a sample by its sigma.
        snr_gamma: largest signal-to-noise ratio that `min_snr` does not cap.
    """

    error: ErrorName = "mse"
    huber_delta: float = 1.0
    weighting: WeightingName = "none"
    snr_gamma: float = 5.0

    @classmethod
    def from_config(cls, settings: LossSection) -> Self:
        """Reads the job's `[loss]`."""
        return cls(settings.name, settings.huber_delta, settings.weighting, settings.snr_gamma)

    def errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Error of each number, float32, in the common shape of both."""
        # In float32: the square of a bfloat16 difference has 8 bits, and the sum runs over thousands of tokens.
        difference = prediction.float() - target.float()
        if self.error == "mse":
            return difference.square()
        size, delta = difference.abs(), self.huber_delta
        return torch.where(size <= delta, difference.square(), 2 * delta * size - delta**2)

    def weights(self, sigma: Tensor) -> Tensor | None:
        """Weight of each sigma, float32; None weighs all alike."""
        match self.weighting:
            case "none":
                return None
            case "sigma_sqrt":
                return sigma**-2.0
            case "cosmap":
                return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
            case "min_snr":
                return torch.minimum((1 - sigma) ** 2, self.snr_gamma * sigma**2)


MEAN_SQUARED_ERROR = Objective()
"""The reference trainer's objective; held-out losses always use it, so that runs can be compared."""
