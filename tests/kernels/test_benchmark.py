import json

import pytest

from ltx_titan.benchmarks.kernel_cases import CASES
from ltx_titan.cli import main

# Tries the command; on a GPU it would be a benchmark.
pytestmark = pytest.mark.runs_on("interpreter")


def test_every_case_is_checked_and_a_failing_one_is_reported(tmp_path, monkeypatch, capsys):
    def fail(inputs):
        raise RuntimeError("out of memory")

    monkeypatch.setitem(CASES, "residual", fail)
    out = tmp_path / "rows.jsonl"
    chosen = ["norm_modulate, 2 timesteps", "residual", "qk_norm_rope"]
    options = ["--parts", "check", "--kernels", *chosen, "--out", str(out)]
    status = main(["bench", "kernels", *options])
    rows = {row["kernel"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert status == 1
    assert "out of memory" in rows["residual"]["error"]
    assert rows["norm_modulate, 2 timesteps"]["largest_error"] < 1e-5
    assert rows["qk_norm_rope"]["largest_error"] < 1e-5
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["sweep", "time"])
def test_a_part_prints_its_table(part, tmp_path, monkeypatch, capsys):
    # The interpreter takes minutes at the width of the model.
    monkeypatch.setattr("ltx_titan.benchmarks.kernels.WIDTHS", dict.fromkeys(CASES, 256))
    out = tmp_path / "rows.jsonl"
    # The forward of the second prefetches by itself, so its launches have no stages.
    chosen = ["norm_modulate", "qk_norm_rope"]
    options = ["--parts", part, "--kernels", *chosen, "--tokens", "4", "--out", str(out)]
    assert main(["bench", "kernels", *options]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows
    assert all(row.get("forward_ms") or row["ms"]["4"] > 0 for row in rows)
    assert {row["kernel"] for row in rows} == set(chosen)
    printed = capsys.readouterr().out
    assert all(name in printed for name in chosen)
