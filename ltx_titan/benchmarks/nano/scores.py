"""Scores of the miniature: samples of this project's sampler, measured in closed form."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ltx_titan.benchmarks.nano.codecs import held_out_clips
from ltx_titan.benchmarks.nano.transformer import (
    Contexts,
    blank_latents,
    concept_clips,
    encode_clips,
    forward_with_short_contexts,
    make_batch,
    strategy_of,
    training_clips,
)
from ltx_titan.codecs import AudioCodec, VideoCodec, Vocoder
from ltx_titan.diffusion import Guidance, sample, sigma_schedule
from ltx_titan.nano.clip_score import Measured, adherence, agreement, measure
from ltx_titan.nano.clips import Clips, render_audio, render_video
from ltx_titan.validation.sampling import evaluating
from ltx_titan.validation.start import begin, dataset_starts, target_latents

CFG_SCALE = 3.0
_BATCH = 128


class Sampler:
    """Samples clips for the captions or the other stream of given clips, and decodes them."""

    def __init__(
        self, contexts: Contexts, video: VideoCodec, audio: AudioCodec, vocoder: Vocoder, device: str, steps: int = 30
    ) -> None:
        self._contexts, self._video, self._audio, self._vocoder = contexts, video, audio, vocoder
        self._device, self._sigmas = device, sigma_schedule(None, steps)

    @property
    def sample_rate(self) -> int:
        """Rate of the audio, Hz."""
        return self._vocoder.sample_rate

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        clips: Clips,
        mode: str = "joint",
        cfg: float = 1.0,
        *,
        captioned: bool = True,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Samples one clip for each given one.

        Args:
            model: the transformer.
            clips: whose captions are used, and whose frames or audio where the mode needs them.
            mode: see `strategy_of`.
            cfg: guidance of both streams.
            captioned: False samples with the empty caption: all that is known comes from the other stream.
            seed: of the noise.

        Returns:
            Frames [B, 3, 25, 64, 64] and audio [B, 2, N] at the vocoder's rate; a given stream as it was rendered.
        """
        strategy = strategy_of(mode)
        generator = torch.Generator().manual_seed(seed)
        frames, waves = [], []
        for start in range(0, len(clips), _BATCH):
            part = clips[start : start + _BATCH]
            if mode == "joint":
                latents = blank_latents(part, self._contexts, self._device)
            else:
                latents = encode_clips(part, self._contexts, self._video, self._audio, self._device)
            rows = torch.arange(len(part), device=self._device)
            empty = torch.full_like(rows, self._contexts.empty)
            batch = make_batch(latents, self._contexts, rows, latents.captions if captioned else empty)
            negative = self._contexts.fields(empty)
            starts = dataset_starts(strategy, _on_host(batch))
            streams = {
                name: begin(
                    tokens,
                    batch["conditions"][f"{name}_prompt_embeds"],
                    negative[f"{name}_prompt_embeds"],
                    Guidance(cfg_scale=cfg),
                    generator,
                    1.0,
                    self._device,
                )
                for name, tokens in starts.items()
            }
            # The mask of a frozen stream is that of one sample.
            streams = {
                name: replace(stream, denoise_mask=stream.denoise_mask.expand(len(part), -1, -1))
                for name, stream in streams.items()
            }
            with evaluating(model):
                forward = partial(forward_with_short_contexts, model)
                found = sample(forward, streams["video"], streams["audio"], self._sigmas, passes_at_once=1)
            assert found[0] is not None
            assert found[1] is not None
            video = target_latents(found[0], starts["video"], "video")
            audio = target_latents(found[1], starts["audio"], "audio")
            on_device = part.to(self._device)
            if mode == "v2a":
                frames.append(render_video(on_device))
            else:
                frames.append(torch.cat([self._video.decode(some) for some in video.split(32)]).clamp(-1, 1))
            if mode == "a2v":
                waves.append(render_audio(on_device, self.sample_rate))
            else:
                waves.append(torch.cat([self._vocoder(mel) for mel in self._audio.decode(audio).split(32)]))
        return torch.cat(frames), torch.cat(waves)

    def measure(self, model: nn.Module, clips: Clips, mode: str = "joint", **options: Any) -> Measured:
        """Samples and measures."""
        frames, audio = self(model, clips, mode, **options)
        return measure(frames, audio, self.sample_rate)


def _on_host(batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The batch for `dataset_starts`, which reads everything but the text."""
    return {
        source: {name: value[:, :1].cpu() if source == "conditions" else value.cpu() for name, value in fields.items()}
        for source, fields in batch.items()
    }


def scored_clips(count: int) -> tuple[Clips, Clips, Clips]:
    """Clips whose captions are scored: held-out combinations, combinations of training clips, the concept."""
    return held_out_clips(count, "cpu"), training_clips(count), concept_clips(count, seed=11)


def shown_clips() -> tuple[Clips, Clips]:
    """Clips whose captions are shown on sheets: held-out combinations, the concept."""
    return held_out_clips(8, "cpu", seed=5), concept_clips(8, seed=5)


def score_model(sampler: Sampler, model: nn.Module, count: int, device: str) -> dict[str, dict[str, float]]:
    """Adherence to captions, seen and held out, with and without guidance; sync where one stream is given."""
    unseen, seen, _ = (clips.to(device) for clips in scored_clips(count))
    scores = {
        "held_out_cfg_1": adherence(sampler.measure(model, unseen), unseen),
        f"held_out_cfg_{CFG_SCALE:g}": adherence(sampler.measure(model, unseen, cfg=CFG_SCALE), unseen),
        "seen_cfg_1": adherence(sampler.measure(model, seen), seen),
        f"seen_cfg_{CFG_SCALE:g}": adherence(sampler.measure(model, seen, cfg=CFG_SCALE), seen),
    }
    for mode in ("first_frame", "extension", "inpainting"):
        for captioned in (True, False):
            frames, audio = sampler(model, unseen, mode, captioned=captioned)
            found = adherence(measure(frames, audio, sampler.sample_rate), unseen)
            found["known_psnr_db"] = _known_psnr(mode, frames, render_video(unseen))
            scores[mode if captioned else f"{mode}_without_caption"] = found
    for mode in ("v2a", "a2v"):
        measured = sampler.measure(model, unseen, mode, captioned=False)
        scores[f"{mode}_without_caption"] = _means(agreement(measured))
        measured = sampler.measure(model, unseen, mode)
        scores[mode] = _means(agreement(measured))
    return scores


def score_untrained(sampler: Sampler, model: nn.Module, count: int, device: str) -> dict[str, float]:
    """Adherence of a model with random weights: what the codecs and chance give."""
    clips = scored_clips(count)[0].to(device)
    return adherence(sampler.measure(model, clips), clips)


def score_concept(sampler: Sampler, model: nn.Module, count: int, device: str) -> dict[str, dict[str, float]]:
    """Adherence to captions of the concept, and to held-out captions without it (forgetting).

    With guidance, and without it as in the demo (`_cfg_1`).
    """
    others, _, concept = (clips.to(device) for clips in scored_clips(count))
    return {
        name + suffix: adherence(sampler.measure(model, clips, cfg=scale), clips)
        for scale, suffix in ((CFG_SCALE, ""), (1.0, "_cfg_1"))
        for name, clips in (("concept", concept), ("held_out", others))
    }


def save_sheet(path: Path, frames: Tensor, columns: int = 6) -> None:
    """Writes an image with one row per clip [B, 3, F, H, W] and `columns` of its frames."""
    chosen = torch.linspace(0, frames.shape[2] - 1, columns).round().long()
    pixels = ((frames[:, :, chosen].float().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    # [B, 3, n, H, W] -> [B * H, n * W, 3].
    sheet = pixels.permute(0, 3, 2, 4, 1).flatten(2, 3).flatten(0, 1)
    Image.fromarray(np.ascontiguousarray(sheet.numpy())).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)


def _known_psnr(mode: str, frames: Tensor, clips: Tensor) -> float:
    """PSNR in dB of the part of the frames that was given, through the codec, mean over clips."""
    parts = {"first_frame": (slice(0, 1), slice(None)), "extension": (slice(0, 9), slice(None))}
    # A margin of a quarter: the decoder sees the generated half beside the given one.
    times, columns = parts.get(mode, (slice(None), slice(0, clips.shape[-1] // 4)))
    error = (frames - clips)[:, :, times, :, columns].square().flatten(1).mean(1)
    return float((-10 * (error / 4).log10()).mean())


def _means(flags: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(values.float().mean()) for name, values in flags.items()}
