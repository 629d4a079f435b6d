"""Each dialect has the keys that its readers look up: 0 missing, 0 unexpected."""

import json

import peft
import pytest
import torch
from diffusers.loaders import peft as diffusers_peft
from safetensors.torch import load_file

from ltx_titan.lora import adapter_weights
from ltx_titan.weights import dialect_of, export_lora, read_lora, read_metadata, write_lora
from ltx_titan.weights.lora_dialects import DIALECTS
from tests.lora.adapted import adapted, settings, transformer
from tests.lora.test_diffusers import Pipeline, diffusers_transformer

TARGETS = ["all_attention", "video_ffn", "audio_ffn", "patchify_proj", "adaln_single.linear"]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Our own file of an adapter with alpha = 2 rank; and the model's layers that it adapts."""
    model = adapted(settings(targets=TARGETS))
    path = tmp_path_factory.mktemp("lora") / "official.safetensors"
    export_lora(adapter_weights(model), path, {"modelspec.title": "x"}, dtype=torch.float32)
    return path, sorted(adapter_weights(model))


def convert(path, folder, dialect):
    layers, metadata = read_lora(path)
    out = folder / ("peft" if dialect == "peft" else f"{dialect}.safetensors")
    return write_lora(layers, out, metadata.raw, dialect)


def comfyui_keys(names):
    """File keys that ComfyUI looks up for each layer: by its name in the model, and by kohya's flat one."""
    for name in names:
        for module in (f"diffusion_model.{name}", "lora_unet_" + name.replace(".", "_")):
            for pair in (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")):
                yield name, {f"{module}.{part}" for part in pair}, f"{module}.alpha"


@pytest.mark.parametrize("dialect", ["comfyui", "kohya"])
def test_comfyui_finds_every_layer(official, tmp_path, dialect):
    path, names = official
    keys = set(load_file(convert(path, tmp_path, dialect)))
    found, used = set(), set()
    for name, pair, alpha in comfyui_keys(names):
        if pair <= keys:
            found.add(name)
            used |= pair | ({alpha} & keys)
    assert found == set(names)
    assert keys - used == set()


def test_ltx_core_finds_every_layer(official, tmp_path):
    # It strips the prefix, pairs `lora_A.weight` and `lora_B.weight`, and ignores alphas.
    path, names = official
    keys = set(load_file(convert(path, tmp_path, "comfyui")))
    assert keys == {f"diffusion_model.{name}.lora_{part}.weight" for name in names for part in "AB"}


@pytest.mark.parametrize("dialect", ["comfyui", "diffusers"])
def test_diffusers_finds_every_layer(official, tmp_path, dialect, monkeypatch):
    path, names = official
    reports = []
    monkeypatch.setattr(diffusers_peft, "_maybe_warn_for_unhandled_keys", lambda keys, name: reports.append(keys))
    theirs = diffusers_transformer()
    Pipeline(theirs).load_lora_weights(convert(path, tmp_path, dialect))
    (keys,) = reports
    assert not keys.unexpected_keys
    assert not [key for key in keys.missing_keys if "lora_" in key]
    assert len([name for name, _ in theirs.named_modules() if name.endswith("lora_A")]) == len(names)


def test_peft_finds_every_layer_and_applies_the_same_update(official, tmp_path):
    path, names = official
    file = convert(path, tmp_path, "peft")
    model = transformer()
    plain = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    loaded = peft.PeftModel.from_pretrained(model, file.parent)
    keys = peft.get_peft_model_state_dict(loaded).keys()
    assert {key.removeprefix("base_model.model.") for key in keys} == {
        f"{name}.lora_{part}.weight" for name in names for part in "AB"
    }
    merged = dict(loaded.merge_and_unload().named_parameters())
    tensors = load_file(path)
    for name in names:
        update = tensors[f"diffusion_model.{name}.lora_B.weight"] @ tensors[f"diffusion_model.{name}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{name}.weight"] - plain[f"{name}.weight"], update, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_there_and_back_is_the_same_file(official, tmp_path, dialect):
    path, _ = official
    there = convert(path, tmp_path / "there", dialect)
    assert dialect_of(read_metadata(there)) == dialect
    back = convert(there, tmp_path / "back", "comfyui")
    before, after = load_file(path), load_file(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert read_metadata(back).raw == read_metadata(path).raw


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_writers_alpha_survives(official, tmp_path, dialect):
    # Of each layer another one: exceptions must not get lost.
    layers, metadata = read_lora(official[0])
    scaled = {name: type(layer)(layer.lora_a, layer.lora_b, 0.25 * (1 + i % 3)) for i, (name, layer) in
              enumerate(layers.items())}  # fmt: skip
    path = write_lora(scaled, tmp_path / ("x" if dialect == "peft" else "x.safetensors"), metadata.raw, dialect)
    if dialect == "peft":
        assert len(json.loads((path.parent / "adapter_config.json").read_text())["alpha_pattern"]) > 1
    for name, layer in read_lora(path)[0].items():
        assert torch.equal(layer.lora_b * layer.scaling, scaled[name].lora_b * scaled[name].scaling), name
