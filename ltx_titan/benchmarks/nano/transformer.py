"""Training of the miniature's transformer on latents of procedural clips that stay on the device.

Noise, velocities and inputs of the model are those of a training job. Unlike there, draws are made on the device in
whole batches, and each sample of a batch draws its own mode (both streams generated, or one for the other): the keyed
draws of a job, one generator per sample on the host, would take longer than a step of this model, and one mode per
batch would need one CUDA graph each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_titan.benchmarks.nano.loop import Inputs, train
from ltx_titan.codecs import AudioCodec, VideoCodec, load_text_encoder
from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.conditioning.tokens import audio_steps
from ltx_titan.config import BaseDtype, LoRASection
from ltx_titan.diffusion import StepDraws, add_noise, velocity_target
from ltx_titan.lora import apply_lora, init_lora_
from ltx_titan.model import FeatureExtractor, LTXTransformer, Modality, Perturbations, TextConnectors
from ltx_titan.nano.clips import (
    ALL_SHAPES,
    CONCEPT_SHAPE,
    FPS,
    SAMPLE_RATE,
    SECONDS,
    Clips,
    caption_of,
    combinations,
    draw_clips,
    render_audio,
    render_video,
)
from ltx_titan.nano.trained_config import MAX_TOKENS
from ltx_titan.parallel.float8 import Recipe, apply_float8

CONCEPT = ALL_SHAPES.index(CONCEPT_SHAPE)
_TEMPLATES = (0, 1)
_CAPTION_DROPOUT = 0.1
# Fractions of samples with a clean first frame, with a clean beginning of both streams, and with random clean tokens.
_FIRST_FRAME, _PREFIX, _RANDOM_TOKENS = 0.08, 0.06, 0.06
# Latent frames and audio steps of that beginning: 9 frames of the clip, and 0.36 s of its audio.
_PREFIX_FRAMES, _PREFIX_STEPS = 2, 9
# Fractions of samples: audio for a given video, video for given audio, and both with sigmas of their own. The rest has
# one sigma, as both streams do in sampling.
_V2A, _A2V, _INDEPENDENT = 0.12, 0.12, 0.26
# Log-odds of sigma: a clip of sixteen tokens is plain to see unless nearly everything is noise.
_SIGMA_CENTER, _SIGMA_SPREAD, _SIGMA_UNIFORM, _SIGMA_FLOOR = 1.0, 1.4, 0.15, 1e-3
# Recipes of full fine-tuning, by the last part of a method.
_RECIPES: dict[str, Recipe] = {"float8": "tensorwise", "native": "native"}
LORA_TARGETS = ("all_attention", "video_ffn", "audio_ffn")


def strategy_of(mode: str) -> FlexibleStrategy:
    """Conditions of a kind of sampling.

    Both streams are generated ("joint"), also from the first frame ("first_frame"), from the beginning of both
    ("extension") or around tokens of the video that a mask selects ("inpainting"), or one for the other ("v2a", "a2v").
    """
    of_video: dict[str, list[dict[str, Any]]] = {
        "first_frame": [{"type": "first_frame"}],
        "extension": [{"type": "prefix", "temporal_boundary": _PREFIX_FRAMES}],
        "inpainting": [{"type": "mask", "mask_dir": "video_masks"}],
    }
    of_audio = {"extension": [{"type": "prefix", "temporal_boundary": _PREFIX_STEPS}]}
    video = {"is_generated": mode != "v2a", "latents_dir": "latents", "conditions": of_video.get(mode, [])}
    audio = {"is_generated": mode != "a2v", "latents_dir": "audio_latents", "conditions": of_audio.get(mode, [])}
    return FlexibleStrategy.from_config({"video": video, "audio": audio})


def dtype_on(device: torch.device | str) -> torch.dtype:
    """Dtype of the transformer: bfloat16, but float32 on a CPU, since many have no bfloat16 units."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Contexts:
    """Contexts of all captions on the device, in the transformer's dtype, cut off after the longest one and a zero.

    The last two are those of the empty caption and of no caption.

    Attributes:
        video: [M, T, D].
        audio: [M, T, D].
        mask: added to the scores of the text attention [M, T], float32. The first zero stands for all that follow to
            the end of a context: the logarithm of their number gives it their weight, exactly.
        rows: caption -> row.
    """

    video: Tensor
    audio: Tensor
    mask: Tensor
    rows: dict[str, int]

    @property
    def empty(self) -> int:
        """Row of the empty caption."""
        return len(self.video) - 2

    def of(self, captions: Sequence[str], device: torch.device | str) -> Tensor:
        """Rows of captions [B]."""
        return torch.tensor([self.rows[caption] for caption in captions], device=device)

    def fields(self, rows: Tensor) -> dict[str, Tensor]:
        """The source `conditions` of a batch: contexts in full length."""
        missing = (0, 0, 0, MAX_TOKENS - self.video.shape[1])
        streams = {"video_prompt_embeds": self.video[rows], "audio_prompt_embeds": self.audio[rows]}
        return {name: nn.functional.pad(stream, missing) for name, stream in streams.items()}


def forward_with_short_contexts(
    model: nn.Module, video: Modality | None, audio: Modality | None, perturbations: Perturbations | None
) -> tuple[Tensor | None, Tensor | None]:
    """A forward pass on contexts in full length, most of which are zeros: one of them stands for all, see `Contexts`.

    A model this small spends most of its time on their keys and values.
    """
    return model(_shortened(video), _shortened(audio), perturbations)


def _shortened(stream: Modality | None) -> Modality | None:
    if stream is None:
        return None
    context, mask = short_contexts(stream.context)
    return replace(stream, context=context, context_mask=mask)


def short_contexts(contexts: Tensor) -> tuple[Tensor, Tensor]:
    """Cuts contexts [B, T, D] off after the longest one and a zero.

    Returns:
        Contexts [B, S, D], and the mask [B, S] with which they are worth the whole ones, see `Contexts`.
    """
    # Words come first, and connectors never make a zero of one.
    length, total = (contexts != 0).any(2).sum(1), contexts.shape[1]
    kept = min(int(length.max()) + 1, total)
    return contexts[:, :kept], _zeros_mask(length, kept, total)


def known_captions() -> list[str]:
    """Every caption without the concept: the text from which the tokenizer learns its words."""
    every = [*combinations(held_out=False), *combinations(held_out=True)]
    return [caption_of(combination, template) for combination in every for template in _TEMPLATES]


@torch.no_grad()
def encode_captions(
    text_encoder: Path, modules: tuple[FeatureExtractor, TextConnectors], device: str, captions: Sequence[str]
) -> Contexts:
    """Runs the text encoder, the projection and the connectors on captions."""
    encoder = load_text_encoder(text_encoder, device, torch.float32)
    extractor, connectors = (module.to(device) for module in modules)
    captions = [*captions, ""]
    parts, lengths = [], []
    for start in range(0, len(captions), 128):
        hidden_states, mask = encoder.encode(captions[start : start + 128])
        parts.append(connectors(*extractor(hidden_states, mask), mask)[:2])
        lengths.append(mask.sum(1))
    nothing = torch.zeros_like(mask[:1])
    parts.append(connectors(*extractor(hidden_states[:1], nothing), nothing)[:2])
    length = torch.cat([*lengths, nothing[:, 0]])
    kept = -(-(int(length.max()) + 1) // 8) * 8
    video, audio = (
        torch.cat([part[:, :kept].to(dtype_on(device)) for part in stream]) for stream in zip(*parts, strict=True)
    )
    mask = _zeros_mask(length, kept, MAX_TOKENS)
    return Contexts(video, audio, mask, {caption: row for row, caption in enumerate(captions)})


def _zeros_mask(length: Tensor, kept: int, total: int) -> Tensor:
    """Mask [B, kept] of contexts that have `total` tokens, the first `length` [B] of them words; see `Contexts`."""
    slot, length = torch.arange(kept, device=length.device), length[:, None]
    zeros = (total - length).float().log()
    return torch.where(slot < length, 0.0, torch.where(slot == length, zeros, -1e4))


@dataclass(frozen=True)
class Latents:
    """Normalized latents of clips on the device, and the row of each clip's caption.

    Attributes:
        video: [N, 128, 4, 2, 2], bfloat16.
        audio: [N, 8, 25, 16], float32.
        captions: [N].
    """

    video: Tensor
    audio: Tensor
    captions: Tensor

    def __len__(self) -> int:
        return len(self.video)


@torch.no_grad()
def encode_clips(clips: Clips, contexts: Contexts, video: VideoCodec, audio: AudioCodec, device: str) -> Latents:
    """Renders and encodes clips as `process-dataset` would store them."""
    steps = audio_steps(SECONDS)
    videos, audios = [], []
    for start in range(0, len(clips), 128):
        part = clips[start : start + 128].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            videos.append(video.encode(render_video(part)).to(torch.bfloat16))
            audios.append(audio.encode(render_audio(part), SAMPLE_RATE)[:, :, :steps].float())
    return Latents(torch.cat(videos), torch.cat(audios), contexts.of(clips.captions, device))


def blank_latents(clips: Clips, contexts: Contexts, device: str) -> Latents:
    """Zeros in place of the clips, for sampling that reads their captions only."""
    steps = audio_steps(SECONDS)
    video, audio = (torch.zeros(len(clips), *sizes, device=device) for sizes in ((128, 4, 2, 2), (8, steps, 16)))
    return Latents(video.to(torch.bfloat16), audio, contexts.of(clips.captions, device))


def make_batch(latents: Latents, contexts: Contexts, rows: Tensor, captions: Tensor) -> dict[str, dict[str, Tensor]]:
    """A batch of `FlexibleStrategy`.

    Args:
        latents: of all clips.
        contexts: of all captions.
        rows: clips [B].
        captions: row of the caption of each [B].
    """
    fps = torch.full((len(rows),), float(FPS), device=rows.device)
    return {
        "video_latents": {"latents": latents.video[rows], "fps": fps},
        "audio_latents": {"latents": latents.audio[rows]},
        "video_masks": {"mask": left_half(latents.video[rows])},
        "conditions": contexts.fields(captions),
    }


def left_half(video: Tensor) -> Tensor:
    """Mask of inpainting [B, F, H, W], 1 where latents [B, C, F, H, W] are clean: the right half is generated."""
    mask = torch.zeros_like(video[:, 0], dtype=torch.float32)
    mask[..., : video.shape[-1] // 2] = 1
    return mask


class StepLoss:
    """Inputs and loss of a training step on random clips, for `loop.train`."""

    def __init__(self, model: nn.Module, latents: Latents, contexts: Contexts, batch: int, seed: int = 0) -> None:
        self._model, self._contexts, self._batch = model, contexts, batch
        self._device = latents.video.device
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._captions = latents.captions
        # Positions are the same in all steps: those that a job prepares.
        rows = torch.zeros(batch, dtype=torch.long, device=self._device)
        inputs = strategy_of("joint").prepare(make_batch(latents, contexts, rows, rows), _no_draws(batch, self._device))
        assert inputs.video is not None
        assert inputs.audio is not None
        self._video, self._audio = inputs.video, inputs.audio
        # [N, S, C], first-frame tokens first.
        self._video_tokens = latents.video.flatten(2).transpose(1, 2).contiguous()
        self._audio_tokens = latents.audio.permute(0, 2, 1, 3).flatten(2).contiguous()
        self._tokens_per_frame = latents.video.shape[-2] * latents.video.shape[-1]

    def inputs(self, step: int) -> Inputs:
        """Draws a batch."""
        rows = torch.randint(len(self._captions), (self._batch,), generator=self._generator, device=self._device)
        captions = self._drop(self._captions[rows])
        video, audio = self._video_tokens[rows].float(), self._audio_tokens[rows]
        mode, condition = self._uniform(), self._uniform()[:, None]
        video_sigma, audio_sigma = self._sigma(), self._sigma()
        audio_sigma = torch.where(mode > 1 - _INDEPENDENT, audio_sigma, video_sigma)
        given = torch.zeros_like(video_sigma)
        video_sigma = torch.where(mode < _V2A, given, video_sigma)
        audio_sigma = torch.where((mode >= _V2A) & (mode < _V2A + _A2V), given, audio_sigma)
        frame = torch.arange(video.shape[1], device=self._device) // self._tokens_per_frame
        audio_step = torch.arange(audio.shape[1], device=self._device)
        some = torch.rand(video.shape[:2], generator=self._generator, device=self._device) < 0.5
        is_prefix = (condition >= _FIRST_FRAME) & (condition < _FIRST_FRAME + _PREFIX)
        is_random = condition > 1 - _RANDOM_TOKENS
        clean = (condition < _FIRST_FRAME) & (frame < 1) | is_prefix & (frame < _PREFIX_FRAMES) | is_random & some
        # 0 is a clean token.
        video_index, audio_index = 1 - clean.long(), 1 - (is_prefix & (audio_step < _PREFIX_STEPS)).long()
        contexts = self._contexts
        return (
            video,
            audio,
            self._noise(video),
            self._noise(audio),
            video_sigma,
            audio_sigma,
            video_index,
            audio_index,
            contexts.video[captions],
            contexts.audio[captions],
            contexts.mask[captions],
        )

    def loss(
        self,
        video: Tensor,
        audio: Tensor,
        video_noise: Tensor,
        audio_noise: Tensor,
        video_sigma: Tensor,
        audio_sigma: Tensor,
        video_index: Tensor,
        audio_index: Tensor,
        video_context: Tensor,
        audio_context: Tensor,
        context_mask: Tensor,
    ) -> dict[str, Tensor]:
        """Mean squared error of the velocities of generated tokens, over the batch."""
        noisy_video = torch.where(video_index[..., None] == 0, video, add_noise(video, video_noise, video_sigma))
        noisy_audio = torch.where(audio_index[..., None] == 0, audio, add_noise(audio, audio_noise, audio_sigma))
        predicted_video, predicted_audio = self._model(
            _modality(self._video, noisy_video, video_sigma, video_index, video_context, context_mask),
            _modality(self._audio, noisy_audio, audio_sigma, audio_index, audio_context, context_mask),
            None,
        )
        video_loss = _masked_error(
            predicted_video, velocity_target(video, video_noise), video_index * (video_sigma > 0)[:, None]
        )
        audio_mask = audio_index * (audio_sigma > 0)[:, None]
        audio_loss = _masked_error(predicted_audio, velocity_target(audio, audio_noise), audio_mask)
        return {"loss": video_loss + audio_loss, "video": video_loss, "audio": audio_loss}

    def _drop(self, captions: Tensor) -> Tensor:
        """Captions with dropout: half to the empty caption, which samples use, half to none, which jobs use."""
        chance = self._uniform()
        captions = torch.where(chance < _CAPTION_DROPOUT, self._contexts.empty + 1, captions)
        return torch.where(chance < _CAPTION_DROPOUT / 2, self._contexts.empty, captions)

    def _sigma(self) -> Tensor:
        normal = torch.randn(self._batch, generator=self._generator, device=self._device)
        sigma = torch.sigmoid(_SIGMA_CENTER + _SIGMA_SPREAD * normal)
        sigma = torch.where(self._uniform() < _SIGMA_UNIFORM, self._uniform(), sigma)
        return sigma.clamp(min=_SIGMA_FLOOR)

    def _uniform(self) -> Tensor:
        return torch.rand(self._batch, generator=self._generator, device=self._device)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, device=self._device)


def _modality(
    template: Modality, latent: Tensor, sigma: Tensor, index: Tensor, context: Tensor, mask: Tensor
) -> Modality:
    """A stream at the template's positions; timesteps are 0 where the index [B, S] is 0, else sigma."""
    values = sigma[:, None] * torch.arange(2, dtype=torch.float32, device=sigma.device)
    return replace(
        template,
        latent=latent,
        sigma=sigma,
        timesteps=values.gather(1, index),
        timestep_values=values,
        timestep_index=index,
        context=context,
        context_mask=mask,
    )


def _masked_error(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    error = (predicted.float() - target).square().mean(-1)
    return (error * mask).sum() / mask.sum()


def _no_draws(batch: int, device: torch.device) -> StepDraws:
    """Draws without noise."""
    sigma = torch.zeros(batch, device=device)
    video = torch.zeros(batch, 16, 128, device=device)
    audio = torch.zeros(batch, audio_steps(SECONDS), 128, device=device)
    return StepDraws(
        video_sigma=sigma, audio_sigma=sigma, video_noise=video, audio_noise=audio, video_uses=[], audio_uses=[]
    )


def train_transformer(
    model: LTXTransformer,
    latents: Latents,
    contexts: Contexts,
    *,
    seconds: float,
    batch: int,
    lr: float,
    compiled: bool,
    save: Callable[[], None],
) -> dict[str, Any]:
    """Trains all weights; returns the figures."""
    # As a job does: bfloat16 weights in the model, float32 weights in the optimizer.
    model.to(latents.video.device, contexts.video.dtype).train()
    if compiled:
        for block in model.transformer_blocks:
            block.compile()
    step = StepLoss(model, latents, contexts, batch)
    return train(
        "transformer", model.parameters(), step.inputs, step.loss, seconds=seconds, lr=lr, ema=0.9995, save=save
    )


def train_concept(
    model: LTXTransformer,
    latents: Latents,
    contexts: Contexts,
    method: str,
    seed: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    rank: int,
    targets: tuple[str, ...],
) -> dict[str, Any]:
    """Trains a LoRA or all weights on clips of the concept; returns the figures.

    Args:
        model: on its device, in the dtype of the contexts.
        latents: of the clips.
        contexts: of their captions.
        method: "lora" or "full", with "_float8" for float8 weights of the base (LoRA) or torchao's tensorwise matmuls
            (full), "full_native" for matmuls of the native recipe, or with "_adamw8bit" for moments in 8 bits.
        seed: of adapters and draws.
        steps: optimizer steps.
        batch: clips of each.
        lr: highest learning rate of a LoRA; a sixteenth of it trains all weights.
        rank, targets: of a LoRA.
    """
    kind, _, variant = method.partition("_")
    if kind == "lora":
        plain: BaseDtype = "float32" if latents.video.device.type == "cpu" else "bfloat16"
        base: BaseDtype = "float8" if variant == "float8" else plain
        apply_lora(model, LoRASection(rank=rank, alpha=float(rank), base_dtype=base, targets=targets))
        model.to(latents.video.device)
        init_lora_(model, seed)
    else:
        model.requires_grad_(True)
        lr = lr / 16
        if variant in _RECIPES:
            apply_float8(model, _RECIPES[variant], emulate=latents.video.device.type == "cpu")
    model.train()
    step = StepLoss(model, latents, contexts, batch, seed)
    return train(
        method,
        model.parameters(),
        step.inputs,
        step.loss,
        lr=lr,
        steps=steps,
        ema=0.9,
        weight_decay=0.0,
        warmup=10,
        log_every=25,
        graphed=variant != "adamw8bit",
        optimizer="adamw8bit" if variant == "adamw8bit" else "adamw",
    )


def training_clips(count: int) -> Clips:
    """Clips of the combinations that are not held out."""
    return draw_clips(count, 2, combinations(held_out=False))


def concept_clips(count: int, seed: int = 3) -> Clips:
    """Clips of the concept."""
    return draw_clips(count, seed, combinations(held_out=False, shapes=[CONCEPT]))


def tuning_clips(count: int, known: int) -> Clips:
    """Clips of the concept, and some of known shapes, without which a LoRA turns every shape into the concept."""
    return Clips.join([concept_clips(count), draw_clips(known, 4, combinations(held_out=False))])
