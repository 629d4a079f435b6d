"""Errors that end a rank: who reports them, and in how many words."""

import json
import logging
import os
import sys
import time
import traceback
from pathlib import Path

from ltx_titan.common.files import describe_os_error
from ltx_titan.common.ranks import PeerError, StalledError
from ltx_titan.common.secrets import redacted

logger = logging.getLogger("ltx_titan")

# How gloo, NCCL and the store report that another process is gone.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "connection was likely closed",
    "broken pipe",
    "remote process exited",
    "communicator was aborted",
)


class RunError(RuntimeError):
    """An error of the outside world whose message is complete, so that no traceback is printed."""


def report_error(error: Exception, folder: Path) -> bool:
    """Reports the error that ends this rank; returns whether that was all, False for a bug that needs its traceback.

    Rank 0 logs it. Any other rank writes it to the error file that torchrun sets up for each process, from which
    `ltx-titan train` prints it: the console shows rank 0 alone, and an error may occur on another rank only. A rank
    that merely lost another one, or was informed of its error, has nothing to add to that rank's report.

    Args:
        error: any exception.
        folder: where the run writes, for errors that name no path.
    """
    if is_lost_peer(error):
        logger.error("lost the connection to another rank (%s); its own message gives the reason", _one_line(error))
        return True
    if isinstance(error, PeerError):
        logger.error("%s", error)
        return True
    message = None
    if isinstance(error, OSError):
        message = describe_os_error(error, folder)
    elif isinstance(error, (ValueError, FloatingPointError, RunError, StalledError)):
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
    _write_error_file(message or "".join(traceback.format_exception(error)).rstrip())
    if message is None:
        return False
    logger.error("%s", message)
    return True


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of the job is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in _LOST_PEER)


def _write_error_file(message: str) -> None:
    # As text: the error may be that it is not a number.
    rank, path = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_ERROR_FILE")
    message = redacted(message)
    if path is None:
        if rank != "0":
            print(f"[rank {rank}] {message}", file=sys.stderr)
        return
    # In the form that torchrun reads. A disk that is full now must not replace the error by another one.
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    try:
        Path(path).write_text(json.dumps(content), encoding="utf-8")
    except OSError:
        print(f"[rank {rank}] {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
