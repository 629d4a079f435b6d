"""Turns the text features that a data set holds into the contexts that the transformer attends to.

Features are stored as they leave the feature extractor, with a mask of the prompt's tokens; the connectors run in every
step, frozen and without gradients. A data set may also hold finished contexts, which have no mask; then the connectors
need not be in memory at all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ltx_titan.model import TextConnectors


@torch.no_grad()
def to_contexts(
    conditions: Mapping[str, Tensor], connectors: TextConnectors | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Contexts of a batch.

    Args:
        conditions: `video_prompt_embeds` [B, T, D_video], optionally `audio_prompt_embeds` [B, T, D_audio] (the video's
            serve both where it is missing); features come with `prompt_attention_mask` [B, T], 1 marks a prompt token.
        connectors: None where all data holds finished contexts.
        dtype: dtype to run the connectors in.

    Returns:
        The same fields with contexts for features. The mask is dropped where it masks nothing, as after connectors with
        registers: attention without a mask is a third faster.
    """
    mask = conditions.get("prompt_attention_mask")
    if mask is None:
        return dict(conditions)
    assert connectors is not None, "the batch holds text features, but no connectors were loaded"
    video = conditions["video_prompt_embeds"].to(dtype)
    audio = conditions["audio_prompt_embeds"].to(dtype) if "audio_prompt_embeds" in conditions else video
    video, audio, mask = connectors(video, audio, mask)
    contexts = {"video_prompt_embeds": video, "audio_prompt_embeds": audio}
    return contexts if connectors.fills_padding else {**contexts, "prompt_attention_mask": mask}
