"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`."""

import faulthandler
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from ltx_titan.checkpoint import remove_leftovers
from ltx_titan.common.failure import is_lost_peer, report_error
from ltx_titan.common.files import claimed, remove_temporaries
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.ranks import StalledError, rank_and_size
from ltx_titan.config import load_job
from ltx_titan.parallel.join import check_environment
from ltx_titan.plan import plan_job
from ltx_titan.train.dump_folder import check_dump_folder, is_finished
from ltx_titan.train.trainer import Trainer
from ltx_titan.validation.training import check_validation_files

logger = logging.getLogger("ltx_titan")

_STDERR = 2  # the descriptor: there may be no such object, or one without a file
CLOSING_S = 30.0
"""For a rank that has failed to free its graphs and leave its process groups."""


def run() -> NoReturn:
    """Body of a rank's process: runs `main` and ends the process with its exit code.

    A rank that has failed ends without what the interpreter and the libraries do at the end: its device may wait for a
    rank that is gone, and CUDA's own cleaning up would wait for the device.
    """
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    if code == 0:
        sys.exit(0)
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # closed, or nobody reads it
                stream.flush()
    finally:
        os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line; returns the exit code (docs/reliability.md).

    Leaves the process groups, but for those in which it has lost a rank.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    set_up_logging()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    folder = Path()
    trainer: Trainer | None = None
    has_lost_rank = False
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
            trainer = Trainer(plan)
            trainer.train()
    except Exception as error:
        has_lost_rank = isinstance(error, StalledError) or is_lost_peer(error)
        if not report_error(error, folder):
            traceback.print_exc()
        if dist.is_initialized() and not has_lost_rank:
            # The device and NCCL finish what they have started, and other ranks may not. Ends the process, after its
            # stacks.
            faulthandler.dump_traceback_later(CLOSING_S, exit=True, file=_STDERR)
        return 1
    finally:
        try:
            if dist.is_initialized() and not has_lost_rank:
                if trainer is not None:
                    trainer.close()
                dist.destroy_process_group()
        finally:
            faulthandler.cancel_dump_traceback_later()
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
