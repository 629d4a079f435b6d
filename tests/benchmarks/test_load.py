import json
import math

import pytest
import torch
from safetensors import safe_open

from ltx_titan.benchmarks import load
from ltx_titan.cli import main
from ltx_titan.model import LTXTransformer
from ltx_titan.nano.random_checkpoint import make_checkpoint
from ltx_titan.weights import check_fits, read_metadata
from tests.processes import run_ranks
from tests.shapes import TINY_23


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.json").write_text(json.dumps({"transformer": TINY_23 | {"in_channels": 128, "num_layers": 2}}))
    path = folder / "tiny.safetensors"
    assert main(["make-checkpoint", "--shape", str(folder / "tiny.json"), str(path)]) == 0
    return path


def test_a_random_checkpoint_is_read_like_an_official_one(made):
    metadata = read_metadata(made)
    with torch.device("meta"):
        model = LTXTransformer.from_config(metadata.transformer_config())
    check_fits(model, made)
    with safe_open(made, framework="pt") as file:
        block = "model.diffusion_model.transformer_blocks"
        q, k = (file.get_tensor(f"{block}.{n}.attn1.to_q.weight") for n in (0, 1))
        assert q.dtype == torch.bfloat16
        assert abs(q.float().std().item() * math.sqrt(q.shape[1]) - 1) < 0.2
        assert not torch.equal(q, k)
        assert (file.get_tensor(f"{block}.0.attn1.q_norm.weight") == 1).all()


def test_the_full_size_has_the_official_names_and_bytes(tmp_path, monkeypatch):
    """The file of 38 GB is not written: the check of free space fails first."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(ValueError, match=r"needs 37,97\d,\d{3},\d{3} bytes"):
        make_checkpoint(tmp_path / "full.safetensors", "ltx-2.3-22b")
    assert not list(tmp_path.iterdir())


def test_the_load_benchmark_writes_a_row_per_state_of_the_page_cache(made, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert run_ranks(load.main, 2, [str(made), "--out", str(out)]) == [0, 0]
    cold, warm = (json.loads(line) for line in out.read_text().splitlines())
    assert (cold["page_cache"], warm["page_cache"]) == ("cold", "warm")
    assert warm["cached_before_load"] == 1.0
    for row in (cold, warm):
        # load_s is the time of the slowest rank plus a barrier.
        assert row["load_s"] > 0.9 * max(rank["load_s"] for rank in row["ranks"]) > 0
        assert row["read_once_s"] > 0
        assert 0 < row["ranks"][1]["host_gib"] < 8
        assert row["weights_per_rank_gib"] * 2**30 == pytest.approx(made.stat().st_size, rel=0.3)  # 2 ranks, 4 bytes
