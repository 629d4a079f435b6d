"""The cache of encoded prompts: what it spares, and what it must not hide."""

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.validation.prompts import prompt_contexts

PROMPT = "Waves roll onto a beach; gulls cry."


@pytest.fixture
def encode(pack, tmp_path):
    def run(text_encoder_path=pack.text_encoder_path):
        return prompt_contexts(
            [PROMPT, PROMPT],
            checkpoint_path=pack.path,
            text_encoder_path=text_encoder_path,
            cache_folder=tmp_path / "cache",
            device="cpu",
            dtype=torch.float32,
        )[PROMPT]

    return run


def same(one, two):
    return all(a.equal(b) for a, b in zip(one, two, strict=True))


def test_a_resumed_job_needs_no_text_encoder(encode, tmp_path):
    first = encode()
    assert same(encode(None), first)
    assert same(encode(tmp_path / "gone"), first)
    # An entry of an earlier version, which does not name its encoder.
    (entry,) = (tmp_path / "cache").glob("*.pt")
    torch.save(list(first), entry)
    assert same(encode(), first)


def test_another_text_encoder_is_asked_again(encode, pack, tmp_path):
    first = encode()
    other = shutil.copytree(pack.text_encoder_path, tmp_path / "other")
    for path in other.glob("*.safetensors"):
        save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    changed = encode(other)
    assert not same(changed, first)
    assert same(encode(None), changed)
    assert same(encode(), first)


def test_a_damaged_entry_is_encoded_again(encode, tmp_path, caplog):
    first = encode()
    (entry,) = (tmp_path / "cache").glob("*.pt")
    entry.write_bytes(entry.read_bytes()[:200])
    with caplog.at_level(logging.WARNING):
        assert same(encode(), first)
    assert f"{entry}: cannot be read" in caplog.text
    entry.write_bytes(b"")
    with pytest.raises(ValueError, match=r"validation\.text_encoder_path is unset, but prompt 'Waves"):
        encode(None)
