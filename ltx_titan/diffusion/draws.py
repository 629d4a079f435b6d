"""Every random number of a training step, drawn in one place.

A sample's numbers depend on (seed, step, its index in the global batch) and nothing else, and a reference condition's
decision on (seed, step, index of the condition) alone. So every mesh, micro-batch size and accumulation setting draws
the same numbers, tensor- and context-parallel ranks agree without communication, and a resumed run continues exactly.
What follows (`FlexibleStrategy.prepare`) is a pure function of the batch and these draws.

Each quantity has a separate key: 128 bits of BLAKE2b over its full name. Adjacent steps and indices are therefore
independent, and adding a condition changes no other draw. The key drives NumPy's counter-based Philox. PyTorch's CPU
generator uses only the low 32 bits of a seed, so among a million noise tensors about a hundred pairs would be equal; it
is used for sigma alone, a single number, because samplers take a torch generator.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ltx_titan.config import SigmaSection
from ltx_titan.config.base import StreamName
from ltx_titan.diffusion.schedule import DISTILLED_SIGMAS
from ltx_titan.diffusion.sigma import (
    DiscreteSigma,
    ShiftedLogitNormal,
    SigmaSampler,
    TruncatedSigma,
    UniformSigma,
)


class StreamDraws(NamedTuple):
    """The random numbers of one stream, see `StepDraws`; sigma and noise are None for a frozen stream."""

    sigma: Tensor | None
    noise: Tensor | None
    uses: list[Tensor | None] | None
    starts: list[Tensor | None] | None = None


@dataclass(frozen=True)
class StepDraws:
    """The random numbers of one micro-batch of `B` samples; None for an absent or frozen stream.

    Attributes:
        video_sigma: sigma of each sample [B], float32.
        audio_sigma: sigma of each sample [B], float32, drawn independently of the video's.
        video_noise: standard normal noise [B, S, C], float32, patchified, target tokens only.
        audio_noise: the same for the audio tokens.
        video_uses: which conditions fire, parallel to the block's conditions: a boolean tensor, [B] for an intrinsic
            condition and scalar for a reference; None if none is drawn (an intrinsic condition of a frozen stream).
        audio_uses: the same for the audio block's conditions.
        video_starts: where keyframes at random times start, parallel to the block's conditions: uniform in [0, 1)
            [B, n], float64; None for a condition without any.
        audio_starts: the same for the audio block's conditions.
    """

    video_sigma: Tensor | None
    audio_sigma: Tensor | None
    video_noise: Tensor | None
    audio_noise: Tensor | None
    video_uses: list[Tensor | None] | None
    audio_uses: list[Tensor | None] | None
    video_starts: list[Tensor | None] | None = None
    audio_starts: list[Tensor | None] | None = None

    @property
    def video(self) -> StreamDraws:
        """Draws of the video stream."""
        return StreamDraws(self.video_sigma, self.video_noise, self.video_uses, self.video_starts)

    @property
    def audio(self) -> StreamDraws:
        """Draws of the audio stream."""
        return StreamDraws(self.audio_sigma, self.audio_noise, self.audio_uses, self.audio_starts)


class ConditionPlan(NamedTuple):
    """Draws of one condition: its probability, whether it is a reference, and its number of random starts."""

    probability: float
    is_reference: bool = False
    random_starts: int = 0


@dataclass(frozen=True)
class StreamPlan:
    """Shapes and probabilities of one stream's draws.

    Attributes:
        num_tokens: target tokens; references are not counted.
        channels: width of a token.
        is_generated: False for a frozen stream, which has no sigma and no noise.
        conditions: of the block, in order.
    """

    num_tokens: int
    channels: int
    is_generated: bool
    conditions: tuple[ConditionPlan, ...] = ()


def draw_step(
    video: StreamPlan | None,
    audio: StreamPlan | None,
    *,
    sampler: SigmaSampler,
    audio_sampler: SigmaSampler | None = None,
    seed: int,
    step: int,
    indices: Sequence[int],
) -> StepDraws:
    """Draws everything random of one micro-batch, on the CPU.

    Neither stream's draws depend on the other stream's presence or length.

    Args:
        video: plan of the video stream, None if absent.
        audio: plan of the audio stream, None if absent.
        sampler: distribution of sigma.
        audio_sampler: distribution of the audio's sigma; None: the same.
        seed: seed of the job.
        step: optimizer step; all micro-batches of a step share it.
        indices: index of each sample of this micro-batch in the global batch.
    """
    v = _draw_stream("video", video, sampler, f"{seed}/{step}", indices)
    a = _draw_stream("audio", audio, audio_sampler or sampler, f"{seed}/{step}", indices)
    return StepDraws(v.sigma, a.sigma, v.noise, a.noise, v.uses, a.uses, v.starts, a.starts)


def sigma_sampler(settings: SigmaSection, stream: StreamName) -> SigmaSampler:
    """Builds the distribution of a stream's sigma from the job's `[sigma]`.

    Raises:
        ValueError: none of the distilled sigmas is in the stream's range.
    """
    low, high = settings.range_of(stream)
    if settings.name == "distilled":
        values = tuple(value for value in DISTILLED_SIGMAS[:-1] if low <= value <= high)
        if not values:
            raise ValueError(
                f"sigma.{stream}_min = {low}, sigma.{stream}_max = {high}: expected at least one of the sigmas of "
                f'sigma.name = "distilled" between them, {DISTILLED_SIGMAS[:-1]}; widen the range.'
            )
        return DiscreteSigma(values)
    if settings.name == "uniform":
        # Exact, without drawing again.
        return UniformSigma(max(low, settings.min_value), min(high, settings.max_value))
    sampler = ShiftedLogitNormal(settings.std, settings.eps, settings.uniform_prob, settings.shift)
    # Not wrapped by default: the reference trainer's sigmas, bit for bit.
    return sampler if (low, high) == (0.0, 1.0) else TruncatedSigma(sampler, low, high)


def draw_caption_drops(probabilities: Sequence[float], *, seed: int, step: int, indices: Sequence[int]) -> Tensor:
    """Draws which samples of a micro-batch are trained without their caption [B], bool; keyed like all other draws."""
    drawn = [_uniform(f"{seed}/{step}/{index}/caption") for index in indices]
    return torch.tensor([number < probability for number, probability in zip(drawn, probabilities, strict=True)])


def _draw_stream(
    name: str, plan: StreamPlan | None, sampler: SigmaSampler, step_key: str, indices: Sequence[int]
) -> StreamDraws:
    if plan is None:
        return StreamDraws(None, None, None)
    keys = [f"{step_key}/{index}/{name}" for index in indices]
    uses: list[Tensor | None] = []
    starts: list[Tensor | None] = []
    for i, (probability, is_reference, count) in enumerate(plan.conditions):
        # In double precision: rounded to float32, a number close to 1 would become 1.
        drawn = [[_uniform(f"{key}/condition {i}/start {n}") for n in range(count)] for key in keys]
        starts.append(torch.tensor(drawn, dtype=torch.float64) if count and plan.is_generated else None)
        if is_reference:
            # One decision for the whole global batch: a reference changes the length of the sequence.
            uses.append(torch.tensor(_uniform(f"{step_key}/{name}/reference {i}") < probability))
        elif plan.is_generated:
            # One decision per sample: intrinsic conditions do not change shapes.
            uses.append(torch.tensor([_uniform(f"{key}/condition {i}") < probability for key in keys]))
        else:
            uses.append(None)
    if not plan.is_generated:
        return StreamDraws(None, None, uses, starts)
    # One call per sample, each with a generator of its own; a single call for [B] would tie a sample's sigma to its
    # neighbors in the micro-batch.
    sigma = torch.cat([sampler.sample((1,), plan.num_tokens, _torch_generator(f"{key}/sigma")) for key in keys])
    noise = np.empty((len(keys), plan.num_tokens, plan.channels), dtype=np.float32)
    # In place, one generator per sample.
    for row, key in zip(noise, keys, strict=True):
        _numpy_generator(f"{key}/noise").standard_normal(out=row, dtype=np.float32)
    return StreamDraws(sigma, torch.from_numpy(noise), uses, starts)


def _key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")


def _numpy_generator(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_key(name)))


def _torch_generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(_key(name) & 0xFFFF_FFFF)


def _uniform(name: str) -> float:
    """A uniform number in [0, 1): probability 0 never fires, probability 1 always does."""
    return float(_numpy_generator(name).random())
