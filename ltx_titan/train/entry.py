"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ltx_titan.checkpoint import remove_leftovers
from ltx_titan.common.failure import report_error
from ltx_titan.common.files import claimed, remove_temporaries
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.ranks import rank_and_size
from ltx_titan.config import load_job
from ltx_titan.parallel.join import check_environment
from ltx_titan.plan import plan_job
from ltx_titan.train.dump_folder import check_dump_folder, is_finished
from ltx_titan.train.trainer import Trainer
from ltx_titan.validation.training import check_validation_files

logger = logging.getLogger("ltx_titan")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line; returns the exit code (docs/reliability.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    set_up_logging()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    folder = Path()
    try:
        check_environment(os.environ)
        # Checked before a process group exists: every rank finds the same error by itself, and none waits for another.
        if arguments[0].startswith("--"):
            raise ValueError(
                f"{arguments[0]}: expected the job file first, then overrides; put it behind the job file."
            )
        plan = plan_job(load_job(arguments[0], arguments[1:]), rank_and_size()[1])
        folder = plan.folder
        check_validation_files(plan)
        check_dump_folder(folder)
        if is_finished(plan):
            return 0
        with _claimed_by_rank_0(folder):
            Trainer(plan).train()
    except Exception as error:
        if not report_error(error, folder):
            raise
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


@contextmanager
def _claimed_by_rank_0(folder: Path) -> Iterator[None]:
    """Holds the dump folder, and clears it of files that a killed run was writing. The other ranks wait for rank 0."""
    if rank_and_size()[0] > 0:
        yield
        return
    with claimed(folder):
        for path in remove_temporaries(folder):
            logger.info("removed %s of an interrupted run", path)
        remove_leftovers(folder / "checkpoint")
        yield
