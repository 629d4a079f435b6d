"""Stage: captions to `conditions/`.

Stored are the features of both streams before the text connectors, with the mask of the caption's tokens, or, if asked
for, the finished contexts after them: then training needs no connectors in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ltx_titan.codecs import TextEncoder
from ltx_titan.commands.process.stage import Output, Plan, Stage
from ltx_titan.conditioning import to_contexts
from ltx_titan.data.layout import Value
from ltx_titan.media.tables import Sample
from ltx_titan.model import FeatureExtractor, TextConnectors

# What language models put in front of a description, whatever they were asked for.
_LEAD_INS = ("In the video,", "In this video,", "In this video clip,", "In the clip,", "Caption:")
_SUBJECTS = (
    *(f"{article} {noun}" for noun in ("video", "clip", "image", "picture") for article in ("This", "The")),
    "The animation",
)
_VERBS = ("shows", "depicts", "features", "captures", "highlights", "introduces", "presents")
_PREFIXES = (*_LEAD_INS, *(f"{subject} {verb}" for subject in _SUBJECTS for verb in _VERBS))


@dataclass(frozen=True)
class TextModels:
    """What turns a caption into what is stored.

    Attributes:
        encoder: the language model.
        extractor: the checkpoint's projection.
        connectors: the checkpoint's connectors, or None to store features.
    """

    encoder: TextEncoder
    extractor: FeatureExtractor
    connectors: TextConnectors | None


def caption_stage(
    load_models: Callable[[], TextModels], size_bytes: int, trigger: str | None = None, remove_prefixes: bool = False
) -> Stage:
    """The stage that encodes captions, one at a time: the states of all of Gemma's layers are 400 MB for one already.

    Args:
        load_models: loads the models.
        size_bytes: of one file.
        trigger: word put in front of every caption, with one space.
        remove_prefixes: whether phrases such as "The video shows" are taken off the front of captions.
    """

    def read(sample: Sample) -> str:
        if sample.caption is None:
            raise ValueError("has no caption")
        caption = without_prefix(sample.caption) if remove_prefixes else sample.caption
        return with_trigger(caption, trigger)

    def plan(sample: Sample) -> Plan:
        return Plan("empty caption" if not read(sample) else "caption", size_bytes)

    def load() -> Callable[[Sample, str], Output]:
        models = load_models()
        return lambda sample, caption: {
            "conditions": text_fields(caption, models.encoder, models.extractor, models.connectors)
        }

    def subject(sample: Sample) -> str:
        return f"row {sample.row} ({sample.media})"

    return Stage("captions", ("conditions",), subject, plan, read, load)


def with_trigger(caption: str, trigger: str | None) -> str:
    """Put a LoRA's trigger word in front of a caption."""
    word = (trigger or "").strip()
    return f"{word} {caption.strip()}".strip() if word else caption.strip()


def without_prefix(caption: str) -> str:
    """Take one phrase that says that this is a caption off its front, as in "The video shows a dog"."""
    caption = caption.strip()
    # The longest that fits: "In this video," must not leave half of "In this video clip," behind.
    prefix = max((prefix for prefix in _PREFIXES if caption.startswith(prefix)), key=len, default="")
    return caption.removeprefix(prefix).strip()


@torch.no_grad()
def text_fields(
    caption: str, text_encoder: TextEncoder, extractor: FeatureExtractor, connectors: TextConnectors | None = None
) -> dict[str, Value]:
    """Fields of a text sample, bfloat16: features with `prompt_attention_mask`; with connectors, contexts without."""
    hidden_states, mask = text_encoder.encode([caption])
    video, audio = extractor(hidden_states, mask)
    if connectors is None:
        return {
            "video_prompt_embeds": _stored(video),
            "audio_prompt_embeds": _stored(audio),
            "prompt_attention_mask": mask[0].to(torch.int64).cpu(),
        }
    features = {"video_prompt_embeds": video, "audio_prompt_embeds": audio, "prompt_attention_mask": mask}
    contexts = to_contexts(features, connectors, video.dtype)
    return {
        "video_context": _stored(contexts["video_prompt_embeds"]),
        "audio_context": _stored(contexts["audio_prompt_embeds"]),
    }


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0].to(torch.bfloat16).cpu().contiguous()
