"""A damaged export is found when it is read; files of others, and what others make of ours, are read as before."""

import json
import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_titan.lora import adapter_weights
from ltx_titan.weights import (
    ExportTensor,
    check_contents,
    check_lora,
    digest,
    export_lora,
    export_merged,
    export_safetensors,
    extract_lora,
    fuse_lora,
    load_lora,
    load_parameters,
    read_lora,
    read_metadata,
    save_safetensors,
)
from tests.lora.adapted import adapted, settings, transformer, write_checkpoint

METADATA = {"config": json.dumps({"transformer": {"num_layers": 1}}), "model_version": "2.3.0"}


@pytest.fixture
def tensors(generator):
    return {f"w{i}": torch.randn(5 + i, 7, generator=generator).to(dtype) for i, dtype in enumerate(DTYPES)}


DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.int8)


@pytest.fixture(params=[48, 2**30], ids=["many-blocks", "one-block"])
def path(request, tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(digest, "_BLOCK_BYTES", request.param)
    save_safetensors(tmp_path / "export.safetensors", tensors, METADATA)
    # The size of a block is the file's own, not the reader's.
    monkeypatch.setattr(digest, "_BLOCK_BYTES", 4096)
    return tmp_path / "export.safetensors"


def contents(path):
    """Parts of the file that a reader uses: metadata besides the digest's entry, and the bytes of all tensors."""
    metadata = read_metadata(path)
    check_contents(path)
    data = {name: (t.dtype, t.shape, t.view(torch.uint8).tolist()) for name, t in load_file(path).items()}
    return {key: metadata.raw.get(key) for key in METADATA}, data


def stored_digest(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()[digest.DIGEST_KEY]


def test_every_flipped_bit_is_found_or_changes_nothing(path):
    content, before = path.read_bytes(), contents(path)
    data_start = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(0)
    entry = len('{"__metadata__": {"ltx_titan.crc32": "')
    bits = [(byte, bit) for byte in range(8 + entry) for bit in range(8)]
    bits += [(byte, rng.randrange(8)) for byte in range(8 + entry, data_start, 3)]
    bits += [(byte, rng.randrange(8)) for byte in range(data_start, len(content), 4)]
    messages = []
    for byte, bit in bits:
        damaged = bytearray(content)
        damaged[byte] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            after = contents(path)
        except ValueError as error:
            messages.append(str(error))
            continue
        # Only in the entry's own name, behind which no digest is found.
        assert 8 <= byte < 8 + entry, f"bit {bit} of byte {byte}"
        assert after == before, f"bit {bit} of byte {byte}"
    assert len(messages) > 400
    assert all(str(path) in message for message in messages)


def test_zeros_lost_blocks_and_an_exchanged_tensor_are_found(path, tensors):
    content = path.read_bytes()
    start = read_metadata(path).tensors["w2"].start
    for damaged in (content[:start] + bytes(len(content) - start), content[:-20] + content[-40:-20]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a weight in its bytes .* is not what was written"):
            check_contents(path)


def test_a_reader_of_some_tensors_does_not_read_the_others(path, request):
    if "one-block" in request.node.name:
        return
    content, metadata = bytearray(path.read_bytes()), read_metadata(path)
    last = max(metadata.tensors, key=lambda name: metadata.tensors[name].start)
    first = min(metadata.tensors, key=lambda name: metadata.tensors[name].start)
    content[-1] ^= 1
    path.write_bytes(content)
    check_contents(path, [metadata.range_of(first)])
    with pytest.raises(ValueError, match="not what was written"):
        check_contents(path, [metadata.range_of(last)])


def test_the_library_reads_the_file_and_other_writers_copy_its_metadata_without_harm(path, tensors):
    with safe_open(path, framework="pt") as file:
        copied = file.metadata()
        assert {name: torch.equal(file.get_tensor(name), value) for name, value in tensors.items()} == dict.fromkeys(
            tensors, True
        )
    assert METADATA.items() <= copied.items()
    # As a tool that merges or quantizes: other weights under the metadata of the file it has read.
    changed = {name: value + 1 for name, value in tensors.items()}
    save_file(changed, path, metadata=copied)
    check_contents(path)
    save_file(changed, path)
    check_contents(path)


def test_an_export_of_an_export_has_a_digest_of_its_own(path, tensors, tmp_path):
    again = tmp_path / "again.safetensors"
    changed = [ExportTensor(name, tuple(t.shape), t.dtype, t + 1) for name, t in tensors.items()]
    export_safetensors(again, changed, read_metadata(path).raw)
    check_contents(again)
    assert stored_digest(again) != stored_digest(path)
    content = bytearray(again.read_bytes())
    content[-1] ^= 1
    again.write_bytes(content)
    with pytest.raises(ValueError, match="not what was written"):
        check_contents(again)


def flip(path, key):
    """Flips the lowest bit of a tensor's first number: it stays finite and close to what it was."""
    content = bytearray(path.read_bytes())
    content[read_metadata(path).tensors[key].start] ^= 1
    path.write_bytes(content)
    return path


def own_checkpoint(folder):
    base = write_checkpoint(folder / "other.safetensors")
    save_safetensors(folder / "base.safetensors", load_file(base), read_metadata(base).raw)
    return folder / "base.safetensors"


WEIGHT = "model.diffusion_model.patchify_proj.weight"


@pytest.mark.parametrize(
    ("key", "read"),
    [
        (WEIGHT, lambda base, model, out: load_parameters(transformer(), base)),
        (WEIGHT, lambda base, model, out: export_merged(adapter_weights(model), base, out)),
        (
            "vae.decoder.conv.weight",
            lambda base, model, out: export_merged(adapter_weights(model), base, out, layout="complete"),
        ),
        (
            WEIGHT,
            lambda base, model, out: extract_lora(base.parent / "other.safetensors", base, 2, torch.device("cpu")),
        ),
    ],
    ids=["load", "merge", "copy", "extract"],
)
def test_a_damaged_base_is_neither_loaded_nor_copied_into_another_file(tmp_path, key, read):
    base, out = flip(own_checkpoint(tmp_path), key), tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"base\.safetensors: a weight .* is not what was written"):
        read(base, adapted(settings(targets=["attn1.to_q"])), out)
    assert not out.exists()


@pytest.mark.parametrize(
    "read",
    [
        lambda model, path: load_lora(adapter_weights(model), path),
        lambda model, path: check_lora(adapter_weights(model), path),
        lambda model, path: fuse_lora(transformer(), path),
        lambda model, path: read_lora(path),
    ],
    ids=["load", "check", "fuse", "info"],
)
def test_a_damaged_adapter_is_not_used(tmp_path, read):
    model, path = adapted(settings(targets=["attn1.to_q"])), tmp_path / "lora.safetensors"
    export_lora(adapter_weights(model), path)
    read(model, path)
    flip(path, "diffusion_model.transformer_blocks.0.attn1.to_q.lora_B.weight")
    with pytest.raises(ValueError, match=r"lora\.safetensors: a weight .* is not what was written"):
        read(model, path)
