"""Over two ranks of FSDP2, everything equals one rank: base, training, state on disk and exported files."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh

from ltx_titan.checkpoint import TrainingState, latest_complete, load_state, module_tensors, save_state
from ltx_titan.lora import apply_lora, export_lora, export_merged, init_lora_, is_adapter, load_base, load_lora
from ltx_titan.parallel.fsdp import apply_fsdp
from tests.lora.adapted import loss_of, settings, transformer, write_checkpoint
from tests.processes import run_ranks

FORMS = {
    "float32": {"targets": ["all_attention", "v2v"]},
    "bfloat16": {"base_dtype": "bfloat16", "targets": ["video"], "dora": True},
    "int8": {"base_dtype": "int8", "targets": ["video"]},
    "int4": {"base_dtype": "int4", "targets": ["video"], "dora": True},
    "float8": {"base_dtype": "float8", "targets": ["video"]},
}
DTYPES = {"int8": torch.int8, "int4": torch.uint8, "float8": torch.uint8}


def build(folder, form):
    """A sharded model that computes in float32, with its base and first adapters."""
    model = transformer("meta")
    apply_lora(model, settings(**FORMS[form]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    apply_fsdp(model, model.transformer_blocks, mesh, torch.float32)
    model.to_empty(device="cpu")
    load_base(model, folder / "base.safetensors")
    init_lora_(model, 1)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        (loss / dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model):
    return {name: t.full_tensor().clone() for name, t in module_tensors(model).items()}


def work(folder: Path, form: str):
    """Trains two steps, saves, trains one more; leaves what it found in the folder."""
    size = dist.get_world_size()
    out = folder / form / str(size)
    out.mkdir(parents=True, exist_ok=True)
    model, optimizer = build(folder, form)
    before = whole(model)
    losses = train(model, optimizer, 2)
    state = TrainingState(model, [optimizer], select=is_adapter)
    save_state(out / "checkpoint", 2, state)
    export_merged(model, folder / "base.safetensors", out / "merged.safetensors")
    if "dora" not in FORMS[form]:
        export_lora(model, out / "adapter.safetensors", dtype=torch.float32)
    losses += train(model, optimizer, 1)
    after = whole(model)
    for name, parameter in model.named_parameters():
        assert is_adapter(name) == parameter.requires_grad
        assert is_adapter(name) or torch.equal(before[name], after[name])
        assert not is_adapter(name) or parameter.dtype == torch.float32
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "base": before, "after": after}, out / "found.pt")


def resume(folder: Path, form: str, saved_by: int):
    """Goes on from the state that another number of ranks saved."""
    model, optimizer = build(folder, form)
    path = latest_complete(folder / form / str(saved_by) / "checkpoint")
    load_state(path, TrainingState(model, [optimizer], select=is_adapter))
    losses = train(model, optimizer, 1)
    after = whole(model)
    if "dora" not in FORMS[form]:
        load_lora(model, folder / form / str(saved_by) / "adapter.safetensors")
        export_lora(model, folder / form / "again.safetensors", dtype=torch.float32)
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "after": after}, folder / form / "resumed.pt")


def run_all(folder: Path):
    for form in FORMS:
        work(folder, form)
        dist.barrier()


def resume_all(folder: Path, saved_by: int):
    for form in FORMS:
        resume(folder, form, saved_by)
        dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    write_checkpoint(path / "base.safetensors")
    run_ranks(run_all, 1, path)
    run_ranks(run_all, 2, path)
    run_ranks(resume_all, 1, path, 2)
    return path


def close(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_base_and_training_equal_one_rank(folder, form):
    one, two = (torch.load(folder / form / str(size) / "found.pt") for size in (1, 2))
    for name, tensor in one["base"].items():
        assert torch.equal(two["base"][name], tensor), name
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    close(one["after"], two["after"])
    assert one["losses"][2] < one["losses"][0]


@pytest.mark.parametrize("form", DTYPES)
def test_a_quantised_base_stays_quantised(folder, form):
    base = torch.load(folder / form / "2" / "found.pt")["base"]
    data = [tensor for name, tensor in base.items() if name.endswith(".qdata")]
    assert len(data) == 2 * 28
    assert {tensor.dtype for tensor in data} == {DTYPES[form]}


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_with_another_number_of_ranks(folder, form):
    unbroken = torch.load(folder / form / "2" / "found.pt")
    resumed = torch.load(folder / form / "resumed.pt")
    torch.testing.assert_close(resumed["losses"], unbroken["losses"][2:], rtol=1e-5, atol=0)
    close(unbroken["after"], resumed["after"])


@pytest.mark.parametrize("form", FORMS)
def test_files_do_not_depend_on_the_number_of_ranks(folder, form):
    names = ["merged"] if "dora" in FORMS[form] else ["merged", "adapter"]
    for name in names:
        close(*(load_file(folder / form / str(size) / f"{name}.safetensors") for size in (1, 2)))
    if "adapter" in names:
        close(load_file(folder / form / "2" / "adapter.safetensors"), load_file(folder / form / "again.safetensors"))
