import json

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_ltx2 import AutoencoderKLLTX2Video
from safetensors.torch import load_file

from ltx_titan.codecs import load_video_codec
from ltx_titan.codecs.video_vae import video_vae_layout
from ltx_titan.nano.pack_config import CONFIG
from ltx_titan.weights import save_safetensors, scale_factors
from tests.codecs.full_size import VIDEO_VAE_19B, VIDEO_VAE_23


def stored_names(layout):
    with torch.device("meta"):
        vae = AutoencoderKLLTX2Video(**layout.arguments)
    names = {name: layout.stored_name(name) for name in vae.state_dict() if not name.startswith("latents_")}
    return vae, names


@pytest.mark.parametrize(
    ("section", "encoder_size", "decoder_size", "tensors"),
    [(VIDEO_VAE_23, 318_936_897, 407_169_072, 170), (VIDEO_VAE_19B, 694_098_881, 528_380_720, 184)],
    ids=["2.3", "19B"],
)
def test_published_sizes(section, encoder_size, decoder_size, tensors):
    vae, names = stored_names(video_vae_layout(section))
    assert sum(p.numel() for p in vae.encoder.parameters()) == encoder_size
    assert sum(p.numel() for p in vae.decoder.parameters()) == decoder_size
    statistics = 2
    assert len(set(names.values())) + statistics == tensors


def test_names_of_the_published_23_file():
    names = set(stored_names(video_vae_layout(VIDEO_VAE_23))[1].values())
    assert names >= {
        "encoder.conv_in.conv.weight",
        "encoder.down_blocks.0.res_blocks.3.conv2.conv.bias",
        "encoder.down_blocks.1.conv.conv.weight",
        "encoder.down_blocks.8.res_blocks.1.conv1.conv.weight",
        "encoder.conv_out.conv.bias",
        "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight",
        "decoder.up_blocks.1.conv.conv.weight",
        "decoder.up_blocks.6.res_blocks.5.conv2.conv.weight",
        "decoder.up_blocks.7.conv.conv.bias",
        "decoder.up_blocks.8.res_blocks.3.conv2.conv.weight",
    }


def test_arguments_of_the_published_models():
    new, old = video_vae_layout(VIDEO_VAE_23).arguments, video_vae_layout(VIDEO_VAE_19B).arguments
    assert new["block_out_channels"] == (256, 512, 1024, 1024)
    assert new["layers_per_block"] == (4, 6, 4, 2, 2)
    assert new["downsample_type"] == ("spatial", "temporal", "spatiotemporal", "spatiotemporal")
    assert new["decoder_block_out_channels"] == (256, 512, 512, 1024)
    assert new["upsample_type"] == ("spatiotemporal", "spatiotemporal", "temporal", "spatial")
    assert new["upsample_factor"] == (2, 2, 1, 2)
    assert new["decoder_spatial_padding_mode"] == "zeros"
    assert new["decoder_causal"] is False
    assert old["block_out_channels"] == (256, 512, 1024, 2048)
    assert old["decoder_layers_per_block"] == (5, 5, 5, 5)
    assert old["upsample_residual"] == (True, True, True)
    assert old["decoder_spatial_padding_mode"] == "reflect"
    assert old["encoder_spatial_padding_mode"] == "zeros"


def test_unknown_block_is_named():
    with pytest.raises(ValueError, match=r"encoder_blocks\[1\] is 'attn_res_x'"):
        video_vae_layout({"encoder_blocks": [["res_x", {"num_layers": 1}], ["attn_res_x", {}]]})


def test_scale_factors():
    assert scale_factors({"vae": VIDEO_VAE_23}) == (8, 32, 32)
    assert scale_factors({"vae": {"decoder_blocks": [["compress_time", {}]], "patch_size": 2}}) == (2, 2, 2)
    assert scale_factors({"vae": None}) == (8, 32, 32)


def test_encode_and_decode_shapes(nano, generator):
    codec = load_video_codec(nano, dtype=torch.float32)
    pixels = torch.rand(2, 3, 9, 64, 96, generator=generator) * 2 - 1
    latents = codec.encode(pixels)
    assert latents.shape == (2, 128, 2, 2, 3)
    assert codec.decode(latents).shape == pixels.shape
    assert codec.encode(pixels[:, :, :1]).shape == (2, 128, 1, 2, 3)


def test_latents_are_normalized_per_channel(nano, generator):
    codec = load_video_codec(nano, dtype=torch.float32, part="encoder")
    stored = load_file(nano)
    mean = stored["vae.per_channel_statistics.mean-of-means"].float()
    std = stored["vae.per_channel_statistics.std-of-means"].float()
    pixels = torch.rand(1, 3, 1, 32, 32, generator=generator) * 2 - 1
    with torch.no_grad():
        raw = codec.vae.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(codec.encode(pixels)[0, :, 0, 0, 0], (raw[0, :, 0, 0, 0] - mean) / std)


def test_bad_sizes_are_refused(nano):
    codec = load_video_codec(nano, dtype=torch.float32, part="encoder")
    for shape in [(8, 32, 32), (9, 33, 32), (9, 32, 40)]:
        with pytest.raises(ValueError, match="cannot be encoded"):
            codec.encode(torch.zeros(1, 3, *shape))


def nano_vae_tensors(nano):
    return {name.removeprefix("vae."): t for name, t in load_file(nano).items() if name.startswith("vae.")}


def write_vae(path, tensors, section):
    save_safetensors(path, tensors, {"config": json.dumps({"vae": section, "transformer": None})})
    return path


def test_split_file_with_bare_names_gives_the_same_latents(nano, tmp_path, generator):
    path = write_vae(tmp_path / "vae.safetensors", nano_vae_tensors(nano), CONFIG["vae"])
    pixels = torch.rand(1, 3, 1, 32, 32, generator=generator)
    split, single = (load_video_codec(p, dtype=torch.float32, part="encoder") for p in (path, nano))
    assert torch.equal(split.encode(pixels), single.encode(pixels))


def test_missing_and_unexpected_weights_are_named(nano, tmp_path):
    tensors = nano_vae_tensors(nano)
    tensors["encoder.conv_inn.conv.bias"] = tensors.pop("encoder.conv_in.conv.bias")
    path = write_vae(tmp_path / "vae.safetensors", tensors, CONFIG["vae"])
    with pytest.raises(
        ValueError,
        match=r"(?s)1 missing from the file: conv_in.conv.bias\n.*not in the model: encoder.conv_inn.conv.bias",
    ):
        load_video_codec(path)


def test_weights_of_another_shape_are_named(nano, tmp_path):
    tensors = nano_vae_tensors(nano)
    tensors["decoder.conv_out.conv.bias"] = torch.zeros(3)
    path = write_vae(tmp_path / "vae.safetensors", tensors, CONFIG["vae"])
    with pytest.raises(ValueError, match=r"conv_out.conv.bias \(model \[48\], file \[3\]\)"):
        load_video_codec(path)


def test_diffusion_decoder_file_can_encode_only(nano, tmp_path):
    nested = {
        "_class_name": "CausalDiffusionVAE",
        "encoder": {"blocks": CONFIG["vae"]["encoder_blocks"], "latent_log_var": "constant"},
        "decoder": {"stage_channels": [2048]},
    }
    tensors = nano_vae_tensors(nano) | {"decoder.conv_in.weight": torch.zeros(2, 2)}
    path = write_vae(tmp_path / "vae.safetensors", tensors, nested)
    codec = load_video_codec(path, dtype=torch.float32, part="encoder")
    assert codec.encode(torch.zeros(1, 3, 1, 32, 32)).shape == (1, 128, 1, 1, 1)
    with pytest.raises(ValueError, match="CausalDiffusionVAE"):
        load_video_codec(path, part="decoder")


def test_decoder_with_timestep_conditioning_is_recognized_by_its_weights(tmp_path, generator):
    section = CONFIG["vae"] | {"spatial_padding_mode": "reflect"}
    layout = video_vae_layout(section, timestep_conditioning=True)
    vae = AutoencoderKLLTX2Video(**layout.arguments)
    tensors = {layout.stored_name(k): v for k, v in vae.state_dict().items() if not k.startswith("latents_")}
    tensors |= {f"per_channel_statistics.{k}-of-means": torch.ones(128) for k in ("mean", "std")}
    assert "decoder.last_time_embedder.timestep_embedder.linear_1.weight" in tensors
    assert "decoder.up_blocks.0.time_embedder.timestep_embedder.linear_1.weight" in tensors
    codec = load_video_codec(write_vae(tmp_path / "vae.safetensors", tensors, section), dtype=torch.float32)
    latents = torch.randn(1, 128, 1, 2, 2, generator=generator)
    first, second = (codec.decode(latents, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (1, 3, 1, 64, 64)
    assert torch.equal(first, second)
