"""Silences what libraries print on import that nobody running a job can act on. Call before importing them."""

import logging
import os
import warnings


def quieten() -> None:
    """Sets the libraries' own switches, where the user has not."""
    # torchao looks for extensions of other GPUs and of newer torch, and reports each that it does not find.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # torch 2.13 warns of torchao's way of registering enums.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    # The transformer's outputs are views of a matrix product; nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
