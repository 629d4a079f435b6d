import json

import pytest

from ltx_titan.cli import main

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "apply_gated_attention": True,
    "cross_attention_adaln": True,
    "caption_proj_before_connector": True,
    "caption_projection_first_linear": False,
    "caption_proj_input_norm": False,
    "caption_projection_second_linear": False,
}


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"transformer": TINY}))
    return path


def test_a_failing_provider_is_reported_and_the_others_are_measured(shape, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "rows.jsonl"
    options = ["--shape", str(shape), "--tokens", "24", "--timesteps", "1", "2", "--out", str(out)]
    status = main(["bench", "block", *options, "--providers", "triton", "torch"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 1
    assert [(row["provider"], row["timesteps"]) for row in rows] == [
        ("triton", 1),
        ("torch", 1),
        ("triton", 2),
        ("torch", 2),
    ]
    assert all("need a CUDA GPU" in row["error"] for row in rows if row["provider"] == "triton")
    # Times of steps this small are noise, so only their presence is checked.
    assert all(row["step_ms"] > 0 and "error" not in row for row in rows if row["provider"] == "torch")
    assert "FAILED" in capsys.readouterr().out
