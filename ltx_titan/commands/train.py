"""`ltx-titan train`: checks a job, and starts its ranks; `run_train.sh` ends in the same command."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ltx_titan.commands.push import push_finished
from ltx_titan.common.options import Overrides, Positional, placeholder
from ltx_titan.config import load_job

DESCRIPTION = """\
Train a job, or resume it: the same command continues from the newest complete checkpoint. --section.key=value overrides
single values of the job. One process is started for each visible GPU.

environment:
  NGPU          processes on this node     (default: the visible GPUs, or 1)
  NNODES        nodes of the job           (default: 1); with more, on every node also
  NODE_RANK     number of this node        (default: 0)
  MASTER_ADDR   address of node 0          (default: localhost)
  MASTER_PORT   a free port on node 0      (default: 29500)
  MAX_RESTARTS  times that ranks are started again after one has failed; they resume  (default: 0)

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
    # Here, because torch takes seconds to import and `--help` does without it.
    from ltx_titan import launch

    arguments = launch.torchrun_arguments(options.job, options.overrides, os.environ)
    launch.check_nodes(arguments)
    # Every rank checks the job as well; here an error costs no start of ranks and is reported once.
    job = load_job(options.job, options.overrides)
    status = launch.launch(arguments)
    if status == 0 and (os.environ.get("NODE_RANK") or "0") == "0":
        push_finished(job)
    return status
