import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ltx_titan.weights import (
    check_fits,
    load_parameters,
    quantized_forms,
    read_metadata,
    refuse_quantized,
    stored_weights,
)
from tests.processes import run_ranks
from tests.weights.quantized_file import FORMS, quantize

KEY = "model.diffusion_model.block.to_q.weight"
CPU = torch.device("cpu")


def weight_of(rows=160, columns=96):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, rows)[:, None]


def write(path, form, spoil=lambda stored, header: None):
    stored, values, header = quantize(
        {KEY: weight_of(), "plain.bias": torch.ones(3)}, form, lambda module: "to_" in module
    )
    spoil(stored, header)
    save_file(stored, path, header)
    return path, values[KEY]


@pytest.mark.parametrize("form", FORMS)
def test_any_part_of_a_weight_is_dequantized_by_the_formula_of_its_format(tmp_path, form):
    path, expected = write(tmp_path / "file.safetensors", form)
    weights = stored_weights(read_metadata(path))
    assert weights.keys() == {KEY, "plain.bias"}
    assert weights[KEY].shape == (160, 96)
    with safe_open(path, "pt") as file:
        for rows, columns in (
            (slice(0, 160), slice(0, 96)),
            (slice(37, 131), slice(0, 96)),
            (slice(5, 9), slice(7, 50)),
        ):
            found = weights[KEY].read(file, (rows, columns), CPU)
            torch.testing.assert_close(found, expected[rows, columns], rtol=1e-6, atol=0)
    assert quantized_forms(read_metadata(path)) == {form: 1}


def test_a_plain_fp8_cast_has_no_scale(tmp_path):
    path, _ = write(tmp_path / "file.safetensors", "fp8", lambda stored, _: stored.pop(KEY + "_scale"))
    with safe_open(path, "pt") as file:
        found = stored_weights(read_metadata(path))[KEY].read(file, (slice(0, 160), slice(0, 96)), CPU)
        assert torch.equal(found, file.get_tensor(KEY).float())


def test_a_layout_may_be_declared_by_a_tensor(tmp_path):
    def move(stored, header):
        header.clear()
        text = json.dumps({"format": "nvfp4"}).encode()
        stored[KEY.replace("weight", "comfy_quant")] = torch.tensor(list(text), dtype=torch.uint8)

    path, expected = write(tmp_path / "file.safetensors", "nvfp4", move)
    weight = stored_weights(read_metadata(path))[KEY]
    assert weight.problem == ""
    with safe_open(path, "pt") as file:
        torch.testing.assert_close(weight.read(file, (slice(0, 3), slice(0, 96)), CPU), expected[:3], rtol=1e-6, atol=0)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.block = torch.nn.Module()
        self.block.to_q = torch.nn.Linear(96, 160, bias=False)


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("nvfp4", lambda stored, header: header.clear(), "NVFP4 without a declared layout"),
        ("nvfp4", lambda stored, header: stored.pop(KEY + "_scale_2"), "has no weight_scale_2"),
        ("nvfp4", lambda s, h: s.update({KEY + "_scale": s[KEY + "_scale"][:160]}), r"expected F8_E4M3 \[256, 8\]"),
        (
            "fp8",
            lambda s, h: s.update({KEY + "_scale": torch.ones(160, 1)}),
            r"F32 \[160, 1\], expected a single number",
        ),
        ("fp8", lambda s, h: s.update({KEY: torch.ones(160, 96, dtype=torch.int8)}), "is I8, expected one of"),
    ],
)
def test_ambiguous_formats_are_refused(tmp_path, form, spoil, message):
    path, _ = write(tmp_path / "file.safetensors", form, spoil)
    with pytest.raises(ValueError, match=message):
        check_fits(Model(), path)


@pytest.mark.parametrize("form", FORMS)
def test_full_fine_tuning_does_not_start_from_rounded_weights(tmp_path, form):
    path, _ = write(tmp_path / "file.safetensors", form)
    with pytest.raises(ValueError, match=rf'mode = "full" needs unrounded weights, found 1 {form}.*"lora"'):
        refuse_quantized(read_metadata(path))
    save_file({KEY: weight_of()}, path)
    refuse_quantized(read_metadata(path))


def load_sharded(path, expected):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    for split in (False, True):
        with torch.device("meta"):
            model = Model().bfloat16()
        mesh = init_device_mesh("cpu", (1, 2) if split else (2, 1), mesh_dim_names=("dp", "tp"))
        if split:
            parallelize_module(model.block, mesh["tp"], {"to_q": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        model.to_empty(device="cpu")
        load_parameters(model, path)
        assert torch.equal(model.block.to_q.weight.full_tensor(), expected.bfloat16())


def test_ranks_read_their_own_rows_and_columns(tmp_path):
    path, expected = write(tmp_path / "file.safetensors", "nvfp4")
    run_ranks(load_sharded, 2, path, expected)
