import json
import os

import pytest
import torch
from safetensors.torch import save_file

from ltx_titan.weights import read_metadata, read_source, released_config, scale_factors
from tests.golden_cases import load_case


def write(path, names=("model.diffusion_model.patchify_proj.weight",), **metadata):
    save_file({name: torch.ones(4, 3, dtype=torch.bfloat16) for name in names}, path, metadata)
    return path


def test_all_metadata_of_a_checkpoint_is_read(tmp_path):
    config = {"transformer": {"num_layers": 2}, "vae": None}
    path = write(tmp_path / "model.safetensors", config=json.dumps(config), model_version="2.3.rc1", license="x")

    metadata = read_metadata(path)

    assert metadata.config == {"transformer": {"num_layers": 2}, "vae": {}}
    assert metadata.transformer_config() == {"num_layers": 2}
    assert metadata.model_version == "2.3.rc1"
    assert metadata.raw["license"] == "x"
    info = metadata.tensors["model.diffusion_model.patchify_proj.weight"]
    assert (info.dtype, info.shape, info.end - info.start) == ("BF16", (4, 3), 24)
    assert info.end == path.stat().st_size


def test_a_file_is_read_again_once_it_has_changed_and_callers_share_no_values(tmp_path):
    path = write(tmp_path / "model.safetensors", config='{"transformer": {"num_layers": 2}}')
    os.utime(path, (1, 1))  # long ago: headers of recent files are not kept
    read_metadata(path).config["transformer"]["num_layers"] = 7
    assert read_metadata(path).config == {"transformer": {"num_layers": 2}}
    path.write_bytes(path.read_bytes().replace(b'\\"num_layers\\": 2', b'\\"num_layers\\": 3'))  # of the same size
    assert read_metadata(path).config == {"transformer": {"num_layers": 3}}
    os.utime(path, (2, 2))
    assert read_metadata(path).config == {"transformer": {"num_layers": 3}}


@pytest.mark.parametrize("lost", [1, 20])
def test_truncated_file_names_both_sizes(tmp_path, lost):
    path = write(tmp_path / "cut.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])

    with pytest.raises(ValueError, match=rf"cut\.safetensors.*cut short.*{len(whole)}.*{len(whole) - lost}"):
        read_metadata(path)


def test_file_cut_within_its_header_is_reported(tmp_path):
    path = write(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(ValueError, match="cut short: the header alone needs"):
        read_metadata(path)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>" * 9, (4).to_bytes(8, "little") + b"[1]."])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "page.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_metadata(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors: no such file"):
        read_metadata(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"], "LoRA"),
        (["transformer_blocks.0.attn1.to_q.weight"], "without the official metadata"),
        (["decoder.conv_in.conv.weight"], "autoencoder"),
        (["model.embed_tokens.weight"], "text encoder"),
        (["something.else"], "something.else"),
    ],
)
def test_a_file_without_a_transformer_config_is_described(tmp_path, names, what):
    metadata = read_metadata(write(tmp_path / "other.safetensors", names, config='{"transformer": null}'))
    with pytest.raises(ValueError, match=rf"no 'config.transformer'.*{what}"):
        metadata.transformer_config()
    with pytest.raises(ValueError, match=rf"no 'config.transformer'.*{what}"):
        read_source(str(metadata.path), None, None)


def test_a_missing_section_is_named_with_those_that_exist(tmp_path):
    metadata = read_metadata(write(tmp_path / "model.safetensors", config='{"transformer": {"num_layers": 2}}'))
    with pytest.raises(ValueError, match=r"no 'config.vae', so there is no video VAE.*config sections: transformer"):
        metadata.section("vae", "video VAE")


def test_scale_factors_equal_the_golden_ones():
    case = load_case("patchify_positions")
    for entry in case.entry["scale_factors"]:
        expected = case.tensors[f"output.{entry['name']}.scale_factors"].tolist()
        assert list(scale_factors(entry["model_config"])) == expected, entry["name"]


def test_scale_factors_of_a_nested_autoencoder_config_are_the_default():
    assert scale_factors({"vae": {"encoder": {"blocks": [["compress_all", {}]]}}}) == (8, 32, 32)


@pytest.mark.parametrize("name", ["ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-22b"])
def test_released_configs_compress_by_8_32_32_and_are_copies(name):
    config = released_config(name)
    assert scale_factors(config) == (8, 32, 32)
    config["transformer"]["num_layers"] = 1
    assert released_config(name)["transformer"]["num_layers"] == 48


def test_generations_differ_in_the_switches_that_choose_the_architecture():
    old, middle, new = (released_config(name)["transformer"] for name in ("ltx-2-19b", "ltx-2.3-22b", "ltx-2.5-22b"))
    assert "caption_proj_before_connector" not in old
    assert middle["caption_proj_before_connector"] is True
    assert (old["cross_attention_adaln"], middle["cross_attention_adaln"]) == (False, True)
    assert (middle.get("ff_bias", True), new["ff_bias"]) == (True, False)
    assert new["use_keyframes_abs_pos_embedding"] is True


def test_config_from_a_json_file_and_unknown_names(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"transformer": {"num_layers": 3}, "vae": null}')
    assert released_config(path) == {"transformer": {"num_layers": 3}, "vae": {}}
    with pytest.raises(ValueError, match=r"'ltx-9'.*ltx-2-19b, ltx-2.3-22b, ltx-2.5-22b"):
        released_config("ltx-9")
    path.write_text('{"num_layers": 3}')
    with pytest.raises(ValueError, match="expected an object with the key 'transformer'"):
        released_config(path)
