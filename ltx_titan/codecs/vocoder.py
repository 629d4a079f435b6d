"""Vocoder: mel spectrogram to waveform, with diffusers' `LTX2Vocoder` (19B) and `LTX2VocoderWithBWE` (2.3 and later).

The second one generates audio at 16 kHz and extends its bandwidth to 48 kHz. It runs in float32 whatever dtype its
weights are stored in, since bfloat16 is audible; and the 16 kHz stage is clamped to [-1, 1] before the extension, as it
was in training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor

from ltx_titan.weights import Component, load_module, read_metadata

_RENAMED = {"upsamplers": "ups", "resnets": "resblocks", "conv_in": "conv_pre", "conv_out": "conv_post"}
_RENAMED_BANDWIDTH_EXTENSION = _RENAMED | {"act_out": "act_post"}


def vocoder_arguments(vocoder: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the diffusers class from the section `vocoder`; see `has_bandwidth_extension`."""
    if not has_bandwidth_extension(vocoder):
        return {
            **_generator_arguments(vocoder, hidden=1024, kernels=(16, 15, 8, 4, 4), factors=(6, 5, 2, 2, 2)),
            "act_fn": "leaky_relu",
            "antialias": False,
            "final_act_fn": "tanh" if vocoder.get("use_tanh_at_final", True) else "clamp",
            "final_bias": vocoder.get("use_bias_at_final", True),
            "output_sampling_rate": vocoder.get("output_sampling_rate", 24000),
        }
    first, second = vocoder["vocoder"], vocoder["bwe"]
    arguments = {
        **_generator_arguments(first, hidden=1536, kernels=(11, 4, 4, 4, 4, 4), factors=(5, 2, 2, 2, 2, 2)),
        "act_fn": "snakebeta",
        "antialias": True,
        # Not None, as diffusers' converter sets it: the 16 kHz stage was clamped in training.
        "final_act_fn": "tanh" if first.get("use_tanh_at_final", False) else "clamp",
        "final_bias": first.get("use_bias_at_final", False),
    }
    extension = {
        **_generator_arguments(second, hidden=512, kernels=(12, 11, 4, 4, 4), factors=(6, 5, 2, 2, 2)),
        "act_fn": "snakebeta",
        "antialias": True,
        # A residual, added to the resampled audio; the sum is clamped.
        "final_act_fn": None,
        "final_bias": second.get("use_bias_at_final", False),
    }
    return {
        **arguments,
        **{f"bwe_{key}": value for key, value in extension.items()},
        "filter_length": second.get("n_fft", 512),
        "hop_length": second.get("hop_length", 80),
        "window_length": second.get("win_size", 512),
        "num_mel_channels": second.get("num_mels", 64),
        "input_sampling_rate": second.get("input_sampling_rate", 16000),
        "output_sampling_rate": second.get("output_sampling_rate", 48000),
    }


def has_bandwidth_extension(vocoder: dict[str, Any]) -> bool:
    """Whether the section `vocoder` describes the vocoder of 2.3 and later."""
    return "bwe" in vocoder


def _generator_arguments(
    generator: dict[str, Any], hidden: int, kernels: tuple[int, ...], factors: tuple[int, ...]
) -> dict[str, Any]:
    dilations = generator.get("resblock_dilation_sizes", [[1, 3, 5]] * 3)
    return {
        "hidden_channels": generator.get("upsample_initial_channel", hidden),
        "upsample_kernel_sizes": list(generator.get("upsample_kernel_sizes", kernels)),
        "upsample_factors": list(generator.get("upsample_rates", factors)),
        "resnet_kernel_sizes": list(generator.get("resblock_kernel_sizes", (3, 7, 11))),
        "resnet_dilations": [list(dilation) for dilation in dilations],
    }


def stored_vocoder_name(name: str, bandwidth_extension: bool) -> str:
    """Name in the file, after the first `vocoder.`, of the parameter that diffusers calls `name`."""
    renamed = _RENAMED_BANDWIDTH_EXTENSION if bandwidth_extension else _RENAMED
    stored = ".".join(renamed.get(part, part) for part in name.split("."))
    return stored.replace("downsample.filter", "downsample.lowpass.filter")


def build_vocoder(vocoder: dict[str, Any]) -> LTX2Vocoder | LTX2VocoderWithBWE:
    """Builds the vocoder that a section `vocoder` describes, with random weights and the filters that files lack.

    Not on the meta device, where each of the many filters is computed by Python decompositions: six times as slow for
    a small vocoder, and no faster for a released one.
    """
    arguments = vocoder_arguments(vocoder)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if not has_bandwidth_extension(vocoder):
            return LTX2Vocoder(**arguments)
        return LTX2VocoderWithBWE(**arguments)


@dataclass(frozen=True)
class Vocoder:
    """A loaded vocoder.

    Attributes:
        model: the diffusers model, float32.
        sample_rate: of the generated audio, Hz.
    """

    model: LTX2Vocoder | LTX2VocoderWithBWE
    sample_rate: int

    @torch.no_grad()
    def __call__(self, mel: Tensor) -> Tensor:
        """Converts a log-mel spectrogram [B, 2, T, 64] into stereo audio [B, 2, N] in [-1, 1], float32."""
        return self.model(mel.to(self.model.device, torch.float32))


def load_vocoder(path: str | Path, device: str | torch.device = "cpu") -> Vocoder:
    """Loads the vocoder of a single-file checkpoint or of a split pack's audio file.

    Raises:
        ValueError: the file has no vocoder, or its weights do not match its metadata.
    """
    metadata = read_metadata(path)
    section = metadata.section("vocoder", "vocoder")
    model = build_vocoder(section)
    extended = has_bandwidth_extension(section)
    stored = {name: stored_vocoder_name(name, extended) for name in model.state_dict()}
    # Exactly one `vocoder.` is the component's prefix; names of 2.3 continue with a second one. A split pack's file may
    # lack the first, so the prefix cannot be recognized by `startswith`.
    prefix = "vocoder." if any(f"vocoder.{name}" in metadata.tensors for name in stored.values()) else ""
    prefixes = (prefix,) if prefix else tuple({name.partition(".")[0] + "." for name in stored.values()})
    keys = {name: prefix + key for name, key in stored.items()}
    component = Component.from_keys("vocoder", keys, prefixes)
    load_module(model, metadata, component, device=device, dtype=torch.float32)
    model = model.requires_grad_(False).eval().to(device)
    return Vocoder(model, model.config.output_sampling_rate)
