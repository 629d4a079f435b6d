"""torchrun with a short ending: a worker that failed has said why, and thirty lines about its launcher hide that.

Takes torchrun's own arguments: `python -m ltx_titan.launch --nproc-per-node 8 ... -m ltx_titan.train job.toml`.

SIGUSR1, with which a scheduler announces the end of a job's time, is passed on to the workers: they save after the step
they are in, and end. torchrun itself would die of it.
"""

import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Runs torchrun; returns the exit code of the worker that failed first."""
    signal.signal(signal.SIGUSR1, _pass_on)
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"[ltx_titan] rank {rank} failed first of this node's (exit code {failure.exitcode}); its message is "
            "above. If it lost its connection to another rank, that one's node has the reason.",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


def _pass_on(number: int, frame: object) -> None:
    """Sends a signal to all child processes."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(main())
