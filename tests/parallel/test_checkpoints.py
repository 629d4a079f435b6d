"""Weights and training state under tensor and context parallelism: read from a file, saved, resumed on another mesh."""

import pytest
import torch
from safetensors.torch import save_file

from ltx_titan.checkpoint import TrainingState, load_state, save_state
from ltx_titan.config import Degrees
from ltx_titan.parallel.mesh import build_mesh
from ltx_titan.weights import TRANSFORMER, load_parameters
from tests.golden_cases import load_case
from tests.parallel.harness import Case, adamw, build, fill, named, single, train_on, whole
from tests.processes import run_ranks

FSDP2_TP2, TP4 = Degrees(dp_shard=2, tp=2), Degrees(tp=4)


def _read_file(path) -> None:
    weights = load_case("av_22b").weights
    for degrees in (FSDP2_TP2, TP4):
        model = build(Case(degrees, "joint"), build_mesh("cpu", degrees))
        load_parameters(model, path)
        for name, parameter in named(model):
            assert torch.equal(whole(parameter), weights[name]), (degrees, name)


@pytest.mark.distributed
def test_every_rank_reads_its_part_of_an_official_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({TRANSFORMER.file_key(n): w for n, w in load_case("av_22b").weights.items()}, path)
    run_ranks(_read_file, 4, path)


def _resume(folder, expected) -> None:
    case, losses = Case(FSDP2_TP2, "first_frame"), []
    for step, degrees in enumerate((FSDP2_TP2, TP4)):
        case, mesh = Case(degrees, "first_frame"), build_mesh("cpu", degrees)
        model = build(case, mesh)
        fill(model)
        state = TrainingState(model, [adamw(model)])
        if step:
            with torch.no_grad():
                for _, parameter in named(model):
                    parameter.zero_()
            load_state(folder / f"step-{step}", state)
        losses += train_on(model, state.optimizers[0], case, mesh, steps=range(step, step + 1)).losses
        save_state(folder, step + 1, state)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.distributed
def test_training_resumes_under_other_degrees(tmp_path):
    run_ranks(_resume, 4, tmp_path, single("first_frame").losses)
