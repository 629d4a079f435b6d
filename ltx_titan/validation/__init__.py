from ltx_titan.validation.check import check_validation, generated_streams
from ltx_titan.validation.held_out import FixedSigma, as_batch, held_out_losses
from ltx_titan.validation.offload import offloaded
from ltx_titan.validation.sampling import (
    Contexts,
    PreparedSample,
    SampledLatents,
    SampleGroups,
    evaluating,
    guidance_of,
    placeholder_inputs,
    reshard,
    sample_all,
    schedule_of,
)
from ltx_titan.validation.start import (
    audio_start,
    begin,
    condition_frames,
    condition_where,
    freeze,
    target_latents,
    video_start,
    with_audio_reference,
    with_video_reference,
)

__all__ = [
    "Contexts",
    "FixedSigma",
    "PreparedSample",
    "SampleGroups",
    "SampledLatents",
    "as_batch",
    "audio_start",
    "begin",
    "check_validation",
    "condition_frames",
    "condition_where",
    "evaluating",
    "freeze",
    "generated_streams",
    "guidance_of",
    "held_out_losses",
    "offloaded",
    "placeholder_inputs",
    "reshard",
    "sample_all",
    "schedule_of",
    "target_latents",
    "video_start",
    "with_audio_reference",
    "with_video_reference",
]
