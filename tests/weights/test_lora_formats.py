"""LoRA files of other trainers give the update that their own reader gives."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.lora import adapter_weights, adapters, init_lora_
from ltx_titan.weights import export_lora, fuse_lora, load_lora
from ltx_titan.weights.lora_formats import read_lora_layers
from tests.lora.adapted import adapted, settings, transformer

TARGETS = ["attn1.to_q", "attn1.to_out.0", "patchify_proj"]


def split(key):
    """Layer and letter of an official key."""
    layer, _, letter = key.removeprefix("diffusion_model.").removesuffix(".weight").rpartition(".lora_")
    return layer, letter


def peft(tensors, folder):
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    return {key.replace("diffusion_model.", "base_model.model."): tensor for key, tensor in tensors.items()}, {}


def rslora(tensors, folder):
    config = {"lora_alpha": 4, "use_rslora": True}  # 4 / sqrt(4)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {key.replace("diffusion_model.", "base_model.model."): tensor for key, tensor in tensors.items()}, {}


def pattern(tensors, folder):
    config = {"lora_alpha": 1, "alpha_pattern": {"to_q": 8, "to_out.0": 8, "patchify_proj": 8}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {key.replace("diffusion_model.", "base_model.model."): tensor for key, tensor in tensors.items()}, {}


def kohya(tensors, folder):
    found = {}
    for key, tensor in tensors.items():
        layer, letter = split(key)
        flat = "lora_unet_" + layer.replace(".", "_")
        found[f"{flat}.lora_{'down' if letter == 'A' else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(8.0)
    return found, {}


def diffusers(tensors, folder):
    found = {key.replace("diffusion_model.", "transformer.").replace("patchify_proj", "proj_in"): tensor
             for key, tensor in tensors.items()}  # fmt: skip
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": False}
    return found, {"lora_adapter_metadata": json.dumps(config)}


def diffsynth(tensors, folder):
    # No alpha: B itself is doubled.
    return {
        key.removeprefix("diffusion_model.").replace(".weight", ".default.weight"): t * 2 if "lora_B" in key else t
        for key, t in tensors.items()
    }, {}


def official_with_alpha(tensors, folder):
    return tensors | {f"diffusion_model.{split(key)[0]}.alpha": torch.tensor(8.0) for key in tensors}, {}


FORMS = [peft, rslora, pattern, kohya, diffusers, diffsynth, official_with_alpha]


@pytest.fixture
def written(tmp_path):
    """A model of rank 4, and a file of it that states twice its update."""
    model = adapted(settings(targets=TARGETS))
    export_lora(adapter_weights(model), tmp_path / "official.safetensors", dtype=torch.float32)
    return model, load_file(tmp_path / "official.safetensors")


@pytest.mark.parametrize("form", FORMS)
def test_loading_gives_the_update_that_the_writer_meant(written, tmp_path, form):
    model, tensors = written
    found, header = form(tensors, tmp_path)
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, tmp_path / "other.safetensors", header)
    again = adapted(settings(targets=TARGETS))
    init_lora_(again, 9)
    load_lora(adapter_weights(again), tmp_path / "other.safetensors")
    for name, layer in adapters(model).items():
        other = adapters(again)[name]
        update = other.scaling * other.lora_B.weight @ other.lora_A.weight
        torch.testing.assert_close(update, 2 * layer.scaling * layer.lora_B.weight @ layer.lora_A.weight)


@pytest.mark.parametrize("form", [kohya, diffusers])
def test_fusing_for_sampling_applies_the_writers_scale(written, tmp_path, form):
    model, tensors = written
    found, header = form(tensors, tmp_path)
    save_file(found, tmp_path / "other.safetensors", header)
    plain = transformer()
    before = plain.patchify_proj.weight.detach().clone()
    assert fuse_lora(plain, tmp_path / "other.safetensors", strength=0.5) == len(adapters(model))
    layer = adapters(model)["patchify_proj"]
    expected = before + layer.scaling * layer.lora_B.weight @ layer.lora_A.weight
    torch.testing.assert_close(plain.patchify_proj.weight, expected)


@pytest.mark.parametrize(("part", "kind"), [("lokr_w2_a", "LoKr"), ("hada_t1", "LoHa")])
def test_adapters_of_other_kinds_are_named(written, tmp_path, part, kind):
    layer = "diffusion_model.transformer_blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.{part}": torch.ones(2, 2), f"{layer}.alpha": torch.tensor(1.0)}, tmp_path / "other.safetensors"
    )
    with pytest.raises(ValueError, match=rf"other\.safetensors: .*{part}.* This is {kind}: merge it into its base"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


def test_a_peft_file_without_its_config_is_refused(written, tmp_path):
    found, _ = peft(written[1], tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    save_file(found, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: a PEFT file.*expected that file, found none"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": "8"}, r"lora_alpha: expected a finite number .*, found '8'"),
        ({"lora_alpha": True}, r"lora_alpha: expected a finite number .*, found True"),
        ({"lora_alpha": float("nan")}, r"lora_alpha: expected a finite number .*, found nan"),
        ({"lora_alpha": 10**400}, r"lora_alpha: expected a finite number .*, found 1000"),
        ({"alpha_pattern": [8]}, r"alpha_pattern: expected an object, found \[8\]"),
        ({"alpha_pattern": {"(": 8}}, r"alpha_pattern: expected regular expressions, found '\('"),
        ({"alpha_pattern": {"to_q": None}, "lora_alpha": []}, r"lora_alpha: expected a finite number .*, found \[\]"),
    ],
)
def test_a_peft_config_without_a_usable_alpha_is_refused(written, tmp_path, config, message):
    found, _ = peft(written[1], tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(found, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {message}"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


@pytest.mark.parametrize("alpha", [[8.0, 8.0], [], [float("nan")], [float("inf")], [0.0]])
def test_an_alpha_that_is_no_number_is_refused(written, tmp_path, alpha):
    found, _ = kohya(written[1], tmp_path)
    key = next(key for key in found if key.endswith(".alpha"))
    save_file({**found, key: torch.tensor(alpha)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=rf"other\.safetensors: {key}: expected (one|a finite) number.*, found"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


def test_a_rank_of_zero_is_refused(written, tmp_path):
    found, _ = kohya(written[1], tmp_path)
    found = {key: t[:0] if ".lora_down" in key else t[:, :0] if ".lora_up" in key else t for key, t in found.items()}
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="lora_A has rank 0 and lora_B 0"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


def test_a_layer_that_the_model_lacks_keeps_its_name_in_the_message(written, tmp_path):
    found, _ = kohya(written[1], tmp_path)
    found = {key.replace("patchify_proj", "time_in"): tensor for key, tensor in found.items()}
    save_file(found, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"1 layers that have no adapter in the model: lora_unet_time_in"):
        load_lora(adapter_weights(written[0]), tmp_path / "other.safetensors")


def test_one_layer_under_the_names_of_two_tools_is_refused(tmp_path):
    tensors = {}
    for prefix in ("diffusion_model.", "transformer."):
        layer = f"{prefix}transformer_blocks.0.attn1.to_q"
        tensors |= {f"{layer}.lora_A.weight": torch.ones(4, 8), f"{layer}.lora_B.weight": torch.ones(8, 4)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"expected one lora_A\.weight of transformer_blocks\.0\.attn1\.to_q, found"):
        read_lora_layers(tmp_path / "lora.safetensors", ())
