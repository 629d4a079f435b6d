"""The scaling benchmark on two ranks, its cases, and its report on rows that this test writes."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from ltx_titan.benchmarks import scaling, train
from ltx_titan.benchmarks.measure import write_rows
from ltx_titan.benchmarks.predicted import describe
from ltx_titan.benchmarks.scaling_cases import Case, all_cases, predict
from ltx_titan.benchmarks.scaling_report import collect, table
from ltx_titan.cli import main
from ltx_titan.common.hardware import GIB, GPUS
from tests.processes import run_ranks
from tests.shapes import TINY_23

JOB = Path(__file__).parents[2] / "docs" / "benchmarks" / "ltx23_full_step.toml"
# Widths that float8 accepts, because every case is planned; only those named are run.
SHAPE = TINY_23 | {"in_channels": 128, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
CLIP = ("--data.synthetic.width=64", "--data.synthetic.height=64", "--data.synthetic.num_frames=9")
ON_A_CPU = (*CLIP, "--training.steps=2", "--training.dtype=float32", "--compile.enable=false", "--data.num_workers=0")
H100 = GPUS["h100"]


def write_job(folder: Path, num_layers: int) -> Path:
    """The benchmark's job on a transformer of few channels."""
    (folder / "tiny.json").write_text(json.dumps({"transformer": SHAPE | {"num_layers": num_layers}}))
    path = folder / "job.toml"
    path.write_text(JOB.read_text().replace("ltx-2.3-22b", str(folder / "tiny.json")))
    return path


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    return write_job(tmp_path_factory.mktemp("scaling"), num_layers=2)


@pytest.fixture(scope="module")
def cases(job) -> list[Case]:
    return all_cases(job, H100)


def rows_of(job: Path, cases: list[Case], columns: tuple[int, ...], slower: float = 1.0) -> list[dict]:
    """Rows as the program writes them, of a machine that takes `slower` times the estimate on more than one GPU."""
    rows = []
    for case in cases:
        for gpus, found in predict(job, case, columns, H100).items():
            factor = slower if gpus > 1 else 1.0
            rows.append(
                {
                    "device": "NVIDIA H100",
                    "torch": "2.11.0",
                    "triton": "3.6.0",
                    "commit": "0000000",
                    "ranks": gpus,
                    "case": case.name,
                    "gpu": "h100",
                    "settings": case.settings(gpus, 8),
                    "estimate": describe(found),
                    "step_time_s": found.step_time_s * factor,
                    "tokens_per_s_per_gpu": found.tokens_per_s / factor,
                    "mfu": found.mfu / factor,
                    "peak_mem_gib": found.memory.peak / GIB,
                }
            )
    return rows


def column(argv: list[str], fails: str) -> int:
    """The program on one rank; cases with the setting `fails` run out of memory."""

    def limited(job: Path, overrides: list[str], device: torch.device) -> dict:
        if fails in overrides:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return measure(job, overrides, device)

    measure = train.measure
    with patch.object(train, "measure", limited):
        return scaling.main(argv)


def test_a_column_survives_a_failure_and_continues_where_it_ended(job, tmp_path):
    out = tmp_path / "rows.jsonl"
    command = [str(job), "--out", str(out), "--gpu", "h100", *ON_A_CPU, "--cases", "weak full bf16 4k*", "strong LoRA*"]
    assert run_ranks(column, 2, command, "--activation_checkpoint.mode=budget") == [1, 1]
    weak, strong = scaling.read_rows(out)
    assert "out of memory" in weak["error"]
    assert strong["step_time_s"] > 0 < strong["estimate"]["step_time_s"]
    assert strong["degrees"]["cp"] == 2
    # A row of another column stays, a measured case is not run again (it would fail), a failed one is.
    alone = {**strong, "ranks": 1}
    write_rows(out, [alone, weak, strong])
    assert run_ranks(column, 2, command, "--activation_checkpoint.mode=full") == [0, 0]
    rows = {(row["ranks"], row["case"]): row for row in scaling.read_rows(out)}
    assert (rows.pop((1, strong["case"])), rows.pop((2, strong["case"]))) == (alone, strong)
    (again,) = rows.values()
    assert again["global_batch_size"] == 2
    assert "error" not in again


def test_cases_that_are_named_are_those_of_the_whole_column(job, cases):
    for pattern, count in (("*LoRA bf16 4k*", 2), ("strong*", 2), ("hsdp full*", 1)):
        found = all_cases(job, H100, names=[pattern])
        assert len(found) == count
        assert found == [case for case in cases if case in found]


def test_a_gpu_has_the_same_work_in_every_column(job, cases):
    assert {case.family for case in cases} == {"weak", "strong", "hsdp"}
    assert {(case.mode, case.precision, case.tokens) for case in cases if case.family == "weak"} == {
        (mode, precision, tokens)
        for mode in ("full", "LoRA")
        for precision in ("bf16", "float8")
        for tokens in ("4k", "8k", "16k")
    }
    for case in cases:
        found = predict(job, case, (1, 2, 8, 64), H100)
        assert all(one.setup.gpus == gpus for gpus, one in found.items())
        work = {one.flops / (one.setup.gpus if case.family != "strong" else 1) for one in found.values()}
        assert max(work) == pytest.approx(min(work)), case.name
        assert len({one.setup.levels for one in found.values()}) == 1, case.name


def test_depth_is_what_one_gpu_can_train_and_all_blocks_run_where_they_fit(tmp_path):
    job = write_job(tmp_path, num_layers=12)
    whole = Case("strong", "full", "bf16", "16k", 12)
    half = predict(job, replace(whole, layers=6), (1,), H100)[1].memory.needed
    # A GPU on which half of the blocks fit, with the share of memory that is left free.
    small = replace(H100, memory=half / 0.94 + 1)
    found = {case.name: case for case in all_cases(job, small)}
    assert not found["weak full bf16 16k, 6 layers"].is_whole
    assert found["weak full bf16 16k, 12 layers"].is_whole
    assert found["weak LoRA bf16 16k, 12 layers"].is_whole
    with pytest.raises(ValueError, match="pass --layers"):
        all_cases(job, small, overrides=("--model.num_layers=3",))


def test_the_report_computes_efficiency_from_measured_columns_only(job, cases):
    chosen = [cases[0], next(case for case in cases if case.family == "strong")]
    lines = collect(rows_of(job, chosen, (1, 2, 8), slower=1.25), job, H100, None, ())
    weak, strong = (line for line in lines if line.rows)
    assert weak.efficiency(1, measured=True) == 1.0
    assert weak.efficiency(2, measured=True) == pytest.approx(0.8 * weak.efficiency(2, measured=False))
    assert weak.efficiency(4, measured=True) is None
    text = table(lines, H100)
    assert "Missing columns: 4 GPUs." in text
    (four,) = (line for line in text.splitlines() if line.startswith(f"| {weak.case.name} | 4 |"))
    assert four.split(" | ")[2] == "missing"
    (two,) = (line for line in text.splitlines() if line.startswith(f"| {weak.case.name} | 2 |"))
    assert "| +25% |" in two
    speedup = strong.estimates[1].step_time_s / strong.estimates[8].step_time_s / 1.25
    assert f"{speedup:.2f} x" in text
    # Without the first column there is nothing to refer to.
    assert replace(weak, rows={8: weak.rows[8]}).efficiency(8, measured=True) is None
    failed = {**weak.rows[2], "error": "OutOfMemoryError: CUDA out of memory"}
    del failed["step_time_s"]
    assert "failed: OutOfMemoryError" in table([replace(weak, rows={1: weak.rows[1], 2: failed})], H100)


def test_rows_that_do_not_belong_to_the_table_are_refused(job, cases):
    (row,) = rows_of(job, cases[:1], (1,))
    with pytest.raises(ValueError, match="pass the --layers"):
        collect([{**row, "case": "weak full bf16 4k, 5 layers"}], job, H100, None, ())
    other = {**row, "ranks": 2, "settings": [*row["settings"], "--training.steps=2"]}
    with pytest.raises(ValueError, match="expected the same settings"):
        collect([row, other], job, H100, None, ())


def test_without_rows_the_command_writes_predictions_and_a_plot(job, tmp_path):
    out, plot = tmp_path / "scaling.md", tmp_path / "scaling.png"
    command = ["bench", "scaling", str(tmp_path / "none.jsonl"), str(job), "--out", str(out), "--plot", str(plot)]
    assert main(command) == 1  # the kind of GPU is not known
    assert main([*command, "--gpu", "h100"]) == 0
    text = out.read_text()
    assert "Missing columns: 1, 2, 4, 8 GPUs." in text
    assert text.count("| weak ") == 12
    assert "512 GPUs" in text
    assert "no stragglers" in text
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_more_nodes_cost_efficiency_and_long_clips_less_of_it():
    found = {}
    for tokens in ("4k", "16k"):
        case = Case("weak", "full", "bf16", tokens, 48, budget=20.0)
        speeds = [one.tokens_per_s for one in predict(JOB, case, (8, 64, 512), H100).values()]
        assert speeds == sorted(speeds, reverse=True)
        found[tokens] = speeds[-1] / speeds[0]
    assert 0.5 < found["4k"] < 0.97
    assert found["16k"] > found["4k"]
