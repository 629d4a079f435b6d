import gzip
import json
import logging

import torch

from ltx_titan.metrics import profile_steps


def run(folder, last, **settings):
    with profile_steps(folder, **settings) as before_step:
        for step in range(1, last + 1):
            before_step(step)
            with torch.profiler.record_function(f"marked step {step}"):
                torch.ones(4).sum()
    return sorted(path.name for path in folder.glob("profile/*"))


def marked(path):
    with gzip.open(path, "rt") as file:
        names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
    return sorted(name for name in names if name.startswith("marked"))


def test_exactly_the_window_is_recorded(tmp_path):
    assert run(tmp_path, 6, first_step=3, steps=2, rank=1) == ["steps-3-4-rank-1.json.gz"]
    assert marked(tmp_path / "profile" / "steps-3-4-rank-1.json.gz") == ["marked step 3", "marked step 4"]


def test_a_job_that_ends_in_the_window_writes_what_it_has(tmp_path):
    assert run(tmp_path, 2, first_step=2, steps=5) == ["steps-2-6-rank-0.json.gz"]
    assert marked(tmp_path / "profile" / "steps-2-6-rank-0.json.gz") == ["marked step 2"]


def test_off_writes_nothing(tmp_path):
    assert run(tmp_path, 3, first_step=None) == []


def test_memory_history_without_cuda_is_said_to_be_missing(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, 2, first_step=1, steps=1, memory=not torch.cuda.is_available())
    assert ("CUDA only" in caplog.text) == (not torch.cuda.is_available())
