"""Shared tensor helpers: dtype names, local shards, seeds, devices of kernels, wrapper levels in parameter names."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Job values of `training.dtype` and `checkpoint.export_dtype`."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtype codes of the safetensors format."""

# Activation checkpointing and torch.compile insert a level into module names.
_WRAPPER_LEVELS = re.compile(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod)\.")


class _WithoutInit(TorchFunctionMode):
    """Skips the initialization of layers of torch.nn."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Builds modules on the meta device: shapes and dtypes without memory.

    "Initializing" weights that have no values takes half of the second in which a transformer of 48 blocks is built.
    """
    with torch.device("meta"), _WithoutInit():
        yield


def without_wrappers(name: str) -> str:
    """Removes the levels that activation checkpointing and compilation insert into a module or parameter name."""
    return _WRAPPER_LEVELS.sub("", name)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its storage; a plain tensor is returned as is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether Triton compiles for a device; with TRITON_INTERPRET=1 it also runs on a CPU, for tests."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return os.environ.get("TRITON_INTERPRET") == "1"


def seed_of(text: str, num_bytes: int = 8) -> int:
    """Hashes a name into a generator seed that is the same on every rank and machine.

    Args:
        text: everything that the seed depends on, for example "42/transformer_blocks.0.attn1.to_q".
        num_bytes: length of the hash; 8 bytes are shifted right by one, since a seed is a signed 64-bit number.
    """
    # Python's hash() of a string is salted per process.
    number = int.from_bytes(blake2b(text.encode(), digest_size=num_bytes).digest())
    return number >> 1 if num_bytes == 8 else number


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` indices into `count` items, evenly from the first to the last."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().int().tolist()


def free_device_memory() -> None:
    """Returns unreferenced memory to the GPU, if there is one, so that another process or allocation can have it."""
    if torch.cuda.is_available():
        # First the cycles: the allocator can return only blocks that no tensor refers to.
        gc.collect()
        torch.cuda.empty_cache()
