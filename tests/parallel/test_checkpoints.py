"""Weights under tensor parallelism, read from a file; state and its resume are in tests/test_parallel_jobs.py."""

import pytest
import torch
from safetensors.torch import save_file

from ltx_titan.config import Degrees
from ltx_titan.parallel.mesh import build_mesh
from ltx_titan.weights import TRANSFORMER, load_parameters
from tests.golden_cases import load_case
from tests.parallel.harness import Case, build, named, whole
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
