import pytest
import torch

from ltx_titan.lora import apply_lora, init_base_, init_lora_, load_base
from ltx_titan.lora.quantized import QUANTIZED, quantize_rows
from tests.golden_cases import load_case
from tests.lora.adapted import CASE, same_bits, settings, stir, transformer, write_checkpoint


def empty(**fields):
    model = transformer("meta")
    apply_lora(model, settings(**fields))
    model.to_empty(device="cpu")
    init_lora_(model, 3)
    stir(model)
    return model


def test_the_base_is_loaded_under_its_official_names_and_adapters_are_left_alone(tmp_path):
    path = write_checkpoint(tmp_path / "base.safetensors", torch.float32)
    model = empty()
    adapter = model.transformer_blocks[0].attn1.to_q.lora_A.weight.clone()
    load_base(model, path)
    weights = load_case(CASE).weights
    query = model.transformer_blocks[0].attn1.to_q
    assert torch.equal(query.base.weight, weights["transformer_blocks.0.attn1.to_q.weight"])
    assert torch.equal(query.base.bias, weights["transformer_blocks.0.attn1.to_q.bias"])
    assert torch.equal(model.patchify_proj.weight, weights["patchify_proj.weight"])
    assert torch.equal(query.lora_A.weight, adapter)


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantised_base_is_quantised_while_it_is_read(tmp_path, form):
    path = write_checkpoint(tmp_path / "base.safetensors")
    model = empty(base_dtype=form, targets=["video"])
    load_base(model, path)
    weights = {name: tensor.bfloat16() for name, tensor in load_case(CASE).weights.items()}
    for name, layer in (("attn1.to_q", model.transformer_blocks[1].attn1.to_q.base),
                        ("audio_ff.net.2", model.transformer_blocks[1].audio_ff.net[2])):  # fmt: skip
        data, scale = quantize_rows(weights[f"transformer_blocks.1.{name}.weight"], form)
        assert same_bits(layer.qdata, data)
        assert torch.equal(layer.scale, scale)
        assert torch.equal(layer.bias, weights[f"transformer_blocks.1.{name}.bias"])
    assert torch.equal(model.proj_out.weight, weights["proj_out.weight"])


def test_a_base_that_does_not_fit_is_refused_by_name(tmp_path):
    path = write_checkpoint(tmp_path / "base.safetensors")
    model = empty(base_dtype="int8")
    layer = model.transformer_blocks[0].attn1.to_q.base
    layer.in_features = 48
    before = layer.qdata.clone()
    with pytest.raises(ValueError, match=r"attn1\.to_q\.weight is BF16 \[64, 64\], expected .* \[64, 48\]"):
        load_base(model, path)
    assert same_bits(layer.qdata, before)


def test_weights_without_a_place_are_refused_unless_allowed(tmp_path):
    path = write_checkpoint(tmp_path / "base.safetensors")
    with torch.device("meta"):
        video = type(transformer("meta")).from_config(transformer_config(), "video")
    apply_lora(video, settings(base_dtype="int8"))
    video.to_empty(device="cpu")
    with pytest.raises(ValueError, match="without a place in the model"):
        load_base(video, path)
    load_base(
        video, path, allow_unused=lambda name: "audio" in name or "a2v" in name or "v2a" in name or "av_ca" in name
    )


def transformer_config():
    return load_case(CASE).entry["config"]["transformer"]


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_a_random_base_is_seeded(form):
    def first(seed):
        model = empty(base_dtype=form)
        init_base_(model, seed)
        return model.transformer_blocks[0].attn1.to_q.base.weight.float()

    one = first(1)
    assert torch.equal(one, first(1))
    assert not torch.equal(one, first(2))
    assert abs(one.std() * 64**0.5 - 1) < 0.05
