"""The loss on data that is not trained on, at fixed noise levels and with fixed noise.

The training loss jumps with every drawn noise level; this one changes only where the model does. Each sample meets the
same noise and the same conditions at every level in every validation, so the points of a curve can be compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

from ltx_titan.conditioning import FlexibleStrategy, absent_streams
from ltx_titan.conditioning.batch import Batch
from ltx_titan.diffusion import draw_step
from ltx_titan.validation.sampling import SampleGroups, evaluating


@dataclass(frozen=True)
class FixedSigma:
    """A sampler of noise levels that always draws the same one."""

    sigma: float

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """The noise level in the given shape, float32."""
        return torch.full(shape, self.sigma, dtype=torch.float32)


def held_out_losses(
    model: nn.Module,
    strategy: FlexibleStrategy,
    load: Callable[[int], Batch],
    num_samples: int,
    sigmas: Sequence[float],
    seed: int,
    device: torch.device | str,
    groups: SampleGroups | None = None,
) -> dict[str, float]:
    """Mean losses over held-out samples, per stream; a collective call.

    Args:
        model: the transformer; put into eval mode and back.
        strategy: of the job, conditions included; whether one applies is drawn from the seed, once and for all.
        load: a sample as a batch of one, with contexts, on the device.
        num_samples: samples 0 to this are used, divided over the groups.
        sigmas: noise levels; one forward each per sample.
        seed: of noise and conditions.
        device: of the model.
        groups: who does what; None: this process does all.

    Returns:
        For each generated stream, and for their sum as `total`: `held_out/<stream>` is the mean over noise levels and
        the samples that have the stream, `held_out/<stream>_sigma_<level>` that at one level.
    """
    groups = groups or SampleGroups()
    # Per noise level: sums of the total, video and audio loss.
    sums = torch.zeros(len(sigmas), 3, device=device, dtype=torch.float64)
    counts = torch.zeros(3, device=device, dtype=torch.float64)
    with evaluating(model):
        for first in range(0, num_samples, groups.size):
            index = first + groups.rank
            # A group without a sample of its own left repeats one without counting it: forwards are collective.
            is_own = index < num_samples
            batch = load(index if is_own else index % num_samples)
            for place, sigma in enumerate(sigmas):
                draws = draw_step(
                    *strategy.draw_plan(batch), sampler=FixedSigma(sigma), seed=seed, step=0, indices=[index]
                )
                inputs = strategy.prepare(batch, draws)
                loss = strategy.loss(*model(inputs.video, inputs.audio, absent_streams(inputs)), inputs)
                if not is_own:
                    continue
                parts = (
                    (loss.per_sample, None),
                    (loss.video, inputs.video_present),
                    (loss.audio, inputs.audio_present),
                )
                for column, (part, present) in enumerate(parts):
                    if part is not None:
                        sums[place, column] += part.sum()
                        # A sample without audio has an audio loss of 0, which is no reason to praise the model.
                        counts[column] += (1 if present is None else present.sum()) / len(sigmas)
    if groups.size > 1:
        dist.all_reduce(sums, group=groups.process_group)
        dist.all_reduce(counts, group=groups.process_group)
    return _named((sums / counts).tolist(), counts.tolist(), sigmas)


def as_batch(sample: Mapping[str, Mapping[str, Tensor | float | int]], device: torch.device | str) -> Batch:
    """One sample of a data set as a batch of one on a device."""
    return {
        source: {name: torch.as_tensor(value)[None].to(device) for name, value in fields.items()}
        for source, fields in sample.items()
    }


def _named(means: list[list[float]], counts: list[float], sigmas: Sequence[float]) -> dict[str, float]:
    losses = {}
    for column, name in enumerate(("total", "video", "audio")):
        if counts[column]:
            losses[f"held_out/{name}"] = sum(row[column] for row in means) / len(means)
            losses |= {
                f"held_out/{name}_sigma_{sigma:g}": row[column] for sigma, row in zip(sigmas, means, strict=True)
            }
    return losses
