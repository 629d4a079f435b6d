"""The golden sampling run as inputs of `sample`, for the single-process and the multi-process test."""

from ltx_titan.diffusion import Guidance, SampledStream
from tests.golden_cases import Case


def sampled_stream(case: Case, name: str) -> SampledStream:
    """Start of one stream of the case, with its guidance."""
    inputs, weights = case.under(f"input.{name}."), case.entry["guidance"][name]
    return SampledStream(
        latent=inputs["noisy_latent"],
        clean=inputs["clean_latent"],
        denoise_mask=inputs["denoise_mask"],
        positions=inputs["positions"],
        context=inputs["context"],
        negative_context=inputs["negative_context"],
        guidance=Guidance(
            cfg_scale=weights["cfg_scale"],
            stg_scale=weights["stg_scale"],
            stg_blocks=tuple(weights["stg_blocks"]),
            modality_scale=weights["modality_scale"],
            rescale=weights["rescale_scale"],
        ),
    )
