import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.build import count_weights
from ltx_titan.lora import adapter_weights, adapters, apply_lora, init_base_, init_lora_, load_base
from ltx_titan.weights import QUANTIZED, export_merged, load_parameters
from ltx_titan.weights.quantized import dequantize, quantize_rows
from tests.golden_cases import load_case
from tests.lora.adapted import CASE, same_bits, settings, stir, transformer, write_checkpoint
from tests.weights.quantized_file import FORMS, quantize


def empty(**fields):
    model = transformer("meta")
    apply_lora(model, settings(**fields))
    model.to_empty(device="cpu")
    init_lora_(model, 3)
    stir(model)
    return model


def test_the_base_is_loaded_by_official_names_and_adapters_keep_their_values(tmp_path):
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
def test_a_quantized_base_is_quantized_while_it_is_read(tmp_path, form):
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


@pytest.fixture(scope="module", params=FORMS)
def quantized_file(request, tmp_path_factory):
    """An official quantized file, its dequantized weights, and its form: linear layers of all blocks but the first."""
    folder = tmp_path_factory.mktemp("quantized")
    tensors = load_file(write_checkpoint(folder / "plain.safetensors"))

    def is_chosen(module):
        return "transformer_blocks.1." in module and ("attn" in module or "ff" in module) and "norm" not in module

    stored, values, header = quantize(tensors, request.param, lambda module: is_chosen(module) and "gate" not in module)
    config = {"config": json.dumps({"transformer": transformer_config()})}
    save_file(stored, folder / "quantized.safetensors", header | config)
    prefix = "model.diffusion_model."
    weights = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return folder / "quantized.safetensors", weights, request.param


def test_an_official_quantized_file_becomes_a_bfloat16_base(quantized_file):
    path, weights, _ = quantized_file
    model = empty(base_dtype="bfloat16")
    load_base(model, path)
    for name in ("transformer_blocks.1.attn1.to_q", "transformer_blocks.0.attn1.to_q"):
        assert torch.equal(model.get_submodule(name).base.weight, weights[f"{name}.weight"].bfloat16())


def test_an_official_quantized_file_keeps_its_bits_in_the_matching_form(quantized_file):
    path, weights, form = quantized_file
    own = {"fp8": "float8", "nvfp4": "nvfp4"}[form]
    model = empty(base_dtype=own, targets=["video"])
    load_base(model, path)
    for name in ("attn1.to_q.base", "audio_ff.net.2"):
        layer = model.transformer_blocks[1].get_submodule(name)
        expected = weights[f"transformer_blocks.1.{name.removesuffix('.base')}.weight"]
        found = dequantize(layer.qdata, layer.scale, own, torch.float32)
        # A second rounding to the form's own grid would be off by up to 2^-4 of a weight; this is the scale's alone.
        assert ((found - expected).abs() <= 2**-8 * expected.abs()).all()
    plain = weights["transformer_blocks.0.attn1.to_q.weight"]
    data, scale = quantize_rows(plain, own)
    assert same_bits(model.transformer_blocks[0].attn1.to_q.base.qdata, data)
    assert torch.equal(model.transformer_blocks[0].attn1.to_q.base.scale, scale)


def test_an_official_quantized_file_can_be_converted_to_another_form(quantized_file):
    path, weights, _ = quantized_file
    model = empty(base_dtype="int8", targets=["video"])
    load_base(model, path)
    data, scale = quantize_rows(weights["transformer_blocks.1.attn1.to_q.weight"], "int8")
    assert same_bits(model.transformer_blocks[1].attn1.to_q.base.qdata, data)
    assert torch.equal(model.transformer_blocks[1].attn1.to_q.base.scale, scale)


def test_adapters_on_a_quantized_file_merge_into_a_plain_one(quantized_file, tmp_path):
    path, weights, _ = quantized_file
    model = empty(base_dtype="bfloat16", targets=["attn1.to_q"])
    load_base(model, path)
    export_merged(adapter_weights(model), path, tmp_path / "merged.safetensors")
    merged = transformer()
    load_parameters(merged, tmp_path / "merged.safetensors")
    for name, layer in adapters(model).items():
        update = layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
        expected = (weights[f"{name}.weight"].float() + update).bfloat16().float()
        torch.testing.assert_close(merged.get_submodule(name).weight, expected, rtol=2**-8, atol=1e-6)


def test_a_base_that_does_not_fit_is_refused_by_name(tmp_path):
    path = write_checkpoint(tmp_path / "base.safetensors")
    model = empty(base_dtype="int8")
    layer = model.transformer_blocks[0].attn1.to_q.base
    layer.in_features = 48
    before = layer.qdata.clone()
    with pytest.raises(ValueError, match=r"attn1\.to_q\.weight \(model \[64, 48\], file \[64, 64\]\)"):
        load_base(model, path)
    assert same_bits(layer.qdata, before)


def test_weights_that_the_model_lacks_are_refused_unless_allowed(tmp_path):
    path = write_checkpoint(tmp_path / "base.safetensors")
    with torch.device("meta"):
        video = type(transformer("meta")).from_config(transformer_config(), "video")
    apply_lora(video, settings(base_dtype="int8"))
    video.to_empty(device="cpu")
    with pytest.raises(ValueError, match="in the file, but not in the model"):
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


@pytest.mark.parametrize("form", QUANTIZED)
def test_a_quantized_random_base_has_the_weights_of_the_plain_one(form):
    plain, quantized = empty(base_dtype="bfloat16"), empty(base_dtype=form)
    for model in (plain, quantized):
        init_base_(model, 1)
    weights = [model.transformer_blocks[0].attn1.to_q.base.weight.float() for model in (plain, quantized)]
    assert (weights[1] - weights[0]).norm() < 0.15 * weights[0].norm()
    # What is not quantized is equal to the bit.
    tables = [model.transformer_blocks[0].scale_shift_table for model in (plain, quantized)]
    assert torch.equal(*tables)


@pytest.mark.parametrize("form", QUANTIZED)
def test_weights_are_counted_before_quantization(form):
    model = transformer("meta")
    expected = sum(parameter.numel() for parameter in model.parameters())
    apply_lora(model, settings(base_dtype=form, targets=["attn1.to_q"]))
    assert count_weights(model) == expected + sum(p.numel() for p in model.parameters() if p.requires_grad)
