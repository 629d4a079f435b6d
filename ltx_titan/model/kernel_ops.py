"""Chooses the implementation of a block's memory-bound operations and of its attention, once per job.

The choice is an `Operators` record passed to the model, without global state. The kernels are imported only when they
are chosen, because they need Triton, which is not installed with PyTorch for CPUs. The dependency is one-way: kernels
know shapes, not the model.
"""

import logging
import os
from dataclasses import replace
from importlib.util import find_spec
from typing import Literal

import torch
from torch.nn.attention import SDPBackend

from ltx_titan.model.ops import TORCH, Operators
from ltx_titan.model.rope import RotaryTables

logger = logging.getLogger(__name__)

KernelBackend = Literal["auto", "triton", "torch"]

# Triton compiles for these; older GPUs also lack bfloat16.
_OLDEST_CAPABILITY = (8, 0)

# Hopper, the only architecture on which the kernels have been measured against torch.compile of plain PyTorch.
_MEASURED_CAPABILITY = 9

# Measured forward + backward on an H100 (docs/benchmarks/attention.jsonl): over video tokens cuDNN reaches 478-506
# TFLOP/s, torch's own flash attention 262-284 and the memory-efficient one 110-128; cuDNN is fastest for cross-modal
# and text attention as well. It rejects some shapes and masks; the next one then runs.
_HOPPER_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def select_operators(backend: KernelBackend, device: torch.device) -> Operators:
    """Selects the operators for a device.

    Args:
        backend: "triton" for the fused kernels, "torch" for plain PyTorch (to be compiled), "auto" for the faster one
            in our measurements.
        device: of the model.

    Raises:
        ValueError: the backend is "triton" on a device that cannot run the kernels.
    """
    obstacle = _obstacle(device)
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"kernels.backend = 'triton', but {obstacle}. Use 'auto' or 'torch'.")
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _MEASURED_CAPABILITY
    if obstacle is None and not is_hopper:
        obstacle = "not measured on this device"
    use_kernels = backend == "triton" or (backend == "auto" and obstacle is None)
    operators = triton_operators() if use_kernels else TORCH
    if is_hopper:
        operators = replace(operators, attention_backends=_HOPPER_ATTENTION)
    attention = operators.attention_backends
    logger.info(
        "kernels: %s%s; attention: %s",
        operators.name,
        f" ({obstacle})" if backend == "auto" and obstacle else "",
        "torch's choice" if attention is None else ", else ".join(backend.name for backend in attention),
    )
    return operators


def triton_operators() -> Operators:
    """Operators with the fused kernels. With TRITON_INTERPRET=1 they also accept CPU tensors, slowly."""
    from ltx_titan_kernels.gated_residual_norm import gated_residual, gated_residual_norm
    from ltx_titan_kernels.qk_norm_rope import qk_norm_rope
    from ltx_titan_kernels.rms_norm_modulate import rms_norm_modulate

    return Operators(
        name="triton",
        norm_modulate=rms_norm_modulate,
        gated_residual=gated_residual,
        gated_residual_norm=gated_residual_norm,
        qk_norm_rope=qk_norm_rope,
        rotation=RotaryTables.pack,
    )


def for_rotation(operators: Operators, interleaved: bool) -> Operators:
    """The same operators, with plain PyTorch rotation if the checkpoint rotates adjacent channels (old LTX-2)."""
    if not interleaved:
        return operators
    # All released checkpoints use the split layout, the only one that the kernel implements.
    return replace(operators, qk_norm_rope=TORCH.qk_norm_rope, rotation=TORCH.rotation)


def _obstacle(device: torch.device) -> str | None:
    """Reason why the kernels cannot run on this device, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the kernels need a CUDA GPU, found {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, _OLDEST_CAPABILITY))
        return f"the kernels need compute capability {needed}, found {found}"
    return None
