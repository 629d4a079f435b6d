"""`heartbeat.json` in the dump folder: what a run is doing, for monitors that cannot read its console.

Replaced at every logged step and whenever the phase changes, so its age shows whether the run still moves. A reader
sees one whole record or none.
"""

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Literal

from ltx_titan.common.files import write_text

logger = logging.getLogger(__name__)

FILE = "heartbeat.json"

Phase = Literal["starting", "training", "validating", "saving", "exporting", "finished", "stopped", "failed"]


class Heartbeat:
    """The record of one run. A disk that is full or gone costs the record, never the run.

    Args:
        folder: the dump folder.
        is_writer: False on all ranks but 0: every method then does nothing.
    """

    def __init__(self, folder: Path, *, is_writer: bool) -> None:
        self._path = folder / FILE
        self._is_writer = is_writer
        self._step = 0
        self._loss: float | None = None
        self._phase: Phase = "starting"
        self._is_broken = False

    def step(self, step: int, loss: float | None = None) -> None:
        """Records a finished step and, where it was logged, its loss."""
        self._step = step
        self._loss = loss if loss is not None and isfinite(loss) else None
        self.set_phase("training")

    @contextmanager
    def phase(self, phase: Phase) -> Iterator[None]:
        """Records a phase and its end; an error leaves the phase in the file."""
        before = self._phase
        self.set_phase(phase)
        yield
        self.set_phase(before)

    def set_phase(self, phase: Phase) -> None:
        """Records what the run does from now on."""
        self._phase = phase
        if not self._is_writer:
            return
        record = {
            "step": self._step,
            "loss": self._loss,
            "phase": phase,
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            write_text(self._path, json.dumps(record) + "\n")
        except OSError as error:
            if not self._is_broken:
                logger.warning("%s: %s. Training continues without it.", self._path, error.strerror or error)
            self._is_broken = True
