"""run_train.sh and `ltx-titan train` as on a cluster: two nodes on loopback, SIGUSR1, a dead node."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from ltx_titan import launch
from ltx_titan.checkpoint import latest_complete
from ltx_titan.cli import main
from ltx_titan.launch import torchrun_arguments
from tests.jobs import curve, read_run, train, write_job

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 600  # only ends a hang

pytestmark = pytest.mark.distributed


def start(job: Path, *overrides: str, log: Path, **environment: object) -> subprocess.Popen:
    """Starts the launcher of one node."""
    settings = {"PYTHON": sys.executable, "OMP_NUM_THREADS": 1, **environment}
    with log.open("w") as out:
        return subprocess.Popen(
            [ROOT / "run_train.sh", job, *overrides],
            env=os.environ | {key: str(value) for key, value in settings.items()},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def two_nodes(job: Path, *overrides: str) -> Iterator[list[subprocess.Popen]]:
    """Starts two launchers of one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"NGPU": 1, "NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    nodes = [start(job, *overrides, log=log_of(job, n), NODE_RANK=n, **common) for n in (0, 1)]
    try:
        yield nodes
    finally:
        for node in nodes:
            kill_all(node)


def log_of(job: Path, node: int) -> Path:
    return job.parent / f"node-{node}.log"


def kill_all(node: subprocess.Popen) -> None:
    """Kills launcher and workers, as a power failure does."""
    try:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    for process in processes:
        process.kill()
    node.wait()


def wait_for_step(job: Path, step: int = 1) -> None:
    metrics, deadline = job.parent / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not (metrics.is_file() and metrics.read_text().count("\n") >= step):
        assert time.monotonic() < deadline, log_of(job, 0).read_text()[-3000:]
        time.sleep(0.2)


def test_environment_variables_become_arguments_of_torchrun():
    arguments = torchrun_arguments(Path("job.toml"), ["--training.steps=3"], {"NGPU": "4"})
    assert arguments[:4] == ["--nnodes", "1", "--nproc-per-node", "4"]
    assert arguments[arguments.index("--redirects") + 1] == "1:3,2:3,3:3"
    assert arguments[-4:] == ["-m", "ltx_titan.train", "job.toml", "--training.steps=3"]
    several = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NGPU": ""}
    joined = " ".join(torchrun_arguments(Path("job.toml"), [], several))
    assert "--node-rank 1 --master-addr node0 --master-port 29500" in joined
    alone = " ".join(torchrun_arguments(Path("job.toml"), [], {"MASTER_PORT": "1234"}))
    assert "--master-addr localhost --master-port 1234" in alone
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        torchrun_arguments(Path("job.toml"), [], {"NNODES": "2"})


def test_a_thread_that_ends_while_a_signal_is_passed_on_ends_nothing_else(monkeypatch):
    ended = [Path("/proc/self/task/0/children")]
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([*ended, Path("/proc/thread-self/children")]))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in launch._children()
        child.communicate(b"\n")


@pytest.mark.parametrize(
    ("arguments", "prepared_by"),
    [
        ([], ["make-nano", "make-clips", "process-dataset"]),
        (["--training.steps=3"], ["make-nano", "make-clips", "process-dataset"]),
        (["train_configs/nano_concept.toml"], ["make-nano", "make-clips", "process-dataset"]),
        (
            [str(ROOT / "tests/../train_configs/debug.toml"), "--training.steps=3"],
            ["make-nano", "make-debug-dataset", "process-dataset"],
        ),
        (["train_configs/ltx23_lora_t2v.toml"], []),
    ],
)
def test_the_demo_prepares_its_data_however_it_is_named(arguments, prepared_by, tmp_path):
    # Plays Python: it has everything, and records what it is asked to run.
    python, asked = tmp_path / "python", tmp_path / "asked"
    python.write_text(
        f'#!/bin/sh\n[ "${{1##*/}}" = bootstrap.py ] && echo "$0" || echo "$@" >> {shlex.quote(str(asked))}\n'
    )
    python.chmod(0o755)
    subprocess.run([ROOT / "run_train.sh", *arguments], cwd=ROOT, env={**os.environ, "PYTHON": str(python)}, check=True)
    typed = [line.split()[2:] for line in asked.read_text().splitlines()]
    assert [words[0] for words in typed] == [*prepared_by, "train"]
    assert ("--training.steps=3" in typed[-1]) == ("--training.steps=3" in arguments)


def test_train_command_passes_overrides_and_exit_codes(tmp_path, nano_path, data_root, capfd):
    job = write_job(tmp_path, nano_path, data_root, training__steps=100_000, checkpoint__enable=False)
    command = [sys.executable, "-m", "ltx_titan.cli", "train", str(job), "--training.steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NGPU": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert [line["step"] for line in read_run(job)] == [1]
    # What a newcomer sees: no warning of a library that nobody running a job can act on.
    assert done.stderr == ""
    assert "arning" not in done.stdout
    # Refused before a rank is started, hence in this process.
    assert main(["train", str(job), "--training.step=1"]) == 1
    assert "training.step" in "".join(capfd.readouterr())


def test_two_nodes_train_like_one_and_save_and_stop_at_a_signal_to_either(tmp_path, nano_path, data_root):
    settings = {"training__steps": 100_000}
    one = write_job(tmp_path / "one", nano_path, data_root, **settings, checkpoint__enable=False)
    expected = curve(train(one, 2, "--training.stop_at=3"))
    job = write_job(tmp_path / "two", nano_path, data_root, **settings)
    with two_nodes(job) as nodes:
        wait_for_step(job, 3)
        nodes[1].send_signal(signal.SIGUSR1)
        codes = [node.wait(TIMEOUT_S) for node in nodes]
    logs = [log_of(job, node).read_text() for node in (0, 1)]
    assert codes == [0, 0], logs[0][-3000:] + logs[1][-3000:]
    lines = read_run(job)
    torch.testing.assert_close(torch.tensor(curve(lines[:3])), torch.tensor(expected), rtol=1e-5, atol=0)
    assert latest_complete(job.parent / "run" / "checkpoint").name == f"step-{lines[-1]['step']}"
    assert "received SIGUSR1: saved and stopped after step" in "".join(logs)


def test_a_dead_node_ends_the_other_with_an_error(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=100_000, checkpoint__enable=False)
    with two_nodes(job) as nodes:
        wait_for_step(job)
        kill_all(nodes[1])
        assert nodes[0].wait(TIMEOUT_S) != 0
    log = log_of(job, 0).read_text()
    assert "closed by peer" in log or "reset by peer" in log, log[-3000:]
    assert "see the log of that rank's node" in log


def ranks_of(node: subprocess.Popen) -> list[psutil.Process]:
    ranks = []
    for process in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            ranks += [process] if "ltx_titan.train" in process.cmdline() else []
    return ranks


def test_a_rank_that_is_killed_before_it_joins_ends_the_other_node(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, checkpoint__enable=False)
    with two_nodes(job) as nodes:
        while not (ranks := ranks_of(nodes[1])):
            assert nodes[1].poll() is None, log_of(job, 1).read_text()
            time.sleep(0.05)
        ranks[0].kill()  # while it imports
        assert [node.wait(TIMEOUT_S) for node in nodes] == [1, 137]
    assert "rank 1 of 2 did not join, and will not: rank 1 ended with exit code -9" in log_of(job, 0).read_text()
