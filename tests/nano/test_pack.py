import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ltx_titan.codecs import load_audio_codec, load_video_codec
from ltx_titan.model import LTXTransformer, Modality, TextConnectors
from ltx_titan.nano.pack import make_nano


def test_same_seed_same_bytes(nano, tmp_path):
    again, other = make_nano(tmp_path / "again"), make_nano(tmp_path / "other", seed=1)
    files = sorted(path.relative_to(nano.parent) for path in nano.parent.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (nano.parent / file).read_bytes() == (again.parent / file).read_bytes(), file
    assert nano.read_bytes() != other.read_bytes()
    assert nano.stat().st_size < 20 * 2**20


def test_layout_equals_that_of_the_official_file(nano):
    with safe_open(nano, framework="pt") as handle:
        metadata, names = handle.metadata(), set(handle.keys())
    config = json.loads(metadata["config"])
    assert metadata["model_version"] == "2.3.0"
    assert set(config) >= {"transformer", "vae", "audio_vae", "vocoder", "scheduler"}
    assert config["transformer"]["num_attention_heads"] % 8 == 0
    assert config["transformer"]["audio_num_attention_heads"] % 8 == 0
    prefixes = (
        "model.diffusion_model.",
        "text_embedding_projection.video_aggregate_embed.",
        "text_embedding_projection.audio_aggregate_embed.",
        "vae.encoder.",
        "vae.decoder.",
        "vae.per_channel_statistics.",
        "audio_vae.encoder.",
        "audio_vae.decoder.",
        "audio_vae.per_channel_statistics.",
        "vocoder.vocoder.",
        "vocoder.bwe_generator.",
        "vocoder.mel_stft.",
    )
    assert all(name.startswith(prefixes) for name in names)
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def test_transformer_and_connectors_load_and_predict_unit_scale(nano, generator):
    with safe_open(nano, framework="pt") as handle:
        config = json.loads(handle.metadata()["config"])
    prefix = "model.diffusion_model."
    weights = {k.removeprefix(prefix): v.float() for k, v in load_file(nano).items() if k.startswith(prefix)}
    connectors = TextConnectors.from_config(config)
    connectors.load_state_dict({k: weights.pop(k) for k in list(weights) if "_embeddings_connector." in k})
    model = LTXTransformer.from_config(config["transformer"])
    model.load_state_dict(weights)

    features = [torch.randn(1, 128, width, generator=generator) for width in (128, 64)]
    with torch.no_grad():
        contexts = connectors(*features, torch.ones(1, 128, dtype=torch.int64))[:2]
        streams = [
            Modality(
                latent=torch.randn(1, 12, 128, generator=generator),
                sigma=torch.tensor([0.7]),
                timesteps=torch.full((1, 12), 0.7),
                positions=torch.rand(1, axes, 12, 2, generator=generator),
                context=context,
            )
            for axes, context in zip((3, 1), contexts, strict=True)
        ]
        velocities = model(*streams)
    for velocity in velocities:
        assert 0.1 < velocity.std() < 10


def test_latents_of_other_clips_and_audio_are_about_standard_normal(nano):
    generator = torch.Generator().manual_seed(99)
    edges = torch.rand(1, 3, 3, 6, 8, generator=generator) * 2 - 1
    pixels = torch.nn.functional.interpolate(edges, (17, 96, 128), mode="trilinear")
    latents = load_video_codec(nano, dtype=torch.float32, part="encoder").encode(pixels)
    assert latents.mean().abs() < 0.5
    assert 0.4 < latents.std() < 2
    tone = torch.sin(torch.arange(32000) * 0.2) * torch.linspace(0, 0.3, 32000)
    latents = load_audio_codec(nano, part="encoder").encode(tone[None, None], 16000)
    assert latents.mean().abs() < 0.5
    assert 0.4 < latents.std() < 2
