"""Promises of docs/reliability.md that concern a whole run."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

from ltx_titan.common.failure import report_error
from ltx_titan.common.files import claimed
from ltx_titan.common.ranks import StalledError
from ltx_titan.config import AlertsSection, OptimizerSection, load_job
from ltx_titan.data import read_sample, write_sample
from ltx_titan.launch import check_nodes, torchrun_arguments
from ltx_titan.metrics import StepGuard
from ltx_titan.metrics.alerts import Alerts
from ltx_titan.optim import build_optimizers
from ltx_titan.parallel.join import check_address, check_environment, join, report_lost
from ltx_titan.train import main
from tests.jobs import NO_CHECKPOINTS, curve, train, write_dataset, write_job

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "text",
    [
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
        "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234",
    ],
)
def test_a_rank_that_lost_another_says_so_in_one_line(tmp_path, caplog, text):
    assert report_error(torch.distributed.DistNetworkError(text), tmp_path)
    assert "lost the connection to another rank" in caplog.text


def test_a_run_without_its_export_or_with_a_damaged_one_is_not_finished(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1)
    train(job)
    export = tmp_path / "run/export/transformer-step-1.safetensors"
    expected = export.read_bytes()
    export.rename(export.with_name(f"{export.name}.tmp.1.0123abcd"))  # killed before the rename
    (tmp_path / "run/checkpoint/step-9.incomplete").mkdir()
    assert main([str(job)]) == 0
    assert export.read_bytes() == expected
    assert [entry.name for entry in export.parent.iterdir()] == [export.name]
    assert [entry.name for entry in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]
    export.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert main([str(job)]) == 0
    assert f"is exported again: {export}: a weight in its bytes" in caplog.text
    assert export.read_bytes() == expected
    assert "settings changed" not in caplog.text
    assert main([str(job), "--checkpoint.export_dtype=bfloat16"]) == 0
    assert 'nothing is left to do with them: checkpoint.export_dtype: "float32" -> "bfloat16"' in caplog.text
    assert export.read_bytes() == expected


def test_damaged_renamed_and_copied_checkpoints_never_start_a_run_over(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=2, model__mode="lora", checkpoint__interval=1)
    train(job, 1, "--training.stop_at=1")
    folder = tmp_path / "run/checkpoint"
    # A copy under the name of a later step would be the newest one for ever.
    shutil.copytree(folder / "step-1", folder / "step-9")
    train(job)
    assert "step-9 cannot be used: trainer.json is of step 1; the folder was renamed or copied" in caplog.text
    assert (folder / "step-2").is_dir()
    for path in folder.glob("step-*/*.distcp"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main([str(job)]) == 1
    assert "found step-1, step-2, step-9, none of which can be used. Restore" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in before}
    folder.rename(tmp_path / "away")
    folder.touch()
    assert main([str(job)]) == 1
    assert f"expected a folder that can be written to, found: {folder} is a file" in caplog.text


def test_a_damaged_shard_of_the_only_checkpoint_starts_no_run_over(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=2, model__mode="lora", checkpoint__interval=1)
    train(job, 1, "--training.stop_at=1")
    (shard,) = (tmp_path / "run/checkpoint/step-1").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for message in ("There is no older one; move it away", "found step-1.damaged, none of which can be used"):
        # The second time as a restart by a scheduler would be.
        assert main([str(job)]) == 1
        assert message in caplog.text


def test_adapters_are_not_resumed_at_another_scale(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=2, model__mode="lora", checkpoint__interval=1)
    train(job, 1, "--training.stop_at=1")
    with pytest.raises(ValueError, match=r"step-1: its adapters were trained .* lora\.alpha: 32\.0 -> 8\.0.*adapter_"):
        train(job, 1, "--lora.alpha=8.0")


def test_an_update_that_overflows_is_neither_saved_nor_exported(tmp_path, nano_path, data_root, caplog, monkeypatch):
    def overflow(optimizers, *_):
        with torch.no_grad():
            next(iter(optimizers.parts[0].param_groups[0]["params"])).fill_(float("nan"))

    monkeypatch.setattr("ltx_titan.optim.build.Optimizers.step", overflow)
    settings = {"optimizer__in_backward": True, "training__local_batch_size": 4, "training__max_grad_norm": 0.0}
    assert main([str(write_job(tmp_path, nano_path, data_root, training__steps=1, **settings))]) == 1
    assert "step 1: model." in caplog.text
    assert "contains NaN or infinity" in caplog.text
    assert not (tmp_path / "run/export").exists()
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_learning_rate_above_1_is_refused(tmp_path, nano_path, data_root):
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        load_job(write_job(tmp_path, nano_path, data_root, optimizer__lr=1e39))


def test_a_dump_folder_has_one_user_who_is_named(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1)
    with claimed(tmp_path / "run"):
        assert main([str(job)]) == 1
    assert "is in use by process" in caplog.text
    assert " on " in caplog.text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def heartbeat(job: Path) -> dict:
    file = job.parent / "run" / "heartbeat.json"
    return json.loads(file.read_text()) if file.exists() else {"step": 0, "phase": "starting"}


def rank_of_job(job, rank, world_size, port, log):
    """A rank as torchrun starts it, in a forked process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    torch.set_num_threads(1)
    code = main([str(job)])
    os._exit(code)


def start_ranks(job: Path, ranks: int, world_size: int | None = None) -> list:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    logs = [job.parent / f"rank-{rank}.log" for rank in range(ranks)]
    processes = [
        context.Process(target=rank_of_job, args=(job, n, world_size or ranks, port, logs[n])) for n in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


@pytest.mark.distributed
def test_a_rank_that_hangs_is_named_and_the_stacks_of_the_others_are_kept(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=100_000, job__timeout_s=20.0)
    healthy, stopped = start_ranks(job, 2)
    try:
        while heartbeat(job)["step"] < 2:
            assert healthy.is_alive(), (tmp_path / "rank-0.log").read_text()
            time.sleep(0.05)
        os.kill(stopped.pid, signal.SIGSTOP)
        healthy.join(240)
        assert healthy.exitcode == 1
    finally:
        stopped.kill()
        healthy.kill()
    log = (tmp_path / "rank-0.log").read_text()
    assert re.search(r"waiting for rank 1, which does not answer .*, since \d+ s", log)
    assert re.search(r"no progress for \d+ s, waiting for rank 1, which does not answer", log)
    assert "timed out after 20 s (job.timeout_s), waiting for rank 1" in log
    assert "Traceback" not in log
    assert "in _train\n" in (tmp_path / "run/stacks/rank-0.txt").read_text()
    assert heartbeat(job)["phase"] == "failed"


# A rank that fails in a step. Its graphs and groups may wait for a device that waits for a lost rank, and what the
# interpreter does at the end takes forever, as CUDA's part of it does then.
FAILING_RANK = """
import sys, threading, time
import torch.distributed as dist
from ltx_titan.train import entry, trainer

def never():
    print("waits", file=sys.stderr, flush=True)
    time.sleep(1000)

def fail(self, batches, sums):
    self.micro_step.drop = never if WAITING == "graphs" else lambda: None
    raise ERROR

threading.Thread(target=time.sleep, args=(1000,)).start()
trainer.TrainStep.run, entry.CLOSING_S = fail, 1.0
if WAITING == "groups":
    dist.destroy_process_group = never
entry.run()
"""


@pytest.mark.parametrize(
    ("error", "waiting", "expected"),
    [
        ("trainer.StalledError('rank 1 is gone')", "groups", "rank 1 is gone"),
        ("RuntimeError('Connection closed by peer')", "graphs", "lost the connection to another rank"),
        ("FloatingPointError('the loss is NaN')", "groups", "the loss is NaN"),
        ("FloatingPointError('the loss is NaN')", None, "the loss is NaN"),
        ("KeyError('a bug')", "graphs", "Traceback.*a bug"),
    ],
)
def test_a_rank_that_fails_says_why_and_ends_whatever_waits(tmp_path, nano_path, data_root, error, waiting, expected):
    job = write_job(tmp_path, nano_path, data_root, **NO_CHECKPOINTS)
    program = FAILING_RANK.replace("ERROR", error).replace("WAITING", repr(waiting))
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    found = subprocess.run(
        [sys.executable, "-c", program, str(job)], env=environment, capture_output=True, text=True, timeout=240
    )
    text = found.stdout + found.stderr
    assert found.returncode == 1, text
    assert re.search(expected, text, re.DOTALL), text
    if "rank" in expected:
        # Nothing is to be finished with a rank that is gone.
        assert "waits" not in text, text
    elif waiting is not None:
        assert re.search(r"waits.*Timeout \(0:00:01\)!", text, re.DOTALL), text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2: expected less than WORLD_SIZE, which is 2"),
        (
            {"RANK": "0", "WORLD_SIZE": "0"},
            "WORLD_SIZE is '0'.*of at least 1",
        ),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000"},
            "MASTER_PORT is '70000'",
        ),
    ],
)
def test_wrong_numbers_of_ranks_are_refused_at_once(environment, message):
    with pytest.raises(ValueError, match=message):
        check_environment(environment)


def test_an_address_that_does_not_resolve_and_a_wrong_node_are_named(monkeypatch):
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "no-such-host.invalid"}
    monkeypatch.setattr("ltx_titan.launch.check_address", partial(check_address, limit_s=0))
    with pytest.raises(ValueError, match=r"MASTER_ADDR = 'no-such-host\.invalid'"):
        check_nodes(torchrun_arguments(Path("job.toml"), [], nodes))
    with pytest.raises(ValueError, match="NODE_RANK is '2' in the environment: expected a whole number from 0 to 1"):
        torchrun_arguments(Path("job.toml"), [], {**nodes, "NODE_RANK": "2"})
    check_nodes(torchrun_arguments(Path("job.toml"), [], {"NNODES": "1", "MASTER_ADDR": "no-such-host.invalid"}))


@pytest.mark.distributed
def test_a_rank_that_never_comes_is_named(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, job__timeout_s=5.0)
    alone = start_ranks(job, 1, world_size=2)[0]
    alone.join(240)
    assert alone.exitcode == 1
    assert "rank 1 of 2 did not join within 5 s" in (tmp_path / "rank-0.log").read_text()


def test_a_rank_whose_launcher_reports_its_end_is_not_awaited(monkeypatch, capfd):
    # As the launcher of the first node does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**address, "RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    report_lost("127.0.0.1", store.port, "rank 2 ended with exit code -9")
    with pytest.raises(StalledError, match=r"rank 1, 2, 3 of 4 did not join, and will not: rank 2 ended .* -9\."):
        join(timeout_s=600.0)
    # A first node that has ended as well is no further error, and nothing is printed.
    port = store.port
    del store
    capfd.readouterr()
    report_lost("127.0.0.1", port, "rank 2 ended with exit code -9")
    assert "".join(capfd.readouterr()) == ""


def write_overflowing_dataset(root: Path, nano_path: Path, clips: tuple[int, ...]) -> Path:
    """Six clips; the latents of some are finite, and their loss is not."""
    write_dataset(root, nano_path)
    for clip in clips:
        path = root / "latents" / f"clip_{clip}.pt"
        sample = read_sample(path, "video")
        write_sample(path, sample | {"latents": torch.full_like(sample["latents"], 1e30)})
    return root


SKIPPING = {"training__global_batch_size": 2, "training__steps": 4, "checkpoint__interval": 0}


@pytest.mark.distributed
def test_a_step_that_is_not_finite_is_skipped_on_every_mesh_and_after_a_resume(tmp_path, nano_path):
    root = write_overflowing_dataset(tmp_path / "data", nano_path, clips=(4,))
    settings = SKIPPING | {"training__steps": 6}  # so that steps follow those that are skipped
    straight = write_job(tmp_path / "straight", nano_path, root, **settings)
    lines = train(straight)
    skipped = [line["step"] for line in lines if line["loss"] is None]
    assert len(skipped) == 2  # one of the three batches of each epoch
    for step in skipped:
        record = json.loads((tmp_path / f"straight/run/skipped/step-{step}.json").read_text())
        assert "clip_4" in " ".join(record["samples"])
        assert len(record["samples"]) == 2
        assert (record["step"], record["batch"], record["seed"]) == (step, step - 1, 3)
    assert lines[-1]["optim/skipped_steps"] == len(skipped)
    parts = write_job(tmp_path / "parts", nano_path, root, **settings)
    train(parts, 1, f"--training.stop_at={skipped[0]}")
    assert curve(train(parts)) == curve(lines)
    weights = [tmp_path / name / "run/export/transformer-step-6.safetensors" for name in ("straight", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    sharded = train(write_job(tmp_path / "sharded", nano_path, root, **settings, **NO_CHECKPOINTS), 2)
    finite = [line for line in lines if line["loss"] is not None]
    assert [line["loss"] for line in sharded if line["loss"] is not None] == pytest.approx(
        [line["loss"] for line in finite], rel=1e-5
    )


def test_too_many_skipped_steps_in_a_row_end_the_run(tmp_path, nano_path, caplog):
    root = write_overflowing_dataset(tmp_path / "data", nano_path, clips=range(6))
    job = write_job(tmp_path, nano_path, root, training__max_skipped_steps=2, **SKIPPING)
    assert main([str(job)]) == 1
    assert "3 steps in a row would have to be skipped, training.max_skipped_steps is 2" in caplog.text
    assert sorted(path.name for path in (tmp_path / "run/skipped").iterdir()) == [
        f"step-{step}.json" for step in (1, 2, 3)
    ]


def test_a_spike_is_told_from_the_median_of_recent_steps_also_after_a_resume():
    guard = StepGuard(max_in_a_row=1, spike_factor=4.0)
    assert guard.judge(1e9, 1.0) is None  # too few steps to tell
    for _ in range(30):
        assert guard.judge(1.0, 2.0) is None
    resumed = StepGuard(max_in_a_row=1, spike_factor=4.0)
    resumed.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    for each in (guard, resumed):
        assert each.judge(3.9, 7.9) is None
        assert each.judge(1.0, 8.1) == "gradient norm 8.1, 4.0 times its recent median"
        assert not each.gives_up
        assert each.judge(4.1, 2.0) == "loss 4.1, 4.1 times its recent median"
        assert each.gives_up
        assert each.judge(1.0, 2.0) is None
        assert (each.in_a_row, each.total) == (0, 2)


def test_the_device_decides_as_the_host_does():
    guard = StepGuard(max_in_a_row=9, spike_factor=4.0)
    for figures in [(1.0, 2.0)] * 30 + [(4.0, 8.0), (4.0000005, 2.0), (1.0, 8.1), (math.nan, 2.0), (1.0, math.inf)]:
        is_broken = bool(guard.is_broken(torch.tensor(figures)))
        assert is_broken == (guard.judge(*torch.tensor(figures).tolist()) is not None), figures


def test_a_fused_update_is_skipped_on_the_device():
    weights = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    skipping, plain = (build_optimizers([("w", weight)], OptimizerSection(lr=0.1)) for weight in weights)
    assert skipping.can_skip
    for step, broken in enumerate((True, False, True, False)):
        gradient = torch.full((8,), math.nan if broken else float(step))
        weights[0].grad = gradient
        skipping.step(skip=torch.tensor(float(broken)))
        if not broken:
            weights[1].grad = gradient
            plain.step()
        assert torch.equal(*weights)
    assert not build_optimizers([("w", weights[0])], OptimizerSection(name="adafactor")).can_skip


def test_updates_in_the_backward_pass_cannot_be_skipped(tmp_path, nano_path, data_root):
    settings = {"optimizer__in_backward": True, "training__max_grad_norm": 0.0, "training__local_batch_size": 4}
    with pytest.raises(ValueError, match=r"training\.spike_factor"):
        load_job(write_job(tmp_path, nano_path, data_root, training__spike_factor=10.0, **settings))


class Receiver(BaseHTTPRequestHandler):
    bodies: ClassVar[list[dict]] = []

    def do_POST(self):
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_alerts_reach_a_webhook_and_a_command_and_a_broken_one_costs_nothing(tmp_path, nano_path, caplog, monkeypatch):
    root = write_overflowing_dataset(tmp_path / "data", nano_path, clips=range(6))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:{server.server_port}/secret")
    settings = SKIPPING | {"training__max_skipped_steps": 1, "alerts__webhook_variable": "HOOK"}
    settings["alerts__command"] = ["sh", "-c", f"cat >> {tmp_path}/alerts.txt"]
    job = write_job(tmp_path / "job", nano_path, root, **settings)
    assert main([str(job)]) == 1
    server.shutdown()
    server.server_close()
    # One of a kind, although two steps were skipped.
    assert sorted(body["event"] for body in Receiver.bodies) == ["failed", "spiking"]
    assert "FloatingPointError" in next(body["text"] for body in Receiver.bodies if body["event"] == "failed")
    assert (tmp_path / "alerts.txt").read_text().count('"event"') == 2
    written = [path.read_text(errors="replace") for path in (tmp_path / "job/run").rglob("*") if path.is_file()]
    assert not any("/secret" in text for text in [*written, caplog.text])

    alerts = Alerts(AlertsSection(webhook_variable="HOOK", command=("false",)), tmp_path, is_sender=True)
    alerts.send("finished", "", 1)  # nobody listens, and the command fails
    alerts.close()
    assert caplog.text.count("alert 'finished' could not be sent") == 2
    assert "/secret" not in caplog.text


def test_a_deterministic_job_gives_the_same_bits_twice(tmp_path, nano_path, data_root):
    def weights(name):
        job = write_job(tmp_path / name, nano_path, data_root, training__steps=2, job__deterministic=True)
        assert main([str(job)]) == 0
        assert torch.are_deterministic_algorithms_enabled()
        return (job.parent / "run/export/transformer-step-2.safetensors").read_bytes()

    try:
        assert weights("one") == weights("two")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("code", "seconds_left", "is_requeued"), [(0, 60, True), (0, 7200, False), (1, 60, False)])
def test_slurm_requeues_a_run_that_its_time_limit_has_stopped(tmp_path, code, seconds_left, is_requeued):
    def program(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    program("srun", f"exit {code}")
    program("squeue", f"date -d '+{seconds_left} seconds' +%Y-%m-%dT%H:%M:%S")
    program("scontrol", f'case $1 in show) echo node0;; *) echo "$@" >> {tmp_path}/requeued;; esac')
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_JOB_NUM_NODES": "1"}
    script = ROOT / "train_configs/slurm/train.sbatch"
    done = subprocess.run(["bash", script, "job.toml"], env=environment, capture_output=True, check=False)
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == is_requeued
