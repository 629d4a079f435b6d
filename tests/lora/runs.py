"""Trains adapters on a mesh and saves everything that the tests compare to a folder."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from ltx_titan.build import give_storage
from ltx_titan.checkpoint import TrainingState, latest_complete, load_state, save_state
from ltx_titan.common.tensors import without_wrappers
from ltx_titan.config import Degrees
from ltx_titan.lora import adapter_weights, apply_lora, init_lora_, is_adapter, load_base
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.mesh import build_mesh
from ltx_titan.parallel.stream import WeightStream
from ltx_titan.weights import export_lora, export_merged, load_lora, module_tensors
from tests.lora.adapted import loss_of, same_bits, settings, transformer, write_checkpoint

LR = 1e-2
FORMS = {
    "float32": {"targets": ["all_attention", "v2v"]},
    "bfloat16": {"base_dtype": "bfloat16", "targets": ["video"], "dora": True},
    "int8": {"base_dtype": "int8", "targets": ["video"]},
    "int4": {
        "base_dtype": "int4",
        "targets": ["v2v"],
        "ranks": [{"match": ["feed_forward"], "rank": 2}, {"blocks": [1, 1], "rank": 6, "alpha": 3.0}],
    },
    "float8": {"base_dtype": "float8", "targets": ["video"], "dora": True},
}
# DoRA needs whole rows, which tensor parallelism shards by columns.
SPLITTABLE = [form for form in FORMS if "dora" not in FORMS[form]]


def build(folder, form, degrees, split=lambda model, mesh: None, slots=0):
    """A sharded model that computes in float32, with its base and first adapters; `split` applies other plans.

    With `slots` its frozen weights are streamed.
    """
    model = transformer("meta")
    apply_lora(model, settings(**FORMS[form]))
    mesh = build_mesh("cpu", degrees)
    split(model, mesh)
    stream = WeightStream(model.transformer_blocks, slots) if slots else None
    streamed = stream.parameters() if stream else set()
    apply_fsdp(model, model.transformer_blocks, mesh.fsdp, torch.float32, streamed=streamed)
    give_storage(model, torch.device("cpu"), offloaded=False)
    load_base(model, folder / "base.safetensors")
    init_lora_(model, 1)
    if stream:
        stream.start(torch.device("cpu"))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)


def train(model, optimizer, degrees, steps):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        (loss / degrees.dp).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model):
    # Frozen weights of one rank are plain tensors.
    tensors = module_tensors(model).items()
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in tensors}


def work(folder: Path, form: str, name: str, degrees: Degrees, *split: Callable, slots: int = 0):
    """Trains two steps, saves, trains one more; saves losses and weights under `name`."""
    out = folder / form / name
    model, optimizer = build(folder, form, degrees, *split, slots=slots)
    before = whole(model)
    losses = train(model, optimizer, degrees, 2)
    state = TrainingState(model, [optimizer], select=is_adapter)
    save_state(out / "checkpoint", 2, state)
    export_merged(adapter_weights(model), folder / "base.safetensors", out / "merged.safetensors")
    if "dora" not in FORMS[form]:
        export_lora(adapter_weights(model), out / "adapter.safetensors", dtype=torch.float32)
    losses += train(model, optimizer, degrees, 1)
    after = whole(model)
    for name, parameter in model.named_parameters():
        name = without_wrappers(name)
        assert is_adapter(name) == parameter.requires_grad
        assert is_adapter(name) or same_bits(before[name], after[name])
        assert not is_adapter(name) or parameter.dtype == torch.float32
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "base": before, "after": after}, out / "found.pt")


def resume(folder: Path, form: str, saved_by: str):
    """Resumes, on one rank, from the state that another mesh saved."""
    model, optimizer = build(folder, form, Degrees())
    out = folder / form / saved_by
    load_state(latest_complete(out / "checkpoint"), TrainingState(model, [optimizer], select=is_adapter))
    losses = train(model, optimizer, Degrees(), 1)
    after = whole(model)
    if "dora" not in FORMS[form]:
        load_lora(adapter_weights(model), out / "adapter.safetensors")
        export_lora(adapter_weights(model), out / "again.safetensors", dtype=torch.float32)
    torch.save({"losses": losses, "after": after}, out / "resumed.pt")


def prepare(folder: Path, names: list[str]) -> Path:
    """Writes the base and makes a folder for each run in `names`."""
    write_checkpoint(folder / "base.safetensors")
    for form in FORMS:
        for name in names:
            (folder / form / name).mkdir(parents=True)
    return folder


def adapters_of(found):
    return {name: tensor for name, tensor in found["after"].items() if is_adapter(name)}


def close_after_adamw(one, two):
    """AdamW divides by the gradient's size, so an element with a near-zero gradient can move in either direction."""
    assert one.keys() == two.keys()
    differences = torch.cat([(two[name].float() - one[name].float()).abs().flatten() for name in one])
    assert differences.max() <= 2 * LR * 3
    assert (differences > 1e-2 * LR).float().mean() <= 1e-3


def check_equal(folder: Path, form: str, expected: str, found: str):
    """Base, losses, weights and files of two runs."""
    one, two = (torch.load(folder / form / name / "found.pt") for name in (expected, found))
    for name, tensor in one["base"].items():
        assert same_bits(two["base"][name], tensor), name
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    close_after_adamw(adapters_of(one), adapters_of(two))
    for file in ("merged",) if "dora" in FORMS[form] else ("merged", "adapter"):
        close_after_adamw(*(load_file(folder / form / name / f"{file}.safetensors") for name in (expected, found)))


def check_resumed(folder: Path, form: str, saved_by: str):
    """Compares the run that one rank resumed from the state of another mesh with the uninterrupted one."""
    out = folder / form / saved_by
    unbroken, resumed = torch.load(out / "found.pt"), torch.load(out / "resumed.pt")
    torch.testing.assert_close(resumed["losses"], unbroken["losses"][2:], rtol=1e-5, atol=0)
    close_after_adamw(adapters_of(unbroken), adapters_of(resumed))
    if "dora" not in FORMS[form]:
        saved, again = (load_file(out / f"{file}.safetensors") for file in ("adapter", "again"))
        for name, tensor in saved.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=0, msg=name)
