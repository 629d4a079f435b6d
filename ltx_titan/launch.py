"""torchrun with a short ending: a worker that failed has said why, and thirty lines about its launcher hide that.

Takes torchrun's own arguments: `python -m ltx_titan.launch --nproc-per-node 8 ... -m ltx_titan.train job.toml`.
"""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main() -> int:
    """Runs torchrun; returns the exit code of the worker that failed first."""
    try:
        torchrun()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"[ltx_titan] rank {rank} failed first (exit code {failure.exitcode}); its message is above.",
            file=sys.stderr,
        )
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main())
