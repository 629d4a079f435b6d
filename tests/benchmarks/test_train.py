"""The training benchmark: what is in its file when it ends early, and the estimate beside a case."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from ltx_titan.benchmarks.predicted import describe, in_words, predict_plan
from ltx_titan.benchmarks.train import STARTED
from ltx_titan.common.hardware import GIB, GPUS
from ltx_titan.config import load_job
from ltx_titan.plan import plan_job
from tests.fault_runs import wait_for
from tests.shapes import TINY_23

JOB = Path(__file__).parents[2] / "docs" / "benchmarks" / "ltx23_full_step.toml"
SHAPE = TINY_23 | {"in_channels": 128, "num_layers": 2}
CLIP = ("--data.synthetic.width=64", "--data.synthetic.height=64", "--data.synthetic.num_frames=9")
ON_A_CPU = (*CLIP, "--compile.enable=false", "--training.global_batch_size=1", "--data.num_workers=0")


def test_a_terminated_benchmark_ends_at_once_and_keeps_the_rows_of_all_cases_that_have_begun(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps({"transformer": SHAPE}))
    common = " ".join([f"--model.shape={tmp_path / 'tiny.json'}", *ON_A_CPU])
    out, log = tmp_path / "rows.jsonl", tmp_path / "log.txt"
    command = [sys.executable, "-m", "ltx_titan.benchmarks.train", str(JOB), "--out", str(out), f"--all={common}"]
    command += ["--case=short: --training.steps=2", "--case=wrong: --model.nothing=1"]
    command += ["--case=endless: --training.steps=100000", "--case=never:"]
    with log.open("w") as file:
        program = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        wait_for(lambda: program.poll() is not None or "5/100000" in log.read_text(), "the endless case does not begin")
        program.send_signal(signal.SIGTERM)
        assert program.wait(timeout=60) == -signal.SIGTERM, log.read_text()
    finally:
        program.kill()
    short, wrong, endless = [json.loads(line) for line in out.read_text().splitlines()]
    assert short["step_time_s"] > 0
    assert "model.nothing" in wrong["error"]
    assert (endless["case"], endless["error"]) == ("endless", STARTED)
    assert all({"device", "torch", "triton", "commit", "command"} <= row.keys() for row in (short, wrong, endless))


def test_a_case_is_estimated_as_the_trainer_sets_it_up():
    overrides = ["--activation_checkpoint.mode=budget", "--model.num_layers=12", "--training.global_batch_size=1"]
    plan = plan_job(load_job(JOB, overrides), 1)
    found = predict_plan(plan, GPUS["h200"])
    assert found.fits
    assert len(found.setup.levels) == 12
    assert describe(found)["peak_mem_gib"] == found.memory.peak / GIB
    assert "FIT" not in in_words(found)
    assert "DOES NOT FIT" in in_words(predict_plan(plan, replace(GPUS["h200"], memory=24 * GIB)))
