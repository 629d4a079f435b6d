"""Scores of sampled clips by models in local folders: `[validation.quality]`.

CLIP or X-CLIP compares frames with the prompt, CLAP the audio, each by the cosine similarity of its embeddings. A clip
is scored on the rank that decoded it, so that only numbers are sent. Scores are a convenience: one that fails is NaN.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ltx_titan.common.tensors import evenly_spaced, free_device_memory
from ltx_titan.config.validation import QualitySection

if TYPE_CHECKING:
    # At run time they load PyAV and diffusers, which a job without samples does not need.
    from ltx_titan.media import Audio
    from ltx_titan.validation.decode import DecodedSample

logger = logging.getLogger(__name__)

# As many as any released X-CLIP compares; a clip that waits for its score need not keep all of its frames.
_KEPT_FRAMES = 32
# Those of CLIP, for a folder without preprocessor_config.json.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class QualityClip:
    """A decoded clip and what it should show.

    Attributes:
        index: number of the sample in the job.
        prompt: its text.
        frames: uint8 [F, H, W, 3]; None without video.
        audio: None without audio.
    """

    index: int
    prompt: str
    frames: Tensor | None
    audio: "Audio | None"

    @classmethod
    def from_decoded(cls, index: int, prompt: str, decoded: "DecodedSample", section: QualitySection) -> Self:
        """Keeps what the scores need of a decoded sample."""
        frames = decoded.frames
        if frames is not None:
            frames = frames[evenly_spaced(len(frames), max(section.frames, _KEPT_FRAMES))]
        return cls(index, prompt, frames, decoded.audio)


def quality_problems(section: QualitySection) -> Iterator[str]:
    """Problems of folders that hold no model of the expected kind, in the words of the job's keys."""
    for key, path, kinds in (
        ("clip_path", section.clip_path, ("clip", "xclip")),
        ("clap_path", section.clap_path, ("clap",)),
    ):
        if path is None:
            continue
        try:
            found = _read_json(path, "config.json").get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            found = error
        if found not in kinds:
            yield (
                f"validation.quality.{key} is {path!r}: expected a folder whose config.json has model_type "
                f"{' or '.join(kinds)}, found {found}; correct the path."
            )


def score_clips(
    section: QualitySection, clips: Sequence[QualityClip], device: torch.device | str
) -> dict[int, dict[str, float]]:
    """Scores of each clip by name of the metric, by index; NaN for all clips of a score that failed.

    Args:
        section: the models; each is loaded for this and freed.
        clips: to score.
        device: of the models.
    """
    scores: dict[int, dict[str, float]] = {clip.index: {} for clip in clips}
    with_frames, with_audio = ([c for c in clips if c.frames is not None], [c for c in clips if c.audio is not None])
    parts: tuple[tuple[str, str | None, Sequence[QualityClip], Callable[..., list[float]]], ...] = (
        ("quality/text_video", section.clip_path, with_frames, _text_video),
        ("quality/text_audio", section.clap_path, with_audio, _text_audio),
    )
    for name, path, scored, score in parts:
        if path is None or not scored:
            continue
        try:
            values = score(section, path, scored, device)
        except Exception as error:  # whatever a model does, training continues
            logger.warning("%s of this validation is not known: %s: %s", name, type(error).__name__, error)
            values = [math.nan] * len(scored)
        for clip, value in zip(scored, values, strict=True):
            scores[clip.index][name] = value
    free_device_memory()
    return scores


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over the clips that have the stream; omitted if one of them has no finite score."""
    names = sorted({name for found in scores for name in found})
    means = {}
    for name in names:
        values = [found[name] for found in scores if name in found]
        # A mean over fewer clips than in other validations would rank the clips, not the model.
        if all(map(math.isfinite, values)):
            means[name] = sum(values) / len(values)
    return means


@torch.inference_mode()
def _text_video(
    section: QualitySection, path: str, clips: Sequence[QualityClip], device: torch.device | str
) -> list[float]:
    model = _load(path, device)
    is_clip = model.config.model_type == "clip"
    size = model.config.vision_config.image_size
    positions = model.config.text_config.max_position_embeddings
    values = []
    for clip in clips:
        assert clip.frames is not None
        count = min(section.frames, len(clip.frames)) if is_clip else model.config.vision_config.num_frames
        # With repetition, since X-CLIP takes no fewer frames.
        index = torch.linspace(0, len(clip.frames) - 1, count).round().long()
        pixels = _pixels(clip.frames[index], size, path).to(device)
        text = _tokens(path, clip.prompt, positions, device)
        if is_clip:
            found = model(pixel_values=pixels, **text)
            values.append((found.image_embeds @ found.text_embeds.T).mean().item())
        else:
            found = model(pixel_values=pixels[None], **text)
            values.append((found.logits_per_video / model.logit_scale.exp()).item())
    return values


@torch.inference_mode()
def _text_audio(
    section: QualitySection, path: str, clips: Sequence[QualityClip], device: torch.device | str
) -> list[float]:
    from transformers import ClapFeatureExtractor

    model = _load(path, device)
    extractor = ClapFeatureExtractor.from_pretrained(path, local_files_only=True)
    text_config = model.config.text_config
    # RoBERTa's positions begin after that of padding.
    positions = text_config.max_position_embeddings - text_config.pad_token_id - 1
    values = []
    for clip in clips:
        assert clip.audio is not None
        waveform = _resampled(clip.audio.waveform.mean(0), clip.audio.sample_rate, extractor.sampling_rate)
        text = _tokens(path, clip.prompt, positions, device)
        # In parts that the model takes whole: of a longer one the extractor would take a random piece.
        parts = waveform.split(extractor.nb_max_samples)
        total = 0.0
        for part in parts:
            features = extractor(part.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt").to(device)
            found = model(**features, **text)
            total += (found.audio_embeds @ found.text_embeds.T).item() * len(part)
        values.append(total / len(waveform))
    return values


def _load(path: str, device: torch.device | str) -> Any:
    # Imported here: a job without scores does not need it.
    from transformers import AutoModel
    from transformers.utils import logging as transformers_logging

    # Its bar for a file of a second would be drawn over the console's own.
    transformers_logging.disable_progress_bar()
    return AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32).to(device).eval()


def _tokens(path: str, prompt: str, positions: int, device: torch.device | str) -> dict[str, Tensor]:
    """Tokens of a prompt, cut to what the model was trained on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    length = min(tokenizer.model_max_length, positions)
    found = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt").to(device)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def _pixels(frames: Tensor, size: int, path: str) -> Tensor:
    """Converts frames uint8 [F, H, W, 3] to a model's input [F, 3, size, size]: the center, normalized."""
    file = "preprocessor_config.json"
    settings = _read_json(path, file) if (Path(path) / file).is_file() else {}
    mean, std = (torch.tensor(settings.get(k, v)) for k, v in (("image_mean", _MEAN), ("image_std", _STD)))
    height, width = frames.shape[1:3]
    scale = size / min(height, width)
    sides = max(size, round(height * scale)), max(size, round(width * scale))
    # Bicubic overshoots, hence the clamp.
    scaled = F.interpolate(frames.permute(0, 3, 1, 2).float(), sides, mode="bicubic", antialias=True).clamp(0, 255)
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    cropped = scaled[:, :, top : top + size, left : left + size] / 255
    return (cropped - mean[:, None, None]) / std[:, None, None]


def _resampled(waveform: Tensor, rate: int, wanted: int) -> Tensor:
    """Resamples [N] by cutting or padding its spectrum, which is exact for what both rates can represent."""
    if rate == wanted:
        return waveform
    count = round(len(waveform) * wanted / rate)
    # irfft pads or cuts the spectrum to count // 2 + 1 bins.
    return torch.fft.irfft(torch.fft.rfft(waveform), n=count) * (count / len(waveform))


def _read_json(path: str, name: str) -> dict[str, Any]:
    return json.loads((Path(path) / name).read_text(encoding="utf-8"))
