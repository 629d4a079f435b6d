"""The denoising loop: from noise to clean tokens of both streams, with guidance and conditioned tokens.

Plain tensors and a callable in, tokens out: validation during training, the command line and tests run the same loop,
without files, prompts or meshes. With a sharded model all ranks must make equally many forwards; `count_forwards`
computes their number beforehand.

Each step needs up to four predictions of the model (see `guidance`). They differ in context and perturbations alone, so
they can run as one forward on a larger batch, as several smaller ones, or one after the other, with equal results.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal, TypeVar

import torch
from torch import Generator, Tensor

from ltx_titan.diffusion.flow import denoised_from_velocity, euler_ancestral_step, euler_step, restore_clean
from ltx_titan.diffusion.guidance import Guidance, guide
from ltx_titan.model import Modality, Perturbations

OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)

Transformer = Callable[[Modality | None, Modality | None, Perturbations | None], tuple[Tensor | None, Tensor | None]]
Stepper = Literal["euler", "euler_ancestral"]

PASSES = ("cond", "uncond", "perturbed", "isolated")


@dataclass(frozen=True)
class SampledStream:
    """State of one stream at the start of a run: `B` samples, `S` tokens, references included.

    Attributes:
        latent: starting tokens [B, S, C], float32: noise, or clean content in conditioned tokens (`initial_latent`).
        clean: content of conditioned tokens [B, S, C]; only read where the mask is below 1.
        denoise_mask: fraction of sigma that each token has [B, S, 1], float32: 1 for a generated token, 0 for a clean
            one.
        positions: [B, n, S, 2], as in `Modality`.
        context: text of the prompt [B, T, D].
        negative_context: text of the negative prompt [B, T, D]; None if guidance needs no unconditional pass.
        guidance: the stream's weights; without effect on a frozen stream.
        is_frozen: the whole stream is clean: sigma 0, never stepped.
        keyframes_mask: marks tokens of a single pixel frame [B, S, 1], or None.
        coordinate_values: positions in compact form, see `Modality`; None: the model computes it.
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
    """Predictions of one step, for tests and previews; None for an absent or frozen stream.

    Attributes:
        step: number of the step, from 0.
        sigma: sigma of the step.
        video: guided prediction of the clean video tokens [B, S, C], before conditioned tokens are restored.
        audio: the same for audio.
        video_passes: the predictions that guidance combined, by the name of their pass.
        audio_passes: the same for audio.
    """

    step: int
    sigma: float
    video: Tensor | None
    audio: Tensor | None
    video_passes: dict[str, Tensor]
    audio_passes: dict[str, Tensor]


def needed_passes(video: SampledStream | None, audio: SampledStream | None) -> tuple[str, ...]:
    """Names the predictions that a step needs, in the order of `PASSES`; what one stream needs runs for both."""
    guided = [s.guidance for s in (video, audio) if s is not None and not s.is_frozen]
    wanted = {
        "cond": True,
        "uncond": any(guidance.needs_uncond for guidance in guided),
        "perturbed": any(guidance.needs_perturbed for guidance in guided),
        # A lone stream is isolated already; the pass would repeat `cond`.
        "isolated": video is not None and audio is not None and any(guidance.needs_isolated for guidance in guided),
    }
    return tuple(name for name in PASSES if wanted[name])


def count_forwards(
    video: SampledStream | None, audio: SampledStream | None, steps: int, passes_at_once: int | None = None
) -> int:
    """Computes how often `sample` will call the model; ranks that share a sharded model need equal numbers."""
    return steps * len(_chunks(needed_passes(video, audio), passes_at_once))


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

    In every step, for each generated stream: timestep of a token = mask * sigma; prediction = latent - velocity *
    timestep; guidance; conditioned tokens restored; one step of the ODE (or SDE) solver. Clean tokens come out bit for
    bit as they went in.

    Args:
        model: the transformer, or a callable with its signature. It should be in eval mode.
        video: start of the video stream, None for a run without video.
        audio: start of the audio stream, None for a run without audio.
        sigmas: decreasing sigmas [steps + 1], the first one that of the starting tokens.
        stepper: `euler` is deterministic, `euler_ancestral` adds fresh noise in every step.
        generator: source of that noise, drawn on its device, video before audio.
        passes_at_once: predictions in one forward; None runs all in one, 1 needs the least memory.
        on_step: called after each prediction.

    Returns:
        Clean video and audio tokens [B, S, C], float32, None where the stream is absent; a frozen stream's are `clean`.

    Raises:
        ValueError: no stream is generated, or the stepper draws noise and there is no generator.
    """
    streams = {name: stream for name, stream in (("video", video), ("audio", audio)) if stream is not None}
    generated = {name: stream for name, stream in streams.items() if not stream.is_frozen}
    if not generated:
        raise ValueError("no stream is generated: both are frozen or absent, so there is nothing to sample.")
    if stepper == "euler_ancestral" and generator is None:
        raise ValueError("stepper euler_ancestral draws noise in every step; give it a generator.")
    passes = needed_passes(video, audio)
    # Steps accumulate in float32, whatever the dtype of the model.
    latents = {name: (s.clean if s.is_frozen else s.latent).float() for name, s in streams.items()}
    # Found once per run: `unique` makes the host wait for the device.
    fractions = {name: _noise_fractions(stream) for name, stream in streams.items()}
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas.tolist())):
        inputs = {name: _modality(s, latents[name], sigma, *fractions[name]) for name, s in streams.items()}
        predictions: dict[str, dict[str, Tensor]] = {name: {} for name in generated}
        # The tokens of all passes are equal, so the inputs are built once per step.
        for chunk in _chunks(passes, passes_at_once):
            velocities = _forward(model, streams, inputs, chunk)
            for name in generated:
                timesteps = inputs[name].timesteps[:, :, None]
                # [passes * B, S, C] -> one [B, S, C] per pass; guidance works on denoised predictions, in float32.
                each = [denoised_from_velocity(latents[name], v, timesteps) for v in velocities[name].chunk(len(chunk))]
                predictions[name].update(zip(chunk, each, strict=True))
        guided = {name: guide(stream.guidance, **predictions[name]) for name, stream in generated.items()}
        if on_step is not None:
            per_pass = (predictions.get("video", {}), predictions.get("audio", {}))
            on_step(StepReport(step, sigma, guided.get("video"), guided.get("audio"), *per_pass))
        for name, stream in generated.items():
            # After guidance, whose rescale would otherwise change clean tokens as well.
            denoised = restore_clean(guided[name], stream.clean, stream.denoise_mask)
            latents[name] = _step(stream, latents[name], denoised, sigma, next_sigma, stepper, generator)
    return latents.get("video"), latents.get("audio")


def _chunks(passes: Sequence[str], at_once: int | None) -> list[tuple[str, ...]]:
    size = len(passes) if at_once is None else max(1, min(at_once, len(passes)))
    return [tuple(passes[start : start + size]) for start in range(0, len(passes), size)]


def _noise_fractions(stream: SampledStream) -> tuple[Tensor, Tensor]:
    """Distinct values of the denoise mask [K] and the index of each token's value [B, S].

    0 and 1 are always among them, so K is 2 with or without conditioned tokens and compiled blocks see one shape.
    """
    flat = stream.denoise_mask.float().flatten(1)
    values, index = torch.cat([flat.new_tensor([0.0, 1.0]), flat.flatten()]).unique(return_inverse=True)
    return values, index[2:].view_as(flat)


def _modality(stream: SampledStream, latent: Tensor, sigma: float, fractions: Tensor, index: Tensor) -> Modality:
    return Modality.from_fractions(
        latent,
        latent.new_full(latent.shape[:1], 0.0 if stream.is_frozen else sigma),
        fractions,
        index,
        positions=stream.positions,
        context=stream.context,
        keyframes_mask=stream.keyframes_mask,
        coordinate_values=stream.coordinate_values,
        coordinate_index=stream.coordinate_index,
    )


def _forward(
    model: Transformer, streams: dict[str, SampledStream], inputs: dict[str, Modality], chunk: Sequence[str]
) -> dict[str, Tensor]:
    """Velocities [passes * B, S, C] of each stream, pass after pass."""
    batch = next(iter(inputs.values())).latent.shape[0]
    repeated = {name: _repeat(inputs[name], streams[name], chunk) for name in streams}
    # Entries in the order of `torch.cat` below: pass after pass, each with B samples.
    skipped = [entry for name in chunk for entry in [_skipped(streams, name)] * batch]
    perturbations = Perturbations.from_lists(skipped) if any(skipped) else None
    video, audio = model(repeated.get("video"), repeated.get("audio"), perturbations)
    return {name: velocity for name, velocity in (("video", video), ("audio", audio)) if velocity is not None}


def _repeat(modality: Modality, stream: SampledStream, chunk: Sequence[str]) -> Modality:
    """Repeats the tokens once per pass, each with the context of its pass."""
    contexts = [_context(stream, name) for name in chunk]
    # Spares a copy of every tensor in the usual case of one pass at a time.
    if len(chunk) == 1:
        return replace(modality, context=contexts[0])

    def times(tensor: OptionalTensor) -> OptionalTensor:
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
    # A frozen stream is not guided: it keeps its own text in every pass.
    if name == "uncond" and not stream.is_frozen and stream.guidance.needs_uncond:
        assert stream.negative_context is not None
        return stream.negative_context
    return stream.context


def _skipped(streams: dict[str, SampledStream], name: str) -> list[dict]:
    """Attention that one pass skips, in the form of `Perturbations.from_lists`."""
    if name == "isolated":
        return [{"type": kind, "blocks": None} for kind in ("skip_a2v_cross_attn", "skip_v2a_cross_attn")]
    if name != "perturbed":
        return []
    return [
        {"type": f"skip_{stream_name}_self_attn", "blocks": stream.guidance.stg_blocks}
        for stream_name, stream in streams.items()
        if not stream.is_frozen and stream.guidance.needs_perturbed
    ]


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
    # Fresh noise is for generated tokens; a clean token has none at any sigma.
    return torch.where(stream.denoise_mask == 0, stream.clean.float(), stepped)
