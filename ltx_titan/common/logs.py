"""Silences messages that libraries print on import and that a user cannot act on. Call before importing them."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Sets the libraries' own switches unless the user has set them."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao warns about every extension for another GPU, and torch 2.13 about how torchao registers enums.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=SyntaxWarning, module="torchao")
    # The transformer's outputs are views of a matmul's result; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
