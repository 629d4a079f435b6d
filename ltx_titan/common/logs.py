"""Logging of jobs and commands, and silence for library messages that nobody running a job can act on."""

import io
import logging
import os
import sys
import warnings
from pathlib import Path

from ltx_titan.common.secrets import RedactingFilter

_PACKAGE = Path(__file__).parents[1]
_format_warning = warnings.formatwarning


def set_up_logging() -> None:
    """Logs one line per event of rank 0 to standard output; other ranks log only what is critical."""
    escape_names()
    # Not as a number: this runs before RANK has been checked.
    is_main = (os.environ.get("RANK") or "0") == "0"
    logging.basicConfig(
        format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, stream=sys.stdout
    )
    # On the handlers, where messages of all loggers pass, libraries' included.
    for handler in logging.getLogger().handlers:
        if not any(isinstance(found, RedactingFilter) for found in handler.filters):
            handler.addFilter(RedactingFilter())
    logging.getLogger("ltx_titan").setLevel(logging.INFO if is_main else logging.CRITICAL)
    logging.captureWarnings(is_main)


def escape_names() -> None:
    """Makes standard output accept every file name: bytes that are not UTF-8 are printed as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def quiet_libraries() -> None:
    """Sets the switches of the libraries unless the user has set them. Call before importing the libraries.

    Warnings of this package are about the user's settings, and printed without the line that raises them.
    """
    warnings.formatwarning = _in_words
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao warns about every extension for another GPU, and torch 2.13 about how torchao registers enums.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Of a failed save it logs the traceback as well, which the exception that it raises has.
    logging.getLogger("c10d-NullHandler-dcp_logger").disabled = True
    warnings.filterwarnings("ignore", category=SyntaxWarning, module="torchao")
    # The transformer's outputs are views of a matmul's result; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # A checkpoint is read in one process on purpose by `ltx-titan export`.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def _in_words(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if category is UserWarning and Path(filename).is_relative_to(_PACKAGE):
        return f"warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)
