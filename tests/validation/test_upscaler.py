"""Two-stage sampling: the upscaler is diffusers' on raw latents, and its result is what the second stage refines."""

import json

import pytest
import torch
from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel
from safetensors.torch import save_file

from ltx_titan.codecs import load_upscaler, load_video_codec, upscaler_scale
from ltx_titan.conditioning import patchify_video
from ltx_titan.config import ValidationSection
from ltx_titan.validation import sample_all
from ltx_titan.validation.check import NO_GUIDANCE, check_validation
from ltx_titan.validation.engine import prepare_validation
from ltx_titan.validation.sampling import count_steps
from tests.validation.conftest import CLIP

TINY = {"mid_channels": 32, "num_blocks_per_stage": 1}


def write_upscaler(path, **config):
    """A tiny upscaler with random weights as an official file, and the diffusers model of the same weights."""
    torch.manual_seed(0)
    scale = {"rational_spatial_scale": config["spatial_scale"]} if "spatial_scale" in config else {}
    rational = config.get("rational_resampler", False)
    model = LTX2LatentUpsamplerModel(
        **TINY, **scale, use_rational_resampler=rational, temporal_upsample=config.get("temporal_upsample", False)
    ).eval()
    save_file(model.state_dict(), path, metadata={"config": json.dumps({**TINY, **config})})
    return model


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory):
    path = tmp_path_factory.mktemp("upscaler") / "spatial.safetensors"
    write_upscaler(path)
    return path


@pytest.mark.parametrize(
    "config", [{}, {"spatial_scale": 1.5, "rational_resampler": True}], ids=["twice", "one and a half"]
)
def test_latents_are_upscaled_as_diffusers_upscales_raw_ones(tmp_path, pack, config):
    model = write_upscaler(tmp_path / "file.safetensors", **config)
    upsample = load_upscaler(tmp_path / "file.safetensors", pack.path, "cpu", torch.float32)
    codec = load_video_codec(pack.path, "cpu", torch.float32, part="decoder")
    latents = torch.randn(1, 128, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    found = upsample(latents)
    scale = upscaler_scale(tmp_path / "file.safetensors")
    assert found.shape == (1, 128, 2, 2 * scale, 4 * scale)
    with torch.no_grad():
        raw = model(latents * codec.std + codec.mean)
    torch.testing.assert_close(found * codec.std + codec.mean, raw, rtol=1e-4, atol=1e-4)


def test_other_files_are_refused_by_name(tmp_path, pack):
    write_upscaler(tmp_path / "temporal.safetensors", temporal_upsample=True)
    for path, words in ((pack.path, "expected a latent upscaler"), (tmp_path / "temporal.safetensors", "a temporal")):
        with pytest.raises(ValueError, match=words):
            upscaler_scale(path)


def section(upscaler, **more):
    sample = {"prompt": "a rabbit", "conditions": [{"type": "first_frame", "image_or_video": str(CLIP)}]}
    table = {"samples": [sample], "video_dims": (128, 64, 9), "inference_steps": 2, **NO_GUIDANCE}
    return ValidationSection.model_validate({**table, "upscaler": str(upscaler), **more})


def test_a_size_that_the_first_stage_cannot_have_is_refused(upscaler):
    sizes = {"has_video": True, "has_audio": True, "num_blocks": 2, "scale_factors": (8, 32, 32)}
    with pytest.raises(ValueError, match=r"samples\[0\]\.video_dims: 96x64 pixels.*multiples of 64x64"):
        check_validation(section(upscaler, video_dims=(96, 64, 9)), **sizes)
    with pytest.raises(ValueError, match=r"validation\.upscaler"):
        check_validation(section(CLIP), **sizes)


@pytest.fixture(scope="module")
def validation(upscaler, pack, tmp_path_factory):
    width = pack.config["transformer"]["cross_attention_dim"], pack.config["transformer"]["audio_cross_attention_dim"]
    generator = torch.Generator().manual_seed(2)
    context = tuple(torch.randn(1, 4, size, generator=generator) for size in width)
    return prepare_validation(
        section(upscaler),
        checkpoint_path=pack.path,
        config=pack.config,
        modalities="av",
        device="cpu",
        cache_folder=tmp_path_factory.mktemp("contexts"),
        contexts={"a rabbit": context},
    )


def test_the_second_stage_refines_the_upscaled_first(validation, pack):
    steps = []
    found = validation.sample(pack.model, steps.append)[0].video
    assert len(steps) == count_steps(validation.section, validation.samples) == 5
    # 2 latent frames of 1 x 2, then of 2 x 4.
    assert [report.video.shape[1] for report in steps] == [4, 4, 16, 16, 16]
    assert [report.sigma for report in steps[2:]] == pytest.approx([0.909375, 0.725, 0.421875])
    assert found.shape == (1, 128, 2, 2, 4)
    prepared = validation.samples[0]
    mask = prepared.video.conditioned
    assert torch.equal(patchify_video(found)[mask], prepared.video.target.tokens[mask])

    def sample(upsample):
        (latents,) = sample_all(pack.model, validation.samples, validation.section, "cpu", upsample=upsample).values()
        return latents.video

    def upsample(value):
        return lambda latents: torch.full((1, 128, 2, 2, 4), value)

    # At the same noise, a result differs only by what was upscaled.
    assert not torch.equal(sample(upsample(0.0)), sample(upsample(1.0)))
