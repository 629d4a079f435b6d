"""Loss on a held-out dataset, at fixed sigmas and with fixed noise.

The training loss varies with the drawn sigmas; this one changes only if the model does. Each sample has the same noise
and the same conditions at every sigma in every validation, so the points of a curve can be compared.
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
    """A sigma sampler that always draws the same value."""

    sigma: float

    def sample(self, shape: tuple[int, ...], num_tokens: int, generator: Generator) -> Tensor:
        """Returns `sigma` as a float32 tensor of shape `shape`."""
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
        model: the transformer; evaluated in eval mode, which is restored afterwards.
        strategy: strategy of the job with its conditions; whether a condition applies to a sample depends on `seed`.
        load: loads a sample as a batch of one, with contexts, on the device.
        num_samples: number of samples, distributed over the groups.
        sigmas: one forward per sigma and sample.
        seed: seed of noise and conditions.
        device: device of the model.
        groups: data-parallel groups; None for a single process.

    Returns:
        For each generated stream, and for their sum as `total`: `held_out/<stream>` is the mean over sigmas and the
        samples with such tokens to generate, `held_out/<stream>_sigma_<sigma>` the mean at one sigma.
    """
    groups = groups or SampleGroups()
    # Sums of the total, video and audio loss for each sigma. float64: many samples are added up.
    sums = torch.zeros(len(sigmas), 3, device=device, dtype=torch.float64)
    counts = torch.zeros(3, device=device, dtype=torch.float64)
    with evaluating(model):
        for first in range(0, num_samples, groups.size):
            index = first + groups.rank
            # Forwards of a sharded model are collective: a group that has run out of samples repeats one, uncounted.
            is_own = index < num_samples
            batch = load(index if is_own else index % num_samples)
            for row, sigma in enumerate(sigmas):
                # Step 0 always: the draws depend on seed and index alone, so every validation sees the same noise.
                draws = draw_step(
                    *strategy.draw_plan(batch), sampler=FixedSigma(sigma), seed=seed, step=0, indices=[index]
                )
                inputs = strategy.prepare(batch, draws)
                video, audio = model(inputs.video, inputs.audio, absent_streams(inputs))
                loss = strategy.loss(video, audio, inputs)
                if not is_own:
                    continue
                # The loss of a sample without the stream, or with clean tokens only, is 0, which would lower the mean.
                masks = (inputs.video_loss_mask, inputs.audio_loss_mask)
                has_loss = [None if mask is None else mask.any(dim=1) for mask in masks]
                # A sample with one stream counts in the total with that stream's loss.
                has_any = torch.stack([found for found in has_loss if found is not None]).any(dim=0)
                parts = (loss.per_sample, loss.video, loss.audio)
                for column, (part, found) in enumerate(zip(parts, (has_any, *has_loss), strict=True)):
                    if part is not None and found is not None:
                        # On the device: reading each loss would make the host wait once per forward.
                        sums[row, column] += part.sum()
                        counts[column] += found.sum() / len(sigmas)
    if groups.size > 1:
        dist.all_reduce(sums, group=groups.process_group)
        dist.all_reduce(counts, group=groups.process_group)
    # 0 / 0 of a stream that no sample has is NaN and is dropped by its count.
    return _named((sums / counts).tolist(), counts.tolist(), sigmas)


def as_batch(sample: Mapping[str, Mapping[str, Tensor | float | int]], device: torch.device | str) -> Batch:
    """Converts a sample of a dataset to a batch of one on a device."""
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
