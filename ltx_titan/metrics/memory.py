"""Peak device memory since the last logged step. On a CPU there is nothing to tell, and every answer is None."""

import torch

_GIB = 1024**3


def peak_memory_gib(device: torch.device) -> float | None:
    """Most memory that tensors have held at once since the last reset, in GiB; None on a CPU.

    What the allocator has reserved beyond that is not counted: it depends on the size of the device.
    """
    return torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
