"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`."""

from ltx_titan.train.entry import main
from ltx_titan.train.trainer import Trainer

__all__ = ["Trainer", "main"]
