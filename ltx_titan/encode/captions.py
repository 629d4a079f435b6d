"""Encoding of captions to the fields of `conditions/`.

Stored are either the text features of both streams before the text connectors, with the mask of the caption's tokens,
or the contexts after the connectors: then training does not load the connectors.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltx_titan.codecs import TextEncoder
from ltx_titan.codecs.text_encoder import MAX_TOKENS
from ltx_titan.conditioning import to_contexts
from ltx_titan.data.layout import Fields
from ltx_titan.model import FeatureExtractor, TextConnectors, TransformerConfig

# Phrases that language models put in front of a description, even if instructed not to.
_LEAD_INS = ("In the video,", "In this video,", "In this video clip,", "In the clip,", "Caption:")
_SUBJECTS = (
    *(f"{article} {noun}" for noun in ("video", "clip", "image", "picture") for article in ("This", "The")),
    "The animation",
)
_VERBS = ("shows", "depicts", "features", "captures", "highlights", "introduces", "presents")
_PREFIXES = (*_LEAD_INS, *(f"{subject} {verb}" for subject in _SUBJECTS for verb in _VERBS))


@dataclass(frozen=True)
class TextModels:
    """Models that encode captions.

    Attributes:
        encoder: the language model.
        extractor: the checkpoint's projection.
        connectors: the checkpoint's connectors, or None to store features.
    """

    encoder: TextEncoder
    extractor: FeatureExtractor
    connectors: TextConnectors | None = None


def with_trigger(caption: str, trigger: str | None) -> str:
    """Prepends a LoRA's trigger word to a caption, with one space."""
    word = (trigger or "").strip()
    return f"{word} {caption.strip()}".strip() if word else caption.strip()


def without_prefix(caption: str) -> str:
    """Removes one introductory phrase from the start of a caption, as in "The video shows a dog"."""
    caption = caption.strip()
    # The longest match: "In this video," must not leave half of "In this video clip," behind.
    prefix = max((prefix for prefix in _PREFIXES if caption.startswith(prefix)), key=len, default="")
    return caption.removeprefix(prefix).strip()


def tokens_cut(caption: str, models: TextModels) -> int:
    """Number of tokens of a caption beyond those that the text encoder reads."""
    encoder = models.encoder
    ids = encoder.tokenizer(caption.strip(), verbose=False)["input_ids"]
    has_bos = encoder.tokenizer.bos_token_id in (None, *ids[:1])
    return max(0, len(ids) + (0 if has_bos else 1) - encoder.max_tokens)


@torch.no_grad()
def encode_caption(caption: str, models: TextModels) -> Fields:
    """Encodes one caption: with all hidden states of Gemma at once, a single caption takes 400 MB.

    Returns:
        bfloat16 features [tokens, width] of both streams with `prompt_attention_mask` [tokens]; with connectors, the
        contexts without a mask.
    """
    hidden_states, mask = models.encoder.encode([caption])
    video, audio = models.extractor(hidden_states, mask)
    if models.connectors is None:
        return {
            "video_prompt_embeds": _to_stored(video),
            "audio_prompt_embeds": _to_stored(audio),
            "prompt_attention_mask": mask[0].to(torch.int64).cpu(),
        }
    features = {"video_prompt_embeds": video, "audio_prompt_embeds": audio, "prompt_attention_mask": mask}
    # The same function as in a training step, so stored contexts equal those computed in the step.
    contexts = to_contexts(features, models.connectors, video.dtype)
    return {
        "video_context": _to_stored(contexts["video_prompt_embeds"]),
        "audio_context": _to_stored(contexts["audio_prompt_embeds"]),
    }


def text_bytes(transformer: dict[str, Any]) -> int:
    """Size on disk of an encoded caption at most: 1,024 tokens of both streams in 16 bits.

    Args:
        transformer: the object `transformer` of the checkpoint's metadata.
    """
    config = TransformerConfig.from_metadata(transformer)
    widths = config.video.stored_context_dim + config.audio.stored_context_dim
    return MAX_TOKENS * widths * torch.bfloat16.itemsize


def _to_stored(tensor: Tensor) -> Tensor:
    return tensor[0].to(torch.bfloat16).cpu().contiguous()
