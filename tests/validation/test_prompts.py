"""Contexts of prompts are cached with all that they are made with."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_titan.validation.prompts import prompt_contexts


def encode(nano, folder, text_encoder, **options):
    return prompt_contexts(
        ["a hill"],
        checkpoint_path=nano,
        text_encoder_path=text_encoder,
        cache_folder=folder / "cache",
        device="cpu",
        dtype=torch.float32,
        **options,
    )["a hill"][0]


def test_another_text_encoder_at_the_same_path_is_noticed(nano, tmp_path):
    encoder = Path(shutil.copytree(nano.parent / "text_encoder", tmp_path / "text_encoder"))
    first = encode(nano, tmp_path, encoder)
    assert torch.equal(encode(nano, tmp_path, encoder), first)
    weights = next(encoder.glob("*.safetensors"))
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    os.utime(weights, ns=(1, 1))
    second = encode(nano, tmp_path, encoder)
    assert not torch.equal(second, first)
    # Without an encoder, the newest: a resumed job does not need one.
    assert torch.equal(encode(nano, tmp_path, None), second)
    assert torch.equal(encode(nano, tmp_path, tmp_path / "gone"), second)


def test_prompts_pass_the_connectors_of_the_job(nano, tmp_path):
    encoder = nano.parent / "text_encoder"
    with safe_open(nano, "pt") as file:
        names = [name for name in file.keys() if "connector" in name]  # noqa: SIM118
        connectors = {name: 2 * file.get_tensor(name) for name in names}
    # Without a config, which is that of the checkpoint.
    save_file(connectors, tmp_path / "connectors.safetensors")
    own = encode(nano, tmp_path, encoder)
    assert not torch.equal(encode(nano, tmp_path, encoder, connectors_path=tmp_path / "connectors.safetensors"), own)


def test_a_damaged_cache_is_made_again(nano, tmp_path, caplog):
    encoder = nano.parent / "text_encoder"
    first = encode(nano, tmp_path, encoder)
    [path] = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"prompt 'a hill' is not in .*cache; set it to the folder"):
        encode(nano, tmp_path, None)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(encode(nano, tmp_path, encoder), first)
    assert f"{path}: damaged, its prompt is encoded again" in caplog.text
