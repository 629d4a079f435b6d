"""Sigma schedules of a sampling run, from 1 (pure noise) down to 0 (clean).

`sigma_schedule` is the schedule of the LTX-2 models, `distilled_schedule` that of distilled ones. The other two are not
exposed as validation keys; they are held to the golden case `scheduler_and_steps`. A schedule of n steps has n + 1
values: step i goes from value i to value i + 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ltx_titan.diffusion.sigma import HIGH_SHIFT, LOW_SHIFT, mu

# Token count that the released pipelines use whatever the size of the clip.
DEFAULT_TOKENS = 4096
# A distilled model was trained on these sigmas and no others.
DISTILLED_SIGMAS = (1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0)
# Second stage: the upscaled result of the first stage is noised to the first value and refined.
DISTILLED_REFINE_SIGMAS = (0.909375, 0.725, 0.421875, 0.0)

# Constants of `beta_schedule` in the reference implementation: resolution, shift of the log-odds, both beta parameters.
_LEVELS = 10_000
_SHIFT = 2.37
_ALPHA = 0.6


def sigma_schedule(
    num_tokens: int | None,
    steps: int,
    *,
    max_shift: float = HIGH_SHIFT,
    base_shift: float = LOW_SHIFT,
    stretch: bool = True,
    terminal: float = 0.1,
) -> Tensor:
    """Sigmas of the LTX-2 schedule.

    With s_i from 1 to 0 in `steps` equal steps and m = mu(num_tokens): sigma_i = e^m / (e^m + 1 / s_i - 1). The
    non-zero values are then stretched about 1 so that the last of them becomes `terminal`.

    Args:
        num_tokens: tokens of the clip, or None for 4096, which the released pipelines use for every size.
        steps: number of sampling steps, at least 1.
        max_shift: shift at 4096 tokens.
        base_shift: shift at 1024 tokens.
        stretch: whether to stretch.
        terminal: last sigma before 0, in (0, 1), after stretching.

    Returns:
        Decreasing sigmas [steps + 1], float32, starting at 1 and ending at 0.

    Raises:
        ValueError: `steps` or `terminal` is out of range.
    """
    _check_steps(steps)
    if not 0 < terminal < 1:
        raise ValueError(f"terminal: expected a sigma between 0 and 1 (default 0.1), found {terminal}.")
    shift = mu(DEFAULT_TOKENS if num_tokens is None else num_tokens, base_shift, max_shift)
    # float64, rounded once at the end. The last 0 is dropped, since 1 / s has no value there.
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    sigmas = math.exp(shift) / (math.exp(shift) + 1 / even - 1)
    # One step has the single value 1, which no stretch about 1 can move.
    if stretch and steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def linear_quadratic_schedule(steps: int, threshold: float = 0.025) -> Tensor:
    """Sigmas that fall linearly by `threshold` in the first half of the steps and quadratically to 0 in the rest.

    The quadratic part continues the linear one in value and slope.

    Returns:
        Decreasing sigmas [steps + 1], float32, starting at 1 and ending at 0.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps(steps)
    linear_steps = steps // 2
    if linear_steps == 0:
        return torch.tensor([1.0, 0.0])
    quadratic_steps = steps - linear_steps
    slope = threshold / linear_steps
    curvature = (1 - threshold - slope * quadratic_steps) / quadratic_steps**2
    index = torch.arange(steps + 1, dtype=torch.float64)
    beyond = (index - linear_steps).clamp(min=0)
    sigmas = 1 - slope * index - curvature * beyond**2
    sigmas[-1] = 0
    return sigmas.float()


def distilled_schedule(*, refine: bool = False) -> Tensor:
    """Sigmas of the distilled models, float32: 8 steps [9] from pure noise, or 3 [4] that refine a latent."""
    return torch.tensor(DISTILLED_REFINE_SIGMAS if refine else DISTILLED_SIGMAS, dtype=torch.float32)


def beta_schedule(steps: int) -> Tensor:
    """Sigmas at even quantiles of the beta distribution with both parameters 0.6: dense at both ends.

    The quantile q at 1, 1 - 1 / steps, ... picks one of 10,000 levels, and the level s becomes
    e^2.37 / (e^2.37 + 1 / s - 1). Equal levels, which only very many steps produce, are merged.

    Returns:
        Decreasing sigmas, float32, starting at 1 and ending at 0: [steps + 1], or fewer if levels coincide.

    Raises:
        ValueError: `steps` is less than 1.
    """
    _check_steps(steps)
    quantiles = _beta_quantiles(1 - np.arange(steps) / steps)
    level = np.rint(quantiles * (_LEVELS - 1)) + 1
    sigmas = np.exp(_SHIFT) / (np.exp(_SHIFT) + _LEVELS / level - 1)
    # `unique` sorts in ascending order.
    return torch.from_numpy(np.append(np.unique(sigmas)[::-1], 0.0)).float()


def _beta_quantiles(quantiles: np.ndarray) -> np.ndarray:
    """Inverse distribution function, by integration: x = sin^2 t has the density (sin t cos t)^(2 alpha - 1)."""
    edges = np.linspace(0, np.pi / 2, 400_001)
    centers = (edges[1:] + edges[:-1]) / 2
    cumulative = np.append(0.0, np.cumsum((np.sin(centers) * np.cos(centers)) ** (2 * _ALPHA - 1)))
    return np.sin(np.interp(quantiles, cumulative / cumulative[-1], edges)) ** 2


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1 sampling step, found {steps}.")
