"""Codecs loaded from a file, compared with their published equations on the same tensors."""

import copy
import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from safetensors.torch import load_file, save_file

from ltx_titan.codecs import load_audio_codec, load_video_codec, load_vocoder
from ltx_titan.codecs.mel import log_mel, resample
from ltx_titan.codecs.video_vae import video_vae_layout
from ltx_titan.codecs.vocoder import build_vocoder, stored_vocoder_name
from ltx_titan.nano.pack import audio_vae_tensors
from ltx_titan.nano.pack_config import CONFIG
from tests.codecs.equations import AudioVae, VideoVae, Vocoder

# Sums in another order, through a dozen layers of float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def tensors(nano):
    return {name: tensor.float() for name, tensor in load_file(nano).items()}


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def clip(generator, frames=9, height=64, width=96):
    return torch.rand(1, 3, frames, height, width, generator=generator) * 2 - 1


def test_video_vae_of_23(nano, tensors, generator):
    expected = VideoVae(part(tensors, "vae."), CONFIG["vae"], "zeros")
    codec = load_video_codec(nano, dtype=torch.float32)
    pixels = clip(generator)
    latents = codec.encode(pixels)
    torch.testing.assert_close(latents, expected.encode(pixels), **CLOSE)
    torch.testing.assert_close(codec.decode(latents), expected.decode(latents), **CLOSE)


def test_video_vae_of_19b(tmp_path, generator):
    def res(layers):
        return ["res_x", {"num_layers": layers}]

    def step(kind, multiplier, **options):
        return [kind, {"multiplier": multiplier, **options}]

    residual = step("compress_all", 2, residual=True)
    section = {
        "encoder_blocks": [
            *(res(1), step("compress_space_res", 1), res(2), step("compress_time_res", 2), res(1)),
            *(step("compress_all_res", 2), res(1), step("compress_all_res", 1), res(1)),
        ],
        "decoder_blocks": [res(1), residual, res(2), residual, res(1), residual, res(1)],
        # Narrow: 128 channels at full size would take seconds.
        "decoder_base_channels": 16,
    }
    layout = video_vae_layout(section)
    vae = AutoencoderKLLTX2Video(**layout.arguments)
    stored = {layout.stored_name(name): t for name, t in vae.state_dict().items() if not name.startswith("latents_")}
    stored |= {
        f"per_channel_statistics.{key}-of-means": torch.rand(128, generator=generator) + 0.5 for key in ("mean", "std")
    }
    save_file({f"vae.{name}": tensor.contiguous() for name, tensor in stored.items()}, tmp_path / "vae.safetensors",
              {"config": json.dumps({"vae": section})})  # fmt: skip
    codec = load_video_codec(tmp_path / "vae.safetensors", dtype=torch.float32)
    expected = VideoVae(stored, section, "reflect")
    pixels = clip(generator, height=64, width=64)
    with torch.no_grad():
        latents = codec.encode(pixels)
        torch.testing.assert_close(latents, expected.encode(pixels), **CLOSE)
        torch.testing.assert_close(codec.decode(latents), expected.decode(latents), **CLOSE)


def test_audio_vae(tmp_path, generator):
    # Narrow, with the residual blocks and changes of width that the nano pack, as wide as the released one, lacks.
    section = copy.deepcopy(CONFIG["audio_vae"])
    section["model"]["params"]["ddconfig"] |= {"ch": 16, "ch_mult": [1, 2, 4], "num_res_blocks": 1}
    stored = audio_vae_tensors(0, section)
    save_file(stored, tmp_path / "vae.safetensors", {"config": json.dumps({"audio_vae": section})})
    stored = {name: tensor.float() for name, tensor in stored.items()}
    expected = AudioVae(part(stored, "audio_vae."), levels=3, blocks=1)
    codec = load_audio_codec(tmp_path / "vae.safetensors")
    audio = torch.randn(1, 2, 12000, generator=generator) * 0.1
    latents = codec.encode(audio, 24000)
    spectrogram = log_mel(resample(audio, 24000, 16000), codec.mel)
    torch.testing.assert_close(latents, expected.encode(spectrogram), **CLOSE)
    torch.testing.assert_close(codec.decode(latents), expected.decode(latents), **CLOSE)


def test_vocoder_with_bandwidth_extension(nano, tensors, generator):
    mel = torch.randn(1, 2, 11, 64, generator=generator)
    expected = Vocoder(part(tensors, "vocoder."), CONFIG["vocoder"])(mel)
    torch.testing.assert_close(load_vocoder(nano)(mel), expected, **CLOSE)


def test_vocoder_of_19b(tmp_path, generator):
    section = {
        "upsample_initial_channel": 32,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "resblock_kernel_sizes": [3, 7, 11],
        "resblock_dilation_sizes": [[1, 3, 5]] * 3,
    }
    stored = {
        stored_vocoder_name(name, False): torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in build_vocoder(section).state_dict().items()
    }
    path = tmp_path / "vocoder.safetensors"
    save_file({f"vocoder.{name}": t for name, t in stored.items()}, path, {"config": json.dumps({"vocoder": section})})
    vocoder = load_vocoder(path)
    mel = torch.randn(1, 2, 5, 64, generator=generator)
    audio = vocoder(mel)
    assert vocoder.sample_rate == 24000
    assert audio.shape == (1, 2, 5 * 240)
    torch.testing.assert_close(audio, Vocoder(stored, section)(mel), **CLOSE)
