"""Training of the miniature's transformer on latents of procedural clips that stay on the device.

Conditioning, sigmas, noise and loss are those of a training job (`FlexibleStrategy`, `ShiftedLogitNormal`,
`flow_matching_loss`). Draws are made on the device in whole batches: the keyed draws of a job, one generator per sample
on the host, would take longer than a step of this model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ltx_titan.benchmarks.nano.loop import train
from ltx_titan.codecs import AudioCodec, VideoCodec, load_text_encoder
from ltx_titan.conditioning import FlexibleStrategy, weighted_loss
from ltx_titan.conditioning.tokens import audio_steps
from ltx_titan.config import LoRASection
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws
from ltx_titan.lora import apply_lora, init_lora_
from ltx_titan.model import FeatureExtractor, LTXTransformer, TextConnectors
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

CONCEPT = ALL_SHAPES.index(CONCEPT_SHAPE)
_TEMPLATES = (0, 1)
_CAPTION_DROPOUT = 0.1
_FIRST_FRAME = {"type": "first_frame", "probability": 0.1}
# Of ten steps, one learns audio for a given video, one video for given audio.
_MODES = ("v2a", "a2v", *["joint"] * 8)


def strategy_of(mode: str) -> FlexibleStrategy:
    """Both streams generated ("joint", "first_frame"), or one for the other ("v2a", "a2v")."""
    # Never drawn in a2v: with a condition the blocks have the same shapes as in joint training, and compile once.
    never = [{**_FIRST_FRAME, "probability": 0.0}]
    conditions = {"joint": [_FIRST_FRAME], "a2v": never, "first_frame": [{**_FIRST_FRAME, "probability": 1.0}]}
    video = {"is_generated": mode != "v2a", "latents_dir": "latents", "conditions": conditions.get(mode, [])}
    audio = {"is_generated": mode != "a2v", "latents_dir": "audio_latents"}
    return FlexibleStrategy.from_config({"video": video, "audio": audio})


@dataclass(frozen=True)
class Contexts:
    """Contexts of all captions on the device, in bfloat16.

    Attributes:
        video: [M, 1024, D]; the last two are those of the empty caption and of no caption (registers alone).
        audio: [M, 1024, D] likewise.
        rows: caption -> row.
    """

    video: Tensor
    audio: Tensor
    rows: dict[str, int]

    def of(self, captions: Sequence[str], device: torch.device | str) -> Tensor:
        """Rows of captions [B]."""
        return torch.tensor([self.rows[caption] for caption in captions], device=device)

    def fields(self, rows: Tensor) -> dict[str, Tensor]:
        """The source `conditions` of a batch."""
        return {"video_prompt_embeds": self.video[rows], "audio_prompt_embeds": self.audio[rows]}


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
    parts = []
    captions = [*captions, ""]
    for start in range(0, len(captions), 32):
        hidden_states, mask = encoder.encode(captions[start : start + 32])
        parts.append(connectors(*extractor(hidden_states, mask), mask)[:2])
    nothing = torch.zeros_like(mask[:1])
    parts.append(connectors(*extractor(hidden_states[:1], nothing), nothing)[:2])
    video, audio = (torch.cat([part.to(torch.bfloat16) for part in stream]) for stream in zip(*parts, strict=True))
    return Contexts(video, audio, {caption: row for row, caption in enumerate(captions)})


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
        "conditions": contexts.fields(captions),
    }


class StepLoss:
    """Loss of a training step on random clips, for `loop.train`."""

    def __init__(
        self, model: nn.Module, latents: Latents, contexts: Contexts, batch: int, modes: Sequence[str] = _MODES
    ) -> None:
        self._model, self._latents, self._contexts, self._batch = model, latents, contexts, batch
        self._modes = modes
        self._strategies = {mode: strategy_of(mode) for mode in set(modes)}
        self._device = latents.video.device
        self._generator = torch.Generator(self._device).manual_seed(0)
        self._sampler = ShiftedLogitNormal()

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Forward pass of one batch."""
        strategy = self._strategies[self._modes[step % len(self._modes)]]
        rows = torch.randint(len(self._latents), (self._batch,), generator=self._generator, device=self._device)
        batch = make_batch(self._latents, self._contexts, rows, self._captions(rows))
        inputs = strategy.prepare(batch, self._draw(strategy, batch))
        video, audio = self._model(inputs.video, inputs.audio, None)
        loss = strategy.loss(video, audio, inputs)
        parts = {"video": loss.video, "audio": loss.audio}
        means = {name: part.mean() for name, part in parts.items() if part is not None}
        return {"loss": weighted_loss(loss, 1.0, 1.0).mean(), **means}

    def _captions(self, rows: Tensor) -> Tensor:
        """Captions with dropout: half to the empty caption, which samples use, half to none, which jobs use."""
        captions = self._latents.captions[rows]
        chance = torch.rand(len(rows), generator=self._generator, device=self._device)
        captions = torch.where(chance < _CAPTION_DROPOUT, len(self._contexts.video) - 1, captions)
        return torch.where(chance < _CAPTION_DROPOUT / 2, len(self._contexts.video) - 2, captions)

    def _draw(self, strategy: FlexibleStrategy, batch: dict[str, dict[str, Tensor]]) -> StepDraws:
        found: dict[str, Any] = {}
        for name, plan in zip(("video", "audio"), strategy.draw_plan(batch), strict=True):
            assert plan is not None
            sigma = noise = None
            if plan.is_generated:
                sigma = self._sampler.sample((self._batch,), plan.num_tokens, self._generator)
                shape = (self._batch, plan.num_tokens, plan.channels)
                noise = torch.randn(shape, generator=self._generator, device=self._device)
            uses = [
                torch.rand(self._batch, generator=self._generator, device=self._device) < condition.probability
                for condition in plan.conditions
            ]
            found |= {f"{name}_sigma": sigma, f"{name}_noise": noise, f"{name}_uses": uses}
        return StepDraws(**found)


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
    loss_of = StepLoss(model, latents, contexts, batch)
    # Compilation is not part of the budget.
    for step in range(4):
        loss_of(step)["loss"].backward()
    model.zero_grad(set_to_none=True)
    return train("transformer", model.parameters(), loss_of, seconds=seconds, lr=lr, save=save)


def train_concept(
    model: LTXTransformer, latents: Latents, contexts: Contexts, *, rank: int, seconds: float, batch: int, lr: float
) -> dict[str, Any]:
    """Adds a LoRA to the transformer and trains it on clips of the concept; returns the figures."""
    apply_lora(model, LoRASection(rank=rank, alpha=float(rank), base_dtype="bfloat16", targets=("all_attention",)))
    model.to(latents.video.device).train()
    init_lora_(model, 0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss_of = StepLoss(model, latents, contexts, batch, modes=("joint",))
    return train("LoRA", parameters, loss_of, seconds=seconds, lr=lr, ema=0.99, weight_decay=0.0)


def training_clips(count: int) -> Clips:
    """Clips of the combinations that are not held out."""
    return draw_clips(count, 2, combinations(held_out=False))


def concept_clips(count: int, seed: int = 3) -> Clips:
    """Clips of the concept."""
    return draw_clips(count, seed, combinations(held_out=False, shapes=[CONCEPT]))
