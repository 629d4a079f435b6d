"""Samples the prepared clips with the sharded model during training, on every rank.

Samples are distributed over the data-parallel groups. The forward of a sharded model is a collective operation, so all
groups must call it equally often; a group with fewer samples or guidance passes runs the missing forwards on a few
placeholder tokens. Only the block that is computed is gathered, never the whole model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltx_titan.conditioning import StreamTokens
from ltx_titan.config.validation import ValidationSection
from ltx_titan.diffusion import (
    Guidance,
    SampledStream,
    StepReport,
    count_forwards,
    distilled_schedule,
    needed_passes,
    sample,
    sigma_schedule,
)
from ltx_titan.diffusion.sampler import Stepper
from ltx_titan.diffusion.schedule import DISTILLED_REFINE_SIGMAS
from ltx_titan.model import LTXTransformer, Modality
from ltx_titan.optim.sharding import reshard
from ltx_titan.validation.start import begin, target_latents

# Default of the released pipelines for LTX-2.3 and later.
_DEFAULT_STEPS = 30


@dataclass(frozen=True)
class SampleGroups:
    """Distribution of the samples over data-parallel groups.

    Attributes:
        rank: index of this rank's group; the ranks of a group (tensor and context parallel) share its samples.
        size: number of groups.
        process_group: this rank and its counterparts in the other groups; None with one group.
        is_first: whether this rank writes the results of its group.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    is_first: bool = True


@dataclass(frozen=True)
class Contexts:
    """Contexts of a prompt and of the negative prompt for each stream [1, T, D]; None if not needed."""

    video: Tensor | None
    audio: Tensor | None
    negative_video: Tensor | None = None
    negative_audio: Tensor | None = None


@dataclass(frozen=True)
class PreparedSample:
    """One clip with all that its sampling needs, on the host.

    Attributes:
        video: start of the video stream, None without one.
        audio: start of the audio stream, None without one.
        contexts: text.
        seed: of the noise.
        coarse_video: start of the video at the size of the first of two stages; None samples in one.
    """

    video: StreamTokens | None
    audio: StreamTokens | None
    contexts: Contexts
    seed: int
    coarse_video: StreamTokens | None = None


@dataclass(frozen=True)
class SampledLatents:
    """Sampled latents on the host: video [1, C, F, H, W], audio [1, 8, T, 16]; None for an absent stream."""

    video: Tensor | None
    audio: Tensor | None


def guidance_of(section: ValidationSection) -> tuple[Guidance, Guidance]:
    """Guidance of the video and of the audio stream."""
    blocks = section.stg_blocks if isinstance(section.stg_blocks, tuple) else None
    video = Guidance(
        cfg_scale=section.video_cfg_scale,
        stg_scale=section.video_stg_scale,
        stg_blocks=blocks,
        modality_scale=section.video_modality_guidance_scale,
        rescale=section.guidance_rescale,
    )
    audio = Guidance(
        cfg_scale=section.audio_cfg_scale,
        stg_scale=section.audio_stg_scale,
        stg_blocks=blocks,
        modality_scale=section.audio_modality_guidance_scale,
        rescale=section.guidance_rescale,
    )
    return video, audio


def schedule_of(section: ValidationSection) -> Tensor:
    """Sigmas of the schedule [steps + 1]; the standard ones ignore the clip's size, as in the released pipelines."""
    if section.schedule == "distilled":
        return distilled_schedule()
    return sigma_schedule(None, section.inference_steps or _DEFAULT_STEPS)


def count_steps(section: ValidationSection, samples: Sequence[PreparedSample | None]) -> int:
    """Sampling steps of the samples that are not None, in both stages."""
    own = [sample for sample in samples if sample is not None]
    first, second = len(schedule_of(section)) - 1, len(DISTILLED_REFINE_SIGMAS) - 1
    return sum(first + (second if sample.coarse_video is not None else 0) for sample in own)


def passes_at_once(video: SampledStream | None, audio: SampledStream | None, tokens_at_once: int) -> int:
    """Number of guidance passes that are batched into one forward: at least one, at most `tokens_at_once` tokens."""
    tokens = sum(stream.latent.shape[1] for stream in (video, audio) if stream is not None)
    return max(1, min(tokens_at_once // tokens, len(needed_passes(video, audio))))


def sample_all(
    model: nn.Module,
    samples: Sequence[PreparedSample | None],
    section: ValidationSection,
    device: torch.device | str,
    groups: SampleGroups | None = None,
    on_sample: Callable[[int], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    upsample: Callable[[Tensor], Tensor] | None = None,
) -> dict[int, SampledLatents]:
    """Samples this rank's share: indices `rank`, `rank + size`, and so on. A collective call.

    With `upsample`, a sample with a coarse start is sampled at that size, upscaled and refined at its own. Both streams
    begin the second stage at the first sigma of `distilled_schedule(refine=True)`, as in the released pipelines.

    All noise comes from CPU generators seeded per sample, so that it is equal on all ranks, meshes and devices.

    Args:
        model: the transformer; evaluated in eval mode, which is restored afterwards.
        samples: the same number on every rank; those of other groups may be None.
        section: schedule and guidance.
        device: device of the model.
        groups: distribution over data-parallel groups; None for a single process.
        on_sample: called with the index of a sample before it is sampled, for a log line.
        on_step: called after each step of each sample, for a progress bar.
        upsample: upscales latents [1, C, F, H, W] between two stages; None samples in one. The same on every rank.

    Returns:
        Latents of this rank's samples by index.
    """
    groups = groups or SampleGroups()
    stages = [_Stage(schedule_of(section), section.stepper)]
    if upsample is not None:
        # Ancestral noise belongs to the first stage alone.
        stages.append(_Stage(distilled_schedule(refine=True), "euler"))
    found: dict[int, SampledLatents] = {}
    with evaluating(model):
        # Round-robin, in rounds: within one, all groups start and end their forwards together.
        for first in range(0, len(samples), groups.size):
            index = first + groups.rank
            prepared, generator = None, torch.Generator()
            if index < len(samples):
                prepared = samples[index]
                assert prepared is not None, f"sample {index} belongs to group {groups.rank}, which did not prepare it"
                # It also draws the noise of ancestral steps and of the second stage: one seed fixes the whole clip.
                generator.manual_seed(prepared.seed)
                if on_sample is not None:
                    on_sample(index)
            for number, stage in enumerate(stages):
                run, result = None, found.get(index)
                if prepared is not None and number == 0:
                    is_coarse = upsample is not None and prepared.coarse_video is not None
                    video = prepared.coarse_video if is_coarse else prepared.video
                    run = _start_run(prepared, video, section, stage, generator, device)
                elif prepared is not None and prepared.coarse_video is not None:
                    assert upsample is not None and result is not None and result.video is not None
                    result = replace(result, video=upsample(result.video.to(device)))
                    run = _start_run(prepared, prepared.video, section, stage, generator, device, result)
                forwards = 0 if run is None else run.forwards(len(stage.sigmas) - 1)
                # Agreed before the first forward: a group that is done could not answer while others need its shards.
                missing = _most_forwards(forwards, groups, device) - forwards
                if run is not None:
                    found[index] = _finish_run(run, model, stage, generator, on_step)
                # After its own sample, and also without one: the other groups count on these forwards.
                _run_dummy_forwards(model, missing, device)
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluates a model in eval mode without gradients, and frees FSDP2's gathered parameters before and after.

    FSDP2 keeps the gathered parameters of the root after a forward, and without a backward pass nothing frees them.
    They would shadow weights that are changed afterwards, for example when averaged weights are swapped out.
    """
    # Per module rather than `model.train()`: modules that were in eval mode before stay in it.
    training = [module for module in model.modules() if module.training]
    model.eval()
    reshard(model)
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        for module in training:
            module.training = True


def placeholder_inputs(model: LTXTransformer, device: torch.device | str) -> tuple[Modality | None, Modality | None]:
    """Builds the smallest inputs of the model: one token of each of its streams."""
    config = model.config
    sizes = {"video": (config.video, 3), "audio": (config.audio, 1)}
    streams: dict[str, Modality] = {}
    for name, (stream, axes) in sizes.items():
        if model.modalities in ("av", name):
            streams[name] = Modality.from_sigma(
                torch.zeros(1, 1, stream.in_channels, device=device),
                # Zeros at sigma 1 with one text token: any finite input will do, the result is discarded.
                torch.ones(1, device=device),
                positions=torch.zeros(1, axes, 1, 2, device=device),
                context=torch.zeros(1, 1, stream.caption_dim or stream.context_dim, device=device),
            )
    return streams.get("video"), streams.get("audio")


@dataclass(frozen=True)
class _Stage:
    """A run of the sampler: its sigmas [steps + 1] and how it steps."""

    sigmas: Tensor
    stepper: Stepper


@dataclass(frozen=True)
class _Run:
    """A sample at the first sigma of a stage: starts of both streams, and their states."""

    video_start: StreamTokens | None
    audio_start: StreamTokens | None
    video: SampledStream | None
    audio: SampledStream | None
    passes_at_once: int

    def forwards(self, steps: int) -> int:
        return count_forwards(self.video, self.audio, steps, self.passes_at_once)


def _start_run(
    prepared: PreparedSample,
    video_start: StreamTokens | None,
    section: ValidationSection,
    stage: _Stage,
    generator: torch.Generator,
    device: torch.device | str,
    result: SampledLatents | None = None,
) -> _Run:
    """Moves both streams to the device and adds noise; the video's noise is drawn first."""
    starts = {"video": video_start, "audio": prepared.audio}
    guidance = dict(zip(("video", "audio"), guidance_of(section), strict=True))
    streams: dict[str, SampledStream | None] = {}
    for name in ("video", "audio"):
        start, context = starts[name], getattr(prepared.contexts, name)
        negative = getattr(prepared.contexts, f"negative_{name}")
        assert start is None or context is not None, f"{name} has no text"
        streams[name] = (
            None
            if start is None
            else begin(
                start,
                context,
                negative,
                guidance[name],
                generator,
                float(stage.sigmas[0]),
                device,
                None if result is None else getattr(result, name),
            )
        )
    at_once = passes_at_once(streams["video"], streams["audio"], section.tokens_at_once)
    return _Run(video_start, prepared.audio, streams["video"], streams["audio"], at_once)


def _finish_run(
    run: _Run,
    model: nn.Module,
    stage: _Stage,
    generator: torch.Generator,
    on_step: Callable[[StepReport], None] | None,
) -> SampledLatents:
    video, audio = sample(
        model,
        run.video,
        run.audio,
        stage.sigmas,
        stepper=stage.stepper,
        generator=generator,
        passes_at_once=run.passes_at_once,
        on_step=on_step,
    )
    return SampledLatents(
        # Frozen streams as well: they are decoded and shown with the generated one.
        _target(video, run.video_start, "video"),
        _target(audio, run.audio_start, "audio"),
    )


def _target(tokens: Tensor | None, start: StreamTokens | None, stream: str) -> Tensor | None:
    return None if tokens is None or start is None else target_latents(tokens, start, stream).cpu()


def _most_forwards(forwards: int, groups: SampleGroups, device: torch.device | str) -> int:
    if groups.size == 1:
        return forwards
    # On the device: NCCL reduces no CPU tensors.
    most = torch.tensor([forwards], device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=groups.process_group)
    return int(most)


def _run_dummy_forwards(model: nn.Module, missing: int, device: torch.device | str) -> None:
    """Joins the remaining collective forwards of other groups."""
    if missing:
        assert isinstance(model, LTXTransformer)
        video, audio = placeholder_inputs(model, device)
        # A compiled block would be compiled once more for these few tokens.
        with torch.compiler.set_stance("force_eager"):
            for _ in range(missing):
                model(video, audio, None)
