"""Chooses, once per job, what the blocks compute their memory-bound operations and their attention with.

The choice is a value, an `Operators` record handed to the model; nothing global remembers it. The kernels are imported
only when they are chosen, for they need triton, which not every machine has.
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

# Hopper, the only kind on which the kernels have been measured against torch.compile of the plain form.
_MEASURED_CAPABILITY = 9

# Measured forward + backward on an H100 (docs/benchmarks/attention.jsonl): over video tokens cuDNN makes 478-506
# TFLOP/s, torch's own flash attention 262-284 and the memory-efficient one 110-128; between the streams and to text
# cuDNN is first as well. It refuses some shapes and masks; the next one then runs.
_HOPPER_ATTENTION = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


def select_operators(backend: KernelBackend, device: torch.device) -> Operators:
    """The operations for this device.

    Args:
        backend: "triton" for the fused kernels, "torch" for plain torch operations (to be compiled), "auto" for what
            measured fastest.
        device: where the model will be.

    Raises:
        ValueError: kernels are asked for where they cannot run.
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
    """The fused kernels. Under TRITON_INTERPRET=1 they also take CPU tensors, slowly."""
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
    """The same operations with the plain rotation where the checkpoint turns neighbouring channels (old LTX-2)."""
    if not interleaved:
        return operators
    return replace(operators, qk_norm_rope=TORCH.qk_norm_rope, rotation=TORCH.rotation)


def _obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return f"the kernels need a CUDA GPU, found {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, _OLDEST_CAPABILITY))
        return f"the kernels need compute capability {needed}, found {found}"
    return None
