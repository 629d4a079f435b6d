from ltx_titan.conditioning.batch import Batch, latent_grid, to_contexts
from ltx_titan.conditioning.checks import check_conditions, check_text, check_trainable, reference_scale
from ltx_titan.conditioning.conditioned import (
    StreamTokens,
    conditioned_tokens,
    frames_mask,
    reference_factors,
    scale_reference,
)
from ltx_titan.conditioning.loss import Loss, ModelInputs, absent_streams, stream_loss, token_weights, weighted_loss
from ltx_titan.conditioning.strategy import FlexibleStrategy
from ltx_titan.conditioning.tokens import (
    Clip,
    Coordinates,
    Grid,
    audio_coordinates,
    audio_steps,
    patchify_audio,
    patchify_video,
    unpatchify_audio,
    unpatchify_video,
    video_coordinates,
    video_grid,
)

__all__ = [
    "Batch",
    "Clip",
    "Coordinates",
    "FlexibleStrategy",
    "Grid",
    "Loss",
    "ModelInputs",
    "StreamTokens",
    "absent_streams",
    "audio_coordinates",
    "audio_steps",
    "check_conditions",
    "check_text",
    "check_trainable",
    "conditioned_tokens",
    "frames_mask",
    "latent_grid",
    "patchify_audio",
    "patchify_video",
    "reference_factors",
    "reference_scale",
    "scale_reference",
    "stream_loss",
    "to_contexts",
    "token_weights",
    "unpatchify_audio",
    "unpatchify_video",
    "video_coordinates",
    "video_grid",
    "weighted_loss",
]
