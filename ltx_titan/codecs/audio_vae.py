"""Audio VAE: waveform to latents and latents to mel spectrogram, with diffusers' `AutoencoderKLLTX2Audio`.

Latents are normalized here. Their statistics are 128 numbers in the packed layout, in which channel c and frequency f
of a latent [8, T, 16] have index c * 16 + f: not one number per channel. Everything runs in float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from torch import Tensor

from ltx_titan.codecs.mel import MelSettings, log_mel, resample
from ltx_titan.weights import Component, load_module, read_metadata, read_tensors

# Mel frames per latent step; the class has it as a constant as well.
_MEL_FRAMES_PER_STEP = 4


def audio_vae_arguments(audio_vae: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `AutoencoderKLLTX2Audio` from the section `audio_vae` of the metadata.

    Raises:
        ValueError: the section lacks `model.params.ddconfig`.
    """
    parameters = audio_vae.get("model", {}).get("params", {})
    network = parameters.get("ddconfig")
    if not network:
        raise ValueError("metadata config: audio_vae.model.params.ddconfig is missing; the audio VAE is built from it")
    mel = mel_settings(audio_vae)
    return {
        "base_channels": network.get("ch", 128),
        "output_channels": network.get("out_ch", 2),
        "ch_mult": tuple(network.get("ch_mult", (1, 2, 4))),
        "num_res_blocks": network.get("num_res_blocks", 2),
        # The file's empty list means no attention, for which diffusers expects None.
        "attn_resolutions": tuple(network.get("attn_resolutions") or ()) or None,
        "in_channels": network.get("in_channels", 2),
        "resolution": network.get("resolution", 256),
        "latent_channels": network.get("z_channels", 8),
        "norm_type": network.get("norm_type", "pixel"),
        "causality_axis": network.get("causality_axis", "height"),
        "mid_block_add_attention": network.get("mid_block_add_attention", True),
        "double_z": network.get("double_z", True),
        "mel_bins": network.get("mel_bins", mel.bands),
        "sample_rate": mel.sample_rate,
        "mel_hop_length": mel.hop_length,
    }


def mel_settings(audio_vae: dict[str, Any]) -> MelSettings:
    """Parameters of the spectrogram from the section `audio_vae`; missing ones default to those of the releases."""
    preprocessing = audio_vae.get("preprocessing", {})
    stft, mel = preprocessing.get("stft", {}), preprocessing.get("mel", {})
    default = MelSettings()
    rate = audio_vae.get("model", {}).get("params", {}).get("sampling_rate", default.sample_rate)
    return MelSettings(
        sample_rate=rate,
        filter_length=stft.get("filter_length", default.filter_length),
        hop_length=stft.get("hop_length", default.hop_length),
        bands=mel.get("n_mel_channels", default.bands),
        low_hz=mel.get("mel_fmin", default.low_hz),
        high_hz=mel.get("mel_fmax", default.high_hz),
    )


@dataclass(frozen=True)
class AudioCodec:
    """A loaded audio VAE. Latents are normalized, as the transformer receives them and datasets store them.

    Attributes:
        vae: the diffusers model; encoder or decoder is None if it was not requested.
        mean: mean of raw latents at each (channel, frequency) [8, 1, 16], float32.
        std: standard deviation likewise.
        mel: parameters of the spectrogram.
    """

    vae: AutoencoderKLLTX2Audio
    mean: Tensor
    std: Tensor
    mel: MelSettings

    @property
    def steps_per_second(self) -> float:
        """Latent steps per second of audio (25)."""
        return self.mel.sample_rate / self.mel.hop_length / _MEL_FRAMES_PER_STEP

    def steps_for(self, duration_s: float) -> int:
        """Latent steps that sampling generates for an audio of this duration: round(25 * duration), at least 1."""
        # `round`, as the released pipelines do; `ceil` or `floor` could differ from them by a step.
        return max(1, round(duration_s * self.steps_per_second))

    @torch.no_grad()
    def encode(self, waveform: Tensor, sample_rate: int) -> Tensor:
        """Encodes a waveform [B, 1 or 2, N] to normalized latents [B, 8, T, 16], float32.

        T = ceil(mel / 4) of mel = 1 + floor(N' / 160) frames at 16 kHz, often one more than `steps_for`.

        Raises:
            ValueError: more than two channels, or audio too short for one frame.
        """
        channels = waveform.shape[1]
        if channels not in (1, 2):
            raise ValueError(f"audio has {channels} channels, expected 1 or 2; downmix it to stereo first")
        # The VAE has two input channels: mono is duplicated, stereo unchanged.
        waveform = waveform.to(self.vae.device, torch.float32).expand(-1, 2, -1)
        spectrogram = log_mel(resample(waveform, sample_rate, self.mel.sample_rate), self.mel)
        # The posterior's mean: datasets must be reproducible.
        raw = self.vae.encode(spectrogram).latent_dist.mode()
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decodes normalized latents [B, 8, T, 16] to a log-mel spectrogram [B, 2, 4 T - 3, 64], float32."""
        raw = latents.to(self.vae.device, torch.float32) * self.std + self.mean
        return self.vae.decode(raw).sample


def load_audio_codec(
    path: str | Path,
    device: str | torch.device = "cpu",
    part: Literal["both", "encoder", "decoder"] = "both",
) -> AudioCodec:
    """Loads the audio VAE of a single-file checkpoint or of a split pack's audio file.

    Args:
        path: the safetensors file.
        device: destination; the VAE runs in float32.
        part: preprocessing needs the encoder only, sampling the decoder only; the other half is not read.

    Raises:
        ValueError: the file has no audio VAE, or its weights do not match its metadata.
    """
    metadata = read_metadata(path)
    section = metadata.section("audio_vae", "audio VAE")
    prefix = metadata.prefix("audio_vae.")
    arguments = audio_vae_arguments(section)
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Audio(**arguments)
    # Every level but the first halves the mel axis.
    bins = arguments["mel_bins"] // 2 ** (len(arguments["ch_mult"]) - 1)
    packed_shape = (arguments["latent_channels"] * bins,)
    keys = {name: f"{prefix}per_channel_statistics.{name}-of-means" for name in ("mean", "std")}
    component = Component.from_keys("statistics of the audio VAE", keys)
    statistics = read_tensors(
        metadata, dict.fromkeys(keys, packed_shape), component, device=device, dtype=torch.float32
    )
    # The class sizes these buffers by its base width, which equals 128 in the published models only.
    vae.latents_mean, vae.latents_std = statistics["mean"], statistics["std"]
    for half in ("encoder", "decoder"):
        if part not in ("both", half):
            # Before the weights are read, so that the unused half costs neither time nor memory.
            setattr(vae, half, None)
            continue
        module = getattr(vae, half)
        keys = {name: f"{prefix}{half}.{name}" for name in module.state_dict()}
        component = Component.from_keys(f"{half} of the audio VAE", keys, prefixes=(f"{prefix}{half}.",))
        load_module(module, metadata, component, device=device, dtype=torch.float32)
    vae.requires_grad_(False).eval()
    mean, std = (packed_statistics(statistics[key], arguments["latent_channels"]) for key in ("mean", "std"))
    return AudioCodec(vae, mean, std, mel_settings(section))


def packed_statistics(packed: Tensor, channels: int) -> Tensor:
    """Unpacks statistics [channels * bins], index c * bins + f, to [channels, 1, bins], for latents [c, T, f]."""
    return packed.unflatten(0, (channels, -1))[:, None, :]
