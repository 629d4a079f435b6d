"""Noise levels of a sampling run, from 1 (pure noise) down to 0 (clean).

`sigma_schedule` is the schedule of the LTX-2 models; `linear_quadratic_schedule` spends its first half almost at pure
noise. Both return `steps + 1` values, so step i goes from value i to value i + 1.
"""

import math

import torch
from torch import Tensor

from ltx_titan.diffusion.sigma import HIGH_SHIFT, LOW_SHIFT, mu

# Token count that the released pipelines use whatever the size of the clip.
DEFAULT_TOKENS = 4096


def sigma_schedule(
    num_tokens: int | None,
    steps: int,
    *,
    max_shift: float = HIGH_SHIFT,
    base_shift: float = LOW_SHIFT,
    stretch: bool = True,
    terminal: float = 0.1,
) -> Tensor:
    """Noise levels of the LTX-2 schedule.

    With s_i from 1 to 0 in `steps` equal steps and m = mu(num_tokens): sigma_i = e^m / (e^m + 1 / s_i - 1). The
    non-zero values are then stretched about 1 so that the last of them becomes `terminal`.

    Args:
        num_tokens: tokens of the clip, or None for 4096, which the released pipelines use for every size.
        steps: number of sampling steps, at least 1.
        max_shift: shift at 4096 tokens.
        base_shift: shift at 1024 tokens.
        stretch: whether to stretch.
        terminal: last noise level before 0, in (0, 1), after stretching.

    Returns:
        Decreasing noise levels [steps + 1], float32, starting at 1 and ending at 0.

    Raises:
        ValueError: if `steps` or `terminal` is out of range.
    """
    _check_steps(steps)
    if not 0 < terminal < 1:
        raise ValueError(f"the terminal noise level is {terminal}; it must lie between 0 and 1 (default 0.1).")
    shift = mu(DEFAULT_TOKENS if num_tokens is None else num_tokens, base_shift, max_shift)
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    sigmas = math.exp(shift) / (math.exp(shift) + 1 / even - 1)
    # One step has the single value 1, which no stretch about 1 can move.
    if stretch and steps > 1:
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def linear_quadratic_schedule(steps: int, threshold: float = 0.025) -> Tensor:
    """Noise levels that fall linearly by `threshold` in the first half of the steps and quadratically to 0 in the rest.

    The quadratic part continues the linear one in value and slope.

    Returns:
        Decreasing noise levels [steps + 1], float32, starting at 1 and ending at 0.

    Raises:
        ValueError: if `steps` is less than 1.
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


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"a schedule of {steps} sampling steps was asked for; at least 1 is needed.")
