"""Schedules besides the standard one: those that distilled models were made for, and one after a beta distribution."""

import numpy as np
import torch
from torch import Tensor

# A distilled model has seen these noise levels and no others.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
# Second stage: a first stage's result, upscaled, noised to the first value and refined.
DISTILLED_REFINE_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

_LEVELS = 10_000
_SHIFT = 2.37
_ALPHA = 0.6


def distilled_schedule(*, refine: bool = False) -> Tensor:
    """Noise levels of the distilled models, float32: 8 steps [9] from pure noise, or 3 [4] that refine a latent."""
    return torch.tensor(DISTILLED_REFINE_SIGMAS if refine else DISTILLED_SIGMAS, dtype=torch.float32)


def beta_schedule(steps: int) -> Tensor:
    """Noise levels at even quantiles of the beta distribution with both parameters 0.6: dense at both ends.

    The quantile q at 1, 1 - 1 / steps, ... picks one of 10,000 levels, and the level s becomes
    e^2.37 / (e^2.37 + 1 / s - 1). Levels that coincide, which only very many steps make, are taken once.

    Returns:
        Decreasing noise levels, float32, starting at 1 and ending at 0: [steps + 1], or fewer where levels coincide.

    Raises:
        ValueError: if `steps` is less than 1.
    """
    if steps < 1:
        raise ValueError(f"a schedule of {steps} sampling steps was asked for; at least 1 is needed.")
    quantiles = _beta_quantiles(1 - np.arange(steps) / steps)
    level = np.rint(quantiles * (_LEVELS - 1)) + 1
    sigmas = np.exp(_SHIFT) / (np.exp(_SHIFT) + _LEVELS / level - 1)
    # `unique` sorts upwards.
    return torch.from_numpy(np.append(np.unique(sigmas)[::-1], 0.0)).float()


def _beta_quantiles(shares: np.ndarray) -> np.ndarray:
    """Inverse distribution function, numerically: with x = sin^2 t the density is (sin t cos t)^(2 alpha - 1)."""
    edges = np.linspace(0, np.pi / 2, 400_001)
    centres = (edges[1:] + edges[:-1]) / 2
    cumulative = np.append(0.0, np.cumsum((np.sin(centres) * np.cos(centres)) ** (2 * _ALPHA - 1)))
    return np.sin(np.interp(shares, cumulative / cumulative[-1], edges)) ** 2
