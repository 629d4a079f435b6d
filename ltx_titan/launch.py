"""`ltx-titan train`: starts the ranks of a job with torchrun; `run_train.sh` ends in the same command.

torchrun is changed in two ways. A failed worker has logged its reason, which thirty lines of torchrun's own report
would bury, so they shrink to one. And SIGUSR1, by which a scheduler announces the end of a job's time, is forwarded to
the workers, which save and stop after their current step; torchrun alone would die of it.
"""

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from ltx_titan.common.options import Overrides, Positional, placeholder

DESCRIPTION = """\
Train a job, or resume it: the same command continues from the newest complete checkpoint. --section.key=value overrides
single values of the job. One process is started for each visible GPU.

environment:
  NGPU          processes on this node     (default: the visible GPUs, or 1)
  NNODES        nodes of the job           (default: 1); with more, on every node also
  NODE_RANK     number of this node        (default: 0)
  MASTER_ADDR   address of node 0          (default: localhost)
  MASTER_PORT   a free port on node 0      (default: 29500)

examples:
  ltx-titan train job.toml
  ltx-titan train job.toml --training.steps=2000 --optimizer.lr=1e-4
  NGPU=4 ltx-titan train job.toml
  NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 ltx-titan train job.toml
"""


@dataclass(frozen=True)
class TrainOptions:
    """Options of `ltx-titan train`."""

    job: Annotated[Positional[Path], placeholder("JOB.toml")]
    """Job file. Add --section.key=value to override single values."""

    overrides: Overrides = ()


def run(options: TrainOptions) -> int:
    """Trains on all ranks of this node; returns the exit code of the worker that failed first, or 0."""
    # Larger segments: long jobs with several shapes otherwise run out of memory to fragmentation.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return launch(torchrun_arguments(options.job, options.overrides, os.environ))


def torchrun_arguments(job: Path, overrides: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Command line of torchrun for a job.

    Args:
        job: job file.
        overrides: `--section.key=value` of the job.
        environment: NGPU, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT; empty values count as unset.

    Raises:
        ValueError: there are several nodes and no MASTER_ADDR.
    """
    # Scripts of schedulers often export variables that are empty.
    values = {name: value for name, value in environment.items() if value}
    nodes = values.get("NNODES", "1")
    if nodes != "1":
        if "MASTER_ADDR" not in values:
            raise ValueError(f"MASTER_ADDR is not set, and NNODES is {nodes}; set it to the address of node 0.")
        rendezvous = ["--node-rank", values.get("NODE_RANK", "0"), "--master-addr", values["MASTER_ADDR"]]
        rendezvous += ["--master-port", values.get("MASTER_PORT", "29500")]
    elif "MASTER_PORT" in values:
        rendezvous = ["--master-addr", values.get("MASTER_ADDR", "localhost"), "--master-port", values["MASTER_PORT"]]
    else:
        # A port that the system chooses, so that several jobs can share a node.
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    processes = values.get("NGPU") or str(max(torch.cuda.device_count(), 1))
    arguments = ["--nnodes", nodes, "--nproc-per-node", processes, *rendezvous]
    # Only rank 0 writes to the console; all ranks write to files as well.
    arguments += ["--local-ranks-filter", "0", "--role", "rank", "--tee", "3"]
    return [*arguments, "-m", "ltx_titan.train", str(job), *overrides]


def launch(arguments: Sequence[str]) -> int:
    """Runs torchrun; returns the exit code of the worker that failed first, or 0."""
    # torchrun handles SIGTERM, SIGINT, SIGHUP and SIGQUIT; the default action of SIGUSR1 would end it.
    signal.signal(signal.SIGUSR1, _forward)
    try:
        torchrun(list(arguments))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"[ltx_titan] rank {rank} was the first of this node to fail (exit code {failure.exitcode}); its message "
            "is above. If it lost the connection to another rank, see the log of that rank's node.",
            file=sys.stderr,
        )
        # A negative code is the signal that ended the worker; shells report it as 128 + signal.
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _forward(number: int, frame: object) -> None:
    """Sends a signal to all child processes."""
    # Of all threads: the kernel lists a child under the thread that started it.
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            os.kill(int(child), number)
