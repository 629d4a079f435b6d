"""Deterministic algorithms of torch and its libraries."""

import os

import torch


def set_determinism(*, enabled: bool) -> None:
    """Restricts torch to deterministic algorithms, or lifts the restriction. Call it before the device is used.

    Seeds need nothing: every random number of a run is a function of the job's seed already.
    """
    torch.use_deterministic_algorithms(enabled)
    # Filling new tensors would cost a write of each; none of ours is read before it is written.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (the stubs lack it)
    torch.backends.cudnn.deterministic = enabled
    if enabled:
        # cuBLAS reads it once; with the default workspaces its result may depend on the stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
