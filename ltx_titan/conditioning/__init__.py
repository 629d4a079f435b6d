from ltx_titan.conditioning.checks import check_conditions, reference_scale
from ltx_titan.conditioning.loss import Loss, stream_loss, token_weights, weigh
from ltx_titan.conditioning.references import reference_factors
from ltx_titan.conditioning.strategy import FlexibleStrategy, ModelInputs, absent_streams
from ltx_titan.conditioning.tokens import (
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
    "Coordinates",
    "FlexibleStrategy",
    "Grid",
    "Loss",
    "ModelInputs",
    "absent_streams",
    "audio_coordinates",
    "audio_steps",
    "check_conditions",
    "patchify_audio",
    "patchify_video",
    "reference_factors",
    "reference_scale",
    "stream_loss",
    "token_weights",
    "unpatchify_audio",
    "unpatchify_video",
    "video_coordinates",
    "video_grid",
    "weigh",
]
