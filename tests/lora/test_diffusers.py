"""Diffusers loads our LoRA files, and its transformer then computes the same as ours.

The names of its parameters come from diffusers' own conversion of official LoRA keys, not from our table.
"""

import dataclasses

import torch
from diffusers import LTX2VideoTransformer3DModel
from diffusers.loaders import peft as diffusers_peft
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_ltx2_lora_to_diffusers
from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin
from torch import nn

from ltx_titan.lora import adapter_weights, apply_lora, init_lora_
from ltx_titan.model import LTXTransformer
from ltx_titan.weights import export_lora
from ltx_titan.weights.names import name_from_diffusers
from tests.golden_cases import load_case
from tests.lora.adapted import CASE, config, golden_inputs, settings, stir

SIGMA = 0.7


class Pipeline(LTX2LoraLoaderMixin):
    """The part of a pipeline that the loader uses."""

    hf_device_map = None
    components: dict = {}  # noqa: RUF012

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer


def diffusers_transformer():
    ours = config()
    model = LTX2VideoTransformer3DModel(
        in_channels=ours["in_channels"],
        out_channels=ours["out_channels"],
        num_attention_heads=ours["num_attention_heads"],
        attention_head_dim=ours["attention_head_dim"],
        cross_attention_dim=ours["cross_attention_dim"],
        audio_in_channels=ours["audio_in_channels"],
        audio_out_channels=ours["audio_out_channels"],
        audio_num_attention_heads=ours["audio_num_attention_heads"],
        audio_attention_head_dim=ours["audio_attention_head_dim"],
        audio_cross_attention_dim=ours["audio_cross_attention_dim"],
        num_layers=ours["num_layers"],
        rope_type=ours["rope_type"],
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
        use_prompt_embeddings=False,
    )
    model.load_state_dict(diffusers_weights(), strict=True)
    return model.eval()


def diffusers_weights():
    """The golden weights under diffusers' names."""
    official = {f"diffusion_model.{name}": tensor for name, tensor in load_case(CASE).weights.items()}
    converted = _convert_non_diffusers_ltx2_lora_to_diffusers(official)
    return {name.removeprefix("transformer."): tensor for name, tensor in converted.items()}


def our_adapter(*targets):
    model = LTXTransformer.from_config(config())
    model.load_state_dict(load_case(CASE).weights)
    names = apply_lora(model, settings(targets=targets))
    init_lora_(model, 1)
    stir(model)
    return model, names


def test_names_of_diffusers_map_back_to_the_official_ones():
    weights = load_case(CASE).weights
    found = {name_from_diffusers(name): tensor for name, tensor in diffusers_weights().items()}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


@torch.no_grad()
def test_diffusers_computes_the_same_with_our_adapter(tmp_path, monkeypatch):
    ours, names = our_adapter("all_attention", "video_ffn", "audio_ffn", "patchify_proj", "adaln_single.linear")
    export_lora(adapter_weights(ours), tmp_path / "adapter.safetensors", dtype=torch.float32)

    reports = []
    monkeypatch.setattr(diffusers_peft, "_maybe_warn_for_unhandled_keys", lambda keys, name: reports.append(keys))
    theirs = diffusers_transformer()
    Pipeline(theirs).load_lora_weights(tmp_path / "adapter.safetensors")
    (keys,) = reports
    assert not keys.unexpected_keys
    assert not [key for key in keys.missing_keys if "lora_" in key]
    assert len([name for name, _ in theirs.named_modules() if name.endswith("lora_A")]) == len(names)

    sigma = torch.full((2,), SIGMA)
    video, audio = (
        dataclasses.replace(s, sigma=sigma, timesteps=sigma[:, None].expand(s.latent.shape[:2]), context_mask=None)
        for s in golden_inputs()
    )
    expected = ours(video, audio)
    actual = theirs(
        hidden_states=video.latent,
        audio_hidden_states=audio.latent,
        encoder_hidden_states=video.context,
        audio_encoder_hidden_states=audio.context,
        timestep=1000 * video.timesteps,
        audio_timestep=1000 * audio.timesteps,
        sigma=1000 * sigma,
        audio_sigma=1000 * sigma,
        video_coords=video.positions,
        audio_coords=audio.positions,
        return_dict=False,
    )
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_the_adapter_matters_to_that_comparison():
    ours, _ = our_adapter("all_attention")
    with_adapter = ours(*golden_inputs())[0]
    for layer in ours.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.weight.zero_()
    assert (ours(*golden_inputs())[0] - with_adapter).abs().max() > 1e-2
