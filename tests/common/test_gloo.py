"""Gloo groups of a job have one worker thread: two corrupt the heap."""

import os
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from ltx_titan.common.gloo import use_one_gloo_thread

# With two threads this ended with SIGSEGV or SIGABRT before 64,000 operations in each of three runs.
_OPERATIONS_IN_FLIGHT = """
import torch
import torch.distributed as dist
from ltx_titan.parallel.mesh import init_distributed

init_distributed()
ops, x, group = torch.ops._c10d_functional, torch.ones(1), dist.group.WORLD.group_name
for _ in range(2_000):
    started = []
    for _ in range(32):
        started += [ops.all_reduce(x, "sum", group), ops.all_gather_into_tensor(x, 1, group)]
    for result in started:
        ops.wait_tensor(result)
print("done", flush=True)
"""


def test_operations_in_flight_corrupt_no_memory():
    done = subprocess.run(
        [sys.executable, "-c", _OPERATIONS_IN_FLIGHT],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "RANK"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done" in done.stdout


def test_new_groups_keep_their_time_out(monkeypatch):
    use_one_gloo_thread()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=70))
    try:
        groups = [dist.group.WORLD, dist.new_group([0], timeout=timedelta(seconds=80))]
        options = [group._get_backend(torch.device("cpu")).options for group in groups]
        assert [each._threads for each in options] == [1, 1]
        assert [each._timeout.total_seconds() for each in options] == [70, 80]
        x = torch.ones(3)
        dist.all_reduce(x, group=groups[1])
        assert x.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
