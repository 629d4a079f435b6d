import json
import logging
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ltx_titan.metrics import MetricsLogger, StepMetrics, read_metrics

KEYS = [
    "step",
    "loss",
    "loss_video",
    "loss_audio",
    "grad_norm",
    "lr",
    "step_time_s",
    "tokens_per_s",
    "tflops_per_gpu",
    "mfu",
    "peak_mem_gib",
]


def run(folder, steps, resumed_step=0, **changes):
    writer = MetricsLogger(folder, total_steps=9, resumed_step=resumed_step)
    for step in steps:
        writer.log(StepMetrics(step, **({"loss": float(step), "lr": 1e-4} | changes)))
    return writer


def logged_steps(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")]


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_line_has_every_key_at_once_and_null_for_what_is_unknown(tmp_path):
    run(tmp_path, [1])  # not closed: a killed job's file must be complete too
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert list(record) == KEYS
    assert (record["loss"], record["mfu"]) == (1.0, None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_numbers_become_null_and_a_warning(tmp_path, caplog, value):
    with caplog.at_level(logging.WARNING):
        run(tmp_path, [4], grad_norm=value)
    assert "Step 4: grad_norm = " in caplog.text
    (record,) = (json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "metrics.jsonl").open())
    assert record["grad_norm"] is None
    assert record["loss"] == 4


def test_resume_drops_later_lines_and_an_unfinished_one(tmp_path):
    run(tmp_path, [1, 2, 3, 4]).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    run(tmp_path, [3], resumed_step=2, loss=30.0).close()

    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert scalars(tmp_path, "loss/total") == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_job_that_died_before_its_first_checkpoint_starts_a_new_file(tmp_path):
    run(tmp_path, [1, 2]).close()
    run(tmp_path, [1]).close()
    assert logged_steps(tmp_path) == [1]


def test_a_damaged_line_in_the_middle_is_reported_by_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2.*nonsense"):
        read_metrics(path)


def test_tensorboard_tags_are_grouped_and_extras_keep_theirs(tmp_path):
    writer = run(tmp_path, [1], grad_norm=0.5, mfu=0.25, peak_mem_gib=3.0, extra={"loss/video_sigma_0.00-0.25": 2.0})
    writer.close()
    assert scalars(tmp_path, "optim/grad_norm") == [(1, 0.5)]
    assert scalars(tmp_path, "perf/mfu") == [(1, 0.25)]
    assert scalars(tmp_path, "mem/peak_gib") == [(1, 3.0)]
    assert scalars(tmp_path, "loss/video_sigma_0.00-0.25") == [(1, 2.0)]
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss/video_sigma_0.00-0.25"] == 2.0


def test_a_full_disk_at_the_end_leaves_nothing_open(tmp_path):
    writer = run(tmp_path, [1])
    board = writer.tensorboard
    writer._file.close()
    with Path("/dev/full").open("a") as full:
        writer._file = full
        with pytest.raises(OSError, match="No space left"):
            writer.log(StepMetrics(2, loss=2.0, lr=1e-4))
        # What could not be written is tried again.
        with pytest.raises(OSError, match="No space left"):
            writer.close()
    assert board.all_writers is None, "still open"
    assert writer.tensorboard is None
    writer.close()


def test_ranks_that_are_not_writers_write_nothing(tmp_path, capsys):
    writer = MetricsLogger(tmp_path / "job", total_steps=9, is_writer=False)
    writer.log(StepMetrics(1, loss=1.0))
    writer.close()
    assert not (tmp_path / "job").exists()
    assert capsys.readouterr().out == ""
