"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`."""

from ltx_titan.common.logs import quiet_libraries

# torchao and torch warn while they are imported, before any function of ours can run.
quiet_libraries()

from ltx_titan.train.entry import main  # noqa: E402
from ltx_titan.train.trainer import Trainer  # noqa: E402

__all__ = ["Trainer", "main"]
