"""Over two ranks of FSDP2, everything equals one rank: base, training, state on disk and exported files."""

import pytest
import torch
import torch.distributed as dist

from ltx_titan.config import Degrees
from tests.lora.adapted import same_bits
from tests.lora.runs import FORMS, check_equal, check_resumed, prepare, resume, work
from tests.processes import run_ranks

BYTES = {"int8": 1, "int4": 0.5, "float8": 1}


def train_all(folder):
    size = dist.get_world_size()
    for form in FORMS:
        work(folder, form, f"fsdp{size}", Degrees(dp_shard=size))
        dist.barrier()
    if size == 2:
        work(folder, "float32", "streamed", Degrees(dp_shard=2), slots=1)


def resume_all(folder):
    for form in FORMS:
        resume(folder, form, "fsdp2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = prepare(tmp_path_factory.mktemp("sharded"), ["fsdp1", "fsdp2", "streamed"])
    run_ranks(train_all, 1, path)
    run_ranks(train_all, 2, path)
    run_ranks(resume_all, 1, path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_equal_one(folder, form):
    check_equal(folder, form, "fsdp1", "fsdp2")
    losses = torch.load(folder / form / "fsdp2" / "found.pt")["losses"]
    assert losses[-1] < losses[0]


def test_streamed_weights_change_no_bit_on_two_ranks(folder):
    found, expected = (torch.load(folder / "float32" / name / "found.pt") for name in ("streamed", "fsdp2"))
    assert found["losses"] == expected["losses"]
    for kind in ("base", "after"):
        assert all(same_bits(tensor, expected[kind][name]) for name, tensor in found[kind].items())


@pytest.mark.parametrize("form", BYTES)
def test_a_quantized_base_stays_quantized(folder, form):
    base = torch.load(folder / form / "fsdp2" / "found.pt")["base"]
    data = [tensor for name, tensor in base.items() if name.endswith(".qdata")]
    weights = torch.load(folder / "float32" / "fsdp2" / "found.pt")["base"]
    shape = weights["transformer_blocks.0.attn1.to_q.base.weight"].shape
    assert len(data) == 2 * 28
    assert base["transformer_blocks.0.attn1.to_q.base.qdata"].nbytes == BYTES[form] * shape.numel()


@pytest.mark.parametrize("form", FORMS)
def test_a_run_resumes_on_another_number_of_ranks(folder, form):
    check_resumed(folder, form, "fsdp2")
