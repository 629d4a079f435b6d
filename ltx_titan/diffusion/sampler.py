"""The denoising loop: from noise to clean tokens of both streams, guided, with part of them given.

It knows nothing of files, prompts or meshes: plain tensors and a callable in, tokens out, so validation during
training, the command line and tests run one and the same loop. With a sharded model every rank must call it with as
many forwards as the others; `count_forwards` says how many there will be.

Each step needs up to four predictions of the model (see `guidance`). They differ in context and perturbations alone, so
they can be one forward on a larger batch, several smaller ones, or one after the other, at equal results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Generator, Tensor

from ltx_titan.diffusion.flow import denoised_from_velocity, euler_ancestral_step, euler_step, keep_given
from ltx_titan.diffusion.guidance import Guidance, guide
from ltx_titan.model import Modality, Perturbations

Transformer = Callable[[Modality | None, Modality | None, Perturbations | None], tuple[Tensor | None, Tensor | None]]
Stepper = Literal["euler", "euler_ancestral"]

PASSES = ("cond", "uncond", "perturbed", "isolated")


@dataclass(frozen=True)
class SampledStream:
    """State of one stream at the start of a run: `B` samples, `S` tokens, references included.

    Attributes:
        latent: starting tokens [B, S, C], float32: noise, with the given content in given tokens (`noise_given`).
        clean: given content [B, S, C]; only read where the mask is below 1.
        denoise_mask: 1 generates a token, 0 gives it, [B, S, 1], float32.
        positions: [B, n, S, 2], as in `Modality`.
        context: text of the prompt [B, T, D].
        negative_context: text of the negative prompt [B, T, D]; None where guidance asks for no unconditional pass.
        guidance: the stream's weights; without effect on a frozen stream.
        is_frozen: the stream is given altogether: clean, noise level 0, never stepped.
        keyframes_mask: marks tokens that stand for a single pixel frame [B, S, 1], or None.
        coordinate_values: positions in the small form, see `Modality`; None leaves it to the model to find them.
        coordinate_index: likewise.
    """

    latent: Tensor
    clean: Tensor
    denoise_mask: Tensor
    positions: Tensor
    context: Tensor
    negative_context: Tensor | None = None
    guidance: Guidance = field(default_factory=Guidance)
    is_frozen: bool = False
    keyframes_mask: Tensor | None = None
    coordinate_values: tuple[Tensor, ...] | None = None
    coordinate_index: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.is_frozen and self.guidance.needs_uncond and self.negative_context is None:
            raise ValueError(
                f"cfg_scale is {self.guidance.cfg_scale}, but the stream has no context of a negative prompt; "
                "encode one, or set the scale to 1."
            )


@dataclass(frozen=True)
class StepReport:
    """What one step predicted, for tests and previews; None for an absent or frozen stream.

    Attributes:
        step: number of the step, from 0.
        sigma: noise level at which it was predicted.
        video: guided prediction of the clean video tokens [B, S, C], before given tokens are put back.
        audio: the same for audio.
        video_passes: the single predictions that went into it; empty where the step reused an earlier one.
        audio_passes: the same for audio.
    """

    step: int
    sigma: float
    video: Tensor | None
    audio: Tensor | None
    video_passes: dict[str, Tensor]
    audio_passes: dict[str, Tensor]


def needed_passes(video: SampledStream | None, audio: SampledStream | None) -> tuple[str, ...]:
    """Predictions a guided step needs, in the order of `PASSES`; one that either stream needs is made for both."""
    guided = [s.guidance for s in (video, audio) if s is not None and not s.is_frozen]
    wanted = {
        "cond": True,
        "uncond": any(guidance.needs_uncond for guidance in guided),
        "perturbed": any(guidance.needs_perturbed for guidance in guided),
        "isolated": video is not None and audio is not None and any(guidance.needs_isolated for guidance in guided),
    }
    return tuple(name for name in PASSES if wanted[name])


def count_forwards(
    video: SampledStream | None, audio: SampledStream | None, steps: int, passes_at_once: int | None = None
) -> int:
    """How often `sample` will call the model; ranks that share a sharded model must all come to the same number."""
    generated = [stream for stream in (video, audio) if stream is not None and not stream.is_frozen]
    asking = sum(any(stream.guidance.predicts(step) for stream in generated) for step in range(steps))
    return asking * len(_chunks(needed_passes(video, audio), passes_at_once))


@torch.no_grad()
def sample(
    model: Transformer,
    video: SampledStream | None,
    audio: SampledStream | None,
    sigmas: Tensor,
    *,
    stepper: Stepper = "euler",
    generator: Generator | None = None,
    passes_at_once: int | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Denoises both streams.

    In every step, for each generated stream: noise level of a token = mask * sigma; prediction = latent - velocity *
    noise level; guidance; given tokens put back; one step of the ODE (or SDE) solver. Given tokens come out bit for bit
    as they went in.

    Args:
        model: the transformer, or anything called like it. It should be in eval mode.
        video: start of the video stream, None for a run without video.
        audio: start of the audio stream, None for a run without audio.
        sigmas: decreasing noise levels [steps + 1], the first one that of the starting tokens.
        stepper: `euler` is deterministic, `euler_ancestral` adds fresh noise in every step.
        generator: source of that noise, drawn on its device, video before audio.
        passes_at_once: predictions in one forward; None puts all into one, 1 needs the least memory.
        on_step: called after each prediction.

    Returns:
        Clean video and audio tokens [B, S, C], float32, None where the stream is absent; a frozen stream's are `clean`.

    Raises:
        ValueError: if no stream is generated, or noise is asked for without a generator.
    """
    streams = {name: stream for name, stream in (("video", video), ("audio", audio)) if stream is not None}
    generated = {name: stream for name, stream in streams.items() if not stream.is_frozen}
    if not generated:
        raise ValueError("no stream is generated: both are frozen or absent, so there is nothing to sample.")
    if stepper == "euler_ancestral" and generator is None:
        raise ValueError("stepper euler_ancestral draws noise in every step; give it a generator.")
    passes = needed_passes(video, audio)
    latents = {name: (s.clean if s.is_frozen else s.latent).float() for name, s in streams.items()}
    levels = {name: _mask_levels(stream) for name, stream in streams.items()}
    guided: dict[str, Tensor] = {}
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        asking = {name for name, stream in generated.items() if stream.guidance.predicts(step)}
        predictions: dict[str, dict[str, Tensor]] = {name: {} for name in generated}
        if asking:
            inputs = {
                name: _modality(stream, latents[name], levels[name], sigma, enabled=name in asking or stream.is_frozen)
                for name, stream in streams.items()
            }
            for chunk in _chunks(passes, passes_at_once):
                velocities = _forward(model, streams, inputs, chunk)
                for name in asking:
                    each = _denoised(latents[name], velocities[name], inputs[name].timesteps, len(chunk))
                    predictions[name].update(zip(chunk, each, strict=True))
        for name in asking:
            guided[name] = guide(generated[name].guidance, **predictions[name])
        if on_step is not None:
            per_pass = (predictions.get("video", {}), predictions.get("audio", {}))
            on_step(StepReport(step, sigma, guided.get("video"), guided.get("audio"), *per_pass))
        for name, stream in generated.items():
            denoised = keep_given(guided[name], stream.clean, stream.denoise_mask)
            latents[name] = _step(stream, latents[name], denoised, sigma, next_sigma, stepper, generator)
    return latents.get("video"), latents.get("audio")


def _chunks(passes: Sequence[str], at_once: int | None) -> list[tuple[str, ...]]:
    size = len(passes) if at_once is None else max(1, min(at_once, len(passes)))
    return [tuple(passes[start : start + size]) for start in range(0, len(passes), size)]


def _mask_levels(stream: SampledStream) -> tuple[Tensor, Tensor]:
    """Distinct values of the denoise mask [K] and which one each token has [B, S].

    0 and 1 are always among them, so that all runs with whole tokens given or not look alike to a compiled model.
    """
    flat = stream.denoise_mask.float().flatten(1)
    values, index = torch.cat([flat.new_tensor([0.0, 1.0]), flat.flatten()]).unique(return_inverse=True)
    return values, index[2:].view_as(flat)


def _modality(
    stream: SampledStream, latent: Tensor, levels: tuple[Tensor, Tensor], sigma: float, enabled: bool
) -> Modality:
    batch = latent.shape[0]
    level = 0.0 if stream.is_frozen else sigma
    values, index = levels
    return Modality(
        latent=latent,
        sigma=latent.new_full((batch,), level),
        timesteps=stream.denoise_mask.float() * level,
        positions=stream.positions,
        context=stream.context,
        enabled=enabled,
        keyframes_mask=stream.keyframes_mask,
        timestep_values=(values * level).expand(batch, -1),
        timestep_index=index,
        coordinate_values=stream.coordinate_values,
        coordinate_index=stream.coordinate_index,
    )


def _forward(
    model: Transformer, streams: dict[str, SampledStream], inputs: dict[str, Modality], chunk: Sequence[str]
) -> dict[str, Tensor]:
    """Velocities [passes * B, S, C] of each stream, pass after pass."""
    batch = next(iter(inputs.values())).latent.shape[0]
    repeated = {name: _repeat(inputs[name], streams[name], chunk) for name in streams}
    skipped = [entry for name in chunk for entry in [_skipped(streams, name)] * batch]
    perturbations = Perturbations.from_lists(skipped) if any(skipped) else None
    video, audio = model(repeated.get("video"), repeated.get("audio"), perturbations)
    return {name: velocity for name, velocity in (("video", video), ("audio", audio)) if velocity is not None}


def _repeat(modality: Modality, stream: SampledStream, chunk: Sequence[str]) -> Modality:
    """The same tokens once per pass, each with the context of its pass."""
    contexts = [_context(stream, name) for name in chunk]
    if len(chunk) == 1:
        return replace(modality, context=contexts[0])

    def times(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor] * len(chunk))

    return replace(
        modality,
        latent=times(modality.latent),
        sigma=times(modality.sigma),
        timesteps=times(modality.timesteps),
        positions=times(modality.positions),
        context=torch.cat(contexts),
        keyframes_mask=times(modality.keyframes_mask),
        timestep_values=times(modality.timestep_values),
        timestep_index=times(modality.timestep_index),
        coordinate_index=times(modality.coordinate_index),
    )


def _context(stream: SampledStream, name: str) -> Tensor:
    if name == "uncond" and not stream.is_frozen and stream.guidance.needs_uncond:
        return stream.negative_context
    return stream.context


def _skipped(streams: dict[str, SampledStream], name: str) -> list[dict]:
    """What the model leaves out in one pass, as `Perturbations.from_lists` takes it."""
    if name == "isolated":
        return [{"type": kind, "blocks": None} for kind in ("skip_a2v_cross_attn", "skip_v2a_cross_attn")]
    if name != "perturbed":
        return []
    return [
        {"type": f"skip_{stream_name}_self_attn", "blocks": stream.guidance.stg_blocks}
        for stream_name, stream in streams.items()
        if not stream.is_frozen and stream.guidance.needs_perturbed
    ]


def _denoised(latent: Tensor, velocities: Tensor, timesteps: Tensor, num_passes: int) -> list[Tensor]:
    return [denoised_from_velocity(latent, velocity, timesteps) for velocity in velocities.chunk(num_passes)]


def _step(
    stream: SampledStream,
    latent: Tensor,
    denoised: Tensor,
    sigma: float,
    next_sigma: float,
    stepper: Stepper,
    generator: Generator | None,
) -> Tensor:
    if stepper == "euler":
        return euler_step(latent, denoised, sigma, next_sigma)
    assert generator is not None
    noise = torch.randn(latent.shape, generator=generator, device=generator.device, dtype=torch.float32)
    stepped = euler_ancestral_step(latent, denoised, sigma, next_sigma, noise.to(latent.device))
    # Fresh noise belongs to generated tokens; a given token carries none at any noise level.
    return torch.where(stream.denoise_mask == 0, stream.clean.float(), stepped)
