"""Silences what libraries print on import that nobody running a job can act on. Call before importing them."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Sets the libraries' own switches, where the user has not."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torchao reports each extension for other GPUs that it does not find, and torch 2.13 its way of registering enums.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=SyntaxWarning, module="torchao")
    # The transformer's outputs are views of a matrix product; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
