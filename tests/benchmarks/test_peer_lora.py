"""The peer of LoRA jobs, diffusers with PEFT's adapters, trains the same layers as the job."""

import json
from pathlib import Path

import torch

from ltx_titan.benchmarks.peer_lora import peer_model, time_steps
from ltx_titan.config import load_job
from ltx_titan.lora.targets import find_targets
from ltx_titan.plan import build_transformer, plan_job
from tests.shapes import TINY_23

SHAPE = TINY_23 | {"in_channels": 128, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16, "num_layers": 2}
JOB = Path(__file__).parents[2] / "docs" / "benchmarks" / "ltx23_lora_step.toml"


def test_the_peer_has_the_adapters_of_the_job_and_trains(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({"transformer": SHAPE}))
    small = ["--data.synthetic.width=64", "--data.synthetic.height=64", "--data.synthetic.num_frames=9"]
    plan = plan_job(load_job(JOB, [f"--model.shape={tmp_path / 'tiny.json'}", "--lora.rank=2", *small]), 1)
    model = peer_model(plan, torch.device("cpu"))
    layers = {name.partition(".lora_A")[0] for name, p in model.named_parameters() if ".lora_A" in name}
    ours = find_targets(build_transformer(plan.source, plan.modalities), plan.job.lora.targets)
    assert len(layers) == len(ours)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    rows = list(time_steps(plan, 4, torch.device("cpu")))
    assert [row["steps_timed"] for row in rows] == [0, 0, 0, 1]
    row = rows[-1]
    assert row["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert row["step_time_s"] > 0
