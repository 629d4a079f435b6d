"""`ltx-titan lora ...` over the nano pack."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.cli import main
from ltx_titan.weights import LoRAWeights, read_lora, read_metadata, write_lora

PREFIX = "model.diffusion_model."
LAYERS = [f"transformer_blocks.{block}.{layer}" for block in range(2) for layer in ("attn1.to_q", "audio_ff.net.2")]


@pytest.fixture(scope="module")
def lora(nano_path, tmp_path_factory):
    """A LoRA of rank 8 for the nano pack, in kohya's dialect with alpha = 4."""
    base = load_file(nano_path)
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name in LAYERS:
        out, width = base[f"{PREFIX}{name}.weight"].shape
        # Singular values that fall: directions of B are 1, 1/2, 1/4, ...
        lora_b = torch.randn(out, 8, generator=generator) * 0.5 ** torch.arange(8)
        layers[name] = LoRAWeights(torch.randn(8, width, generator=generator), lora_b, 0.5)
    header = {
        "ss_network_dim": "8",
        "ss_network_alpha": "4",
        "ss_base_model_version": "ltx-2.3",
        "modelspec.trigger_phrase": "SKSDOG",
    }
    return write_lora(layers, tmp_path_factory.mktemp("lora") / "kohya.safetensors", header, "kohya")


def update(layer):
    return layer.scaling * layer.lora_b.float() @ layer.lora_a.float()


def run(*arguments):
    return main(["lora", *map(str, arguments)])


def test_info_states_what_the_file_does(lora, capsys):
    assert run("info", lora) == 0
    printed = capsys.readouterr().out
    for line in ("dialect       kohya", "rank          8", "scale of B A  0.5", "trigger       SKSDOG"):
        assert line in printed
    assert "license       not stated" in printed
    assert run("info", lora, "--json") == 0
    described = json.loads(capsys.readouterr().out)["layers"]
    assert set(described) == set(LAYERS)
    for name, layer in read_lora(lora)[0].items():
        assert described[name]["norm"] == pytest.approx(update(layer).norm().item(), rel=1e-4)


def test_merge_adds_the_update_and_keeps_the_rest(nano_path, lora, tmp_path, capsys):
    out = tmp_path / "merged.safetensors"
    assert run("merge", nano_path, lora, out, "--strength", "0.5") == 0
    base, merged = load_file(nano_path), load_file(out)
    assert base.keys() == merged.keys()
    assert read_metadata(out).raw == read_metadata(nano_path).raw
    layers, _ = read_lora(lora)
    for key, tensor in base.items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        expected = tensor.float() + 0.5 * update(layers[name]) if name in layers else tensor.float()
        assert torch.equal(merged[key], expected.to(tensor.dtype)), key
    assert f"{len(LAYERS)} layers" in capsys.readouterr().out


def test_extract_finds_the_lora_that_was_merged(nano_path, lora, tmp_path, capsys):
    base = load_file(nano_path)
    tuned = {key: tensor.float() for key, tensor in base.items()}
    layers, _ = read_lora(lora)
    for name, layer in layers.items():
        tuned[f"{PREFIX}{name}.weight"] += update(layer)
    tuned[f"{PREFIX}proj_out.bias"] += 1
    save_file(tuned, tmp_path / "tuned.safetensors", read_metadata(nano_path).raw)
    arguments = ("extract", nano_path, tmp_path / "tuned.safetensors", tmp_path / "lora.safetensors")
    assert run(*arguments, "--rank", 8, "--dtype", "float32", "--device", "cpu") == 0
    found, metadata = read_lora(tmp_path / "lora.safetensors")
    assert found.keys() == layers.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(update(found[name]), update(layer), rtol=1e-3, atol=1e-3)
    printed = capsys.readouterr().out
    assert "1 tensors that changed cannot be stored in a LoRA" in printed
    assert "proj_out.bias" in printed
    assert metadata.raw["ss_sd_model_name"] == nano_path.name

    assert run(*arguments, "--rank", 2, "--dtype", "float32", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    found, _ = read_lora(tmp_path / "lora.safetensors")
    lost = sum((update(found[name]) - update(layer)).square().sum() for name, layer in layers.items())
    error = (lost / sum(update(layer).square().sum() for layer in layers.values())).sqrt().item()
    assert stated_error(printed) == pytest.approx(100 * error, rel=0.01)
    assert 1 < stated_error(printed) < 60


def stated_error(printed):
    return float(printed.partition("relative error ")[2].partition(" %")[0])


def test_resize_keeps_what_is_largest_and_states_the_error(lora, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert run("resize", lora, out, "--rank", 3) == 0
    before, (after, metadata) = read_lora(lora)[0], read_lora(out)
    assert {layer.lora_a.shape[0] for layer in after.values()} == {3}
    # The scale is in B now: readers that compute alpha / rank get 1.
    assert (metadata.raw["ss_network_dim"], metadata.raw["ss_network_alpha"]) == ("3", "3")
    lost = total = best = 0.0
    for name, layer in before.items():
        values = torch.linalg.svdvals(update(layer))
        best += values[3:].square().sum().item()
        lost += (update(layer) - update(after[name])).square().sum().item()
        total += values.square().sum().item()
    assert lost == pytest.approx(best, rel=1e-3)
    assert stated_error(capsys.readouterr().out) == pytest.approx(100 * (lost / total) ** 0.5, rel=0.01)


def test_convert_writes_what_comfyui_reads(lora, tmp_path, capsys):
    out = tmp_path / "comfyui.safetensors"
    assert run("convert", lora, out) == 0
    assert set(load_file(out)) == {f"diffusion_model.{name}.lora_{part}.weight" for name in LAYERS for part in "AB"}
    assert "kohya -> comfyui" in capsys.readouterr().out
    before, after = read_lora(lora)[0], read_lora(out)[0]
    assert all(torch.equal(update(before[name]), update(after[name])) for name in LAYERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resize", "LORA", "OUT", "--rank", "8"), "expected less than the file's rank, which is 8"),
        (("resize", "LORA", "LORA"), "is also an input"),
        (("convert", "LORA", "out.bin"), "ends in .safetensors"),
        (("convert", "LORA", "OUT", "--to", "peft"), "expected a folder"),
        (("extract", "NANO", "NANO", "OUT"), "nothing to extract"),
        (("info", "NANO"), "expected a LoRA file"),
        (("merge", "LORA", "LORA", "OUT"), "layers that are not in the model"),
    ],
)
def test_what_cannot_be_done_is_refused(arguments, message, lora, nano_path, tmp_path, capsys):
    paths = {"LORA": lora, "NANO": nano_path, "OUT": tmp_path / "out.safetensors"}
    assert run(*(paths.get(argument, argument) for argument in arguments)) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
