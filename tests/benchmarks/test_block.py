import json

import pytest

from ltx_titan.cli import main
from tests.shapes import TINY_23


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"transformer": TINY_23}))
    return path


def test_a_failing_provider_is_reported_and_the_others_are_measured(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "rows.jsonl"
    options = ["--shape", str(shape), "--tokens", "24", "--timesteps", "2", "--out", str(out)]
    status = main(["bench", "block", *options, "--providers", "triton", "torch"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 1
    assert [(row["provider"], row["timesteps"]) for row in rows] == [("triton", 2), ("torch", 2)]
    assert all("need a CUDA GPU" in row["error"] for row in rows if row["provider"] == "triton")
    # Times of steps this small are noise, so only their presence is checked.
    assert all(row["step_ms"] > 0 and "error" not in row for row in rows if row["provider"] == "torch")
    assert "FAILED" in capsys.readouterr().out
