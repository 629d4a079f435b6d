import math

import pytest
import torch

from ltx_titan.codecs import load_vocoder
from ltx_titan.codecs.vocoder import build_vocoder, has_bandwidth_extension, stored_vocoder_name, vocoder_arguments
from tests.codecs.full_size import VOCODER_19B, VOCODER_23


@pytest.mark.parametrize(
    ("section", "parameters", "tensors"),
    [(VOCODER_23, 128_537_448, 1227), (VOCODER_19B, 55_592_802, 194)],
    ids=["2.3", "19B"],
)
def test_published_sizes(section, parameters, tensors):
    model = build_vocoder(section)
    extended = has_bandwidth_extension(section)
    names = {stored_vocoder_name(name, extended) for name in model.state_dict()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(names) == tensors


def test_names_of_the_published_files():
    new = {stored_vocoder_name(name, True) for name in build_vocoder(VOCODER_23).state_dict()}
    assert new >= {
        "vocoder.conv_pre.weight",
        "vocoder.ups.5.bias",
        "vocoder.resblocks.0.acts1.2.upsample.filter",
        "vocoder.resblocks.0.acts1.2.downsample.lowpass.filter",
        "vocoder.resblocks.17.acts2.0.act.alpha",
        "vocoder.act_post.downsample.lowpass.filter",
        "bwe_generator.conv_post.weight",
        "mel_stft.stft_fn.forward_basis",
        "mel_stft.mel_basis",
    }
    old = {stored_vocoder_name(name, False) for name in build_vocoder(VOCODER_19B).state_dict()}
    assert old >= {"conv_pre.weight", "ups.4.weight", "resblocks.14.convs2.2.bias", "conv_post.bias"}


def test_first_stage_is_clamped_and_second_is_not():
    arguments = vocoder_arguments(VOCODER_23)
    assert arguments["final_act_fn"] == "clamp"
    assert arguments["bwe_final_act_fn"] is None
    assert vocoder_arguments(VOCODER_19B)["final_act_fn"] == "tanh"


def test_audio_of_48_khz_stereo(nano, generator):
    vocoder = load_vocoder(nano)
    audio = vocoder(torch.randn(1, 2, 10, 64, generator=generator))
    assert vocoder.sample_rate == 48000
    # 10 ms per mel frame.
    assert audio.shape == (1, 2, 10 * 480)
    assert audio.dtype == torch.float32
    assert 0.01 < audio.std() < 0.5


def test_the_resampler_has_its_filter_which_files_do_not_store(nano):
    taps = load_vocoder(nano).model.resampler.filter.flatten()
    time = [(i / 3 - 7) * 0.99 for i in range(43)]
    expected = [
        (math.sin(math.pi * t) / (math.pi * t) if t else 1.0)
        * math.cos(math.pi * max(-6, min(6, t)) / 12) ** 2
        * 0.99
        / 3
        for t in time
    ]
    torch.testing.assert_close(taps, torch.tensor(expected), atol=1e-6, rtol=0)
