import json

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file

from ltx_titan.weights import (
    ExportTensor,
    export_safetensors,
    load_parameters,
    module_tensors,
    read_metadata,
    save_safetensors,
    transformer_tensors,
)
from tests.checkpoint.toy import LAYOUTS, full, toy
from tests.processes import run_ranks

PREFIX = "model.diffusion_model."
CONFIG = {"transformer": {"num_layers": 2}, "vae": {"patch_size": 4}}


def export_every_layout(folder):
    expected = {PREFIX + name: tensor for name, tensor in toy().state_dict().items()}
    for layout, shard in LAYOUTS.items():
        path = folder / f"{layout}.safetensors"
        module = shard(toy())
        export_safetensors(path, transformer_tensors(module, None), {"license": "x", "config": json.dumps(CONFIG)})
        written = load_file(path)
        assert written.keys() == expected.keys(), layout
        assert all(torch.equal(written[name], expected[name]) for name in expected), layout

        again = shard(toy(seed=1))
        load_parameters(again, path)
        for name, tensor in module_tensors(again).items():
            assert torch.equal(full(tensor), toy().state_dict()[name]), f"{layout}: {name}"


@pytest.mark.distributed
def test_export_has_official_names_and_reloads_bit_for_bit_under_every_layout(tmp_path):
    run_ranks(export_every_layout, 4, tmp_path)
    metadata = read_metadata(tmp_path / "fsdp.safetensors")
    assert metadata.config == CONFIG
    assert metadata.raw["license"] == "x"
    assert not list(tmp_path.glob("*.tmp*"))


def export_onto_a_failing_disk(folder):
    module = LAYOUTS["fsdp"](toy())

    def no_space():
        raise OSError("No space left on device")

    tensors = [ExportTensor(name, tuple(t.shape), t.dtype, t) for name, t in module_tensors(module).items()]
    tensors.insert(1, ExportTensor("unwritable", (1,), torch.float32, no_space))
    expected = OSError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(expected, match="No space left on device"):
        export_safetensors(folder / "model.safetensors", tensors, {})
    dist.barrier()
    assert not list(folder.iterdir())


@pytest.mark.distributed
def test_a_full_disk_is_an_error_on_every_rank_and_leaves_no_file(tmp_path):
    run_ranks(export_onto_a_failing_disk, 2, tmp_path)


def test_cast_on_export_and_mixed_dtypes_stay_readable(tmp_path):
    path = tmp_path / "mixed.safetensors"
    odd, wide = torch.randn(3).bfloat16(), torch.randn(2, 2, dtype=torch.float64)
    tensors = [
        ExportTensor("odd", (3,), torch.bfloat16, odd),
        ExportTensor("byte", (), torch.uint8, lambda: torch.tensor(7, dtype=torch.uint8)),
        ExportTensor("wide", (2, 2), torch.float32, wide.T),
    ]
    export_safetensors(path, tensors, {"format": "pt"})
    written = load_file(path)
    assert torch.equal(written["odd"], odd)
    assert torch.equal(written["wide"], wide.T.float())
    assert written["byte"] == 7


def test_a_name_given_twice_is_refused(tmp_path):
    tensor = ExportTensor("a", (1,), torch.float32, torch.ones(1))
    with pytest.raises(ValueError, match="two tensors are called 'a'"):
        export_safetensors(tmp_path / "x.safetensors", [tensor, tensor], {})


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    tensors = {"b": torch.randn(3).bfloat16(), "a": torch.randn(2, 2), "c": torch.arange(3), "d": torch.tensor(True)}
    metadata = {"version": "1", "config": "{}"}
    save_safetensors(tmp_path / "one.safetensors", tensors, metadata)
    reordered = dict(reversed(tensors.items())), dict(reversed(metadata.items()))
    save_safetensors(tmp_path / "two.safetensors", *reordered)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    written = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())


def test_export_too_large_for_the_disk_fails_before_writing(tmp_path):
    tensor = ExportTensor("huge", (10**9, 10**9), torch.float32, lambda: pytest.fail("must not be read"))
    with pytest.raises(ValueError, match="4,000,000,000,"):
        export_safetensors(tmp_path / "x.safetensors", [tensor], {})


def test_export_replaces_an_older_file_only_when_complete(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"older")

    def fail():
        assert path.read_bytes() == b"older"
        raise OSError("interrupted")

    with pytest.raises(OSError, match="interrupted"):
        export_safetensors(path, [ExportTensor("a", (1,), torch.float32, fail)], {})
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"older"
    export_safetensors(path, [ExportTensor("a", (1,), torch.float32, torch.ones(1))], {})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a") == 1
