"""Distributions of sigma in training.

A sampler turns a token count and a generator into sigmas in [0, 1] (1 is pure noise). The default follows the
resolution: more tokens carry more redundant signal, so the same sigma leaves an easier task and the distribution moves
up. Every sampler splits into a draw (`sample`) and an exact map of the drawn numbers (`map`), so that the map can be
compared with reference values.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor

# Two anchors of the linear shift: (tokens, mu). They belong to the released models and are not configurable.
LOW_TOKENS, LOW_SHIFT = 1024, 0.95
HIGH_TOKENS, HIGH_SHIFT = 4096, 2.05

# Standard normal quantiles at 0.5 % and 99.9 %: between them the distribution is stretched to fill [0, 1].
LOW_QUANTILE, HIGH_QUANTILE = -2.5758, 3.0902

# Draws of `TruncatedSigma`; a range with 1 % of the distribution is missed by all of them once in 20,000 samples.
_TRIES = 1000


class SigmaSampler(Protocol):
    """Interface that `draw_step` requires of a sampler."""

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Draws sigmas of the given shape, float32 on the generator's device."""
        ...


def mu(num_tokens: int, low_shift: float = LOW_SHIFT, high_shift: float = HIGH_SHIFT) -> float:
    """Shift of the log-odds of sigma for a token count.

    Linear through (1024, `low_shift`) and (4096, `high_shift`), extrapolated on both sides and not clamped.
    """
    slope = (high_shift - low_shift) / (HIGH_TOKENS - LOW_TOKENS)
    return low_shift + slope * (num_tokens - LOW_TOKENS)


@dataclass(frozen=True)
class ShiftedLogitNormal:
    """Logit-normal whose center grows with the token count, stretched, mixed with a uniform distribution.

    The stretch and the uniform part keep it from collapsing to sigma = 1 on long clips.

    Attributes:
        std: standard deviation of the log-odds of sigma.
        eps: smallest sigma; values below are reflected at it.
        uniform_prob: fraction of samples drawn uniformly from [eps, 1] instead.
        shift: factor on the odds of sigma (SD3's timestep shift); None follows the token count.
    """

    std: float = 1.0
    eps: float = 1e-3
    uniform_prob: float = 0.1
    shift: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"sigma.std is {self.std}; it must be a finite number above 0 (default 1.0).")
        if not 0 <= self.eps < 0.5:
            raise ValueError(
                f"sigma.eps is {self.eps}; expected a value in [0, 0.5), as a floor of sigma (default 1e-3)."
            )
        if not 0 <= self.uniform_prob <= 1:
            raise ValueError(
                f"sigma.uniform_prob is {self.uniform_prob}; expected a probability in [0, 1] (default 0.1)."
            )

    def mu(self, num_tokens: int) -> float:
        """Center of the log-odds of sigma for a token count (see `mu`)."""
        return mu(num_tokens) if self.shift is None else math.log(self.shift)

    def map(self, z: Tensor, u: Tensor, p: Tensor, num_tokens: int) -> Tensor:
        """Maps drawn numbers to sigmas, exactly as the reference trainer does.

        With s = sigmoid(mu + std z), stretched so that its 0.5 % and 99.9 % quantiles become 0 and 1, reflected at eps
        and clamped to [0, 1]; where p <= uniform_prob the value is eps + (1 - eps) u instead.

        Args:
            z: standard normal numbers.
            u: uniform numbers in [0, 1): the value of the uniform part.
            p: uniform numbers in [0, 1): which samples belong to the uniform part.
            num_tokens: target tokens of the stream, references not counted.
        """
        shift = self.mu(num_tokens)
        # Quantiles of the shifted distribution: the stretch follows the token count.
        low = _sigmoid(shift + LOW_QUANTILE * self.std)
        high = _sigmoid(shift + HIGH_QUANTILE * self.std)
        stretched = (torch.sigmoid(shift + self.std * z) - low) / (high - low)
        # Reflected rather than clamped, so that no mass piles up at eps.
        reflected = torch.where(stretched >= self.eps, stretched, 2 * self.eps - stretched)
        return torch.where(p > self.uniform_prob, reflected.clamp(0, 1), self.eps + (1 - self.eps) * u)

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Draws sigmas of the given shape, float32, for streams of `num_tokens` target tokens."""
        device = generator.device
        # All three are drawn for every sample, so that the mixture choice shifts no later draw.
        z = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        u = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        p = torch.rand(shape, generator=generator, device=device, dtype=torch.float32)
        return self.map(z, u, p, num_tokens)


@dataclass(frozen=True)
class UniformSigma:
    """Uniform sigmas in [min_value, max_value), independent of the token count."""

    min_value: float = 0.0
    max_value: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_value <= self.max_value <= 1:
            raise ValueError(
                f"sigma.min_value is {self.min_value} and sigma.max_value is {self.max_value}; "
                "expected 0 <= min_value <= max_value <= 1."
            )

    def map(self, u: Tensor) -> Tensor:
        """Maps uniform numbers in [0, 1) to sigmas."""
        return self.min_value + (self.max_value - self.min_value) * u

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Draws sigmas of the given shape, float32; `num_tokens` is ignored."""
        return self.map(torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32))


@dataclass(frozen=True)
class DiscreteSigma:
    """A few sigmas, each equally often: those of a sampling schedule."""

    values: tuple[float, ...]

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Draws sigmas of the given shape, float32; `num_tokens` is ignored."""
        values = torch.tensor(self.values, dtype=torch.float32, device=generator.device)
        return values[torch.randint(len(self.values), shape, generator=generator, device=generator.device)]


@dataclass(frozen=True)
class TruncatedSigma:
    """Another distribution cut off at both ends; between them it keeps its shape.

    Sigmas outside are drawn again, up to 1,000 times, and then uniformly, which only a range with less than about 0.5 %
    of the distribution comes to.

    Attributes:
        sampler: the whole distribution.
        low: lowest sigma.
        high: highest sigma.
    """

    sampler: SigmaSampler
    low: float
    high: float

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Draws sigmas of the given shape, float32, for streams of `num_tokens` target tokens."""
        sigma = self.sampler.sample(shape, num_tokens, generator)
        for _ in range(_TRIES):
            is_outside = (sigma < self.low) | (sigma > self.high)
            if not is_outside.any():
                return sigma
            sigma = torch.where(is_outside, self.sampler.sample(shape, num_tokens, generator), sigma)
        uniform = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32)
        is_outside = (sigma < self.low) | (sigma > self.high)
        return torch.where(is_outside, self.low + (self.high - self.low) * uniform, sigma)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
