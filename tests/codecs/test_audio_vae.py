import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2_audio import AutoencoderKLLTX2Audio
from safetensors.torch import load_file

from ltx_titan.codecs import load_audio_codec
from ltx_titan.codecs.audio_vae import audio_vae_arguments, packed_statistics
from ltx_titan.codecs.mel import log_mel, resample
from tests.codecs.full_size import AUDIO_VAE


def test_published_size():
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Audio(**audio_vae_arguments(AUDIO_VAE))
    assert len(vae.state_dict()) == 102
    assert sum(p.numel() for p in vae.encoder.parameters()) == 21_333_008
    assert sum(p.numel() for p in vae.decoder.parameters()) == 31_915_138


def test_rates_and_shapes(nano, generator):
    codec = load_audio_codec(nano)
    one_second = torch.randn(1, 2, 48000, generator=generator) * 0.1
    latents = codec.encode(one_second, 48000)
    # mel = 1 + 16000 // 160 = 101 frames, T = ceil(101 / 4); sampling generates 25 steps per second.
    assert latents.shape == (1, 8, 26, 16)
    assert codec.steps_for(1.0) == 25
    assert codec.steps_for(49 / 24) == 51
    assert codec.decode(latents).shape == (1, 2, 4 * 26 - 3, 64)


def test_mono_is_doubled(nano, generator):
    codec = load_audio_codec(nano, part="encoder")
    mono = torch.randn(1, 1, 16000, generator=generator) * 0.1
    assert torch.equal(codec.encode(mono, 16000), codec.encode(mono.expand(1, 2, -1), 16000))
    with pytest.raises(ValueError, match="6 channels"):
        codec.encode(torch.zeros(1, 6, 16000), 16000)


def test_statistics_use_the_packed_layout(nano, generator):
    unpacked = packed_statistics(torch.arange(128.0), channels=8)
    assert unpacked.shape == (8, 1, 16)
    assert unpacked[3, 0, 5] == 3 * 16 + 5

    codec = load_audio_codec(nano, part="encoder")
    stored = load_file(nano)
    mean = stored["audio_vae.per_channel_statistics.mean-of-means"].float()
    std = stored["audio_vae.per_channel_statistics.std-of-means"].float()
    audio = torch.randn(1, 2, 24000, generator=generator) * 0.1
    with torch.no_grad():
        raw = codec.vae.encode(log_mel(resample(audio, 24000, 16000), codec.mel)).latent_dist.mode()
    tokens = raw.permute(0, 2, 1, 3).flatten(2)
    expected = ((tokens - mean) / std).unflatten(2, (8, 16)).permute(0, 2, 1, 3)
    torch.testing.assert_close(codec.encode(audio, 24000), expected)
