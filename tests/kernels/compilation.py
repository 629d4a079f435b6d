"""Compiles the kernels for an H100 without one, and writes their PTX to compare two versions of the code:

TRITON_DISABLE_LINE_INFO=1 python -m tests.kernels.compilation FOLDER      then diff -r FOLDER OTHER_FOLDER
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget

from ltx_titan.benchmarks.kernel_cases import CASES, WIDTHS, make_case
from ltx_titan_kernels import gated_residual_norm, launches, qk_norm_rope, rms_norm_modulate

_MODULES = (gated_residual_norm, launches, qk_norm_rope, rms_norm_modulate)
_H100 = GPUTarget("cuda", 90, 32)
_MULTIPROCESSORS = 132


@contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Within it, launched kernels are compiled for an H100 and appended to the list instead of run."""
    compiled: list[Any] = []

    def compile_kernel(kernel: Any, _: torch.Tensor) -> Any:
        class OnGrid:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable:
                return lambda **arguments: compiled.append(kernel.warmup(grid=grid, **arguments))

        return OnGrid()

    driver = SimpleNamespace(
        get_current_target=lambda: _H100, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    patches = [patch.object(module, "wrap_if_traced", compile_kernel) for module in _MODULES]
    patches.append(patch.object(triton.runtime.driver, "_active", driver))
    patches.append(patch.object(launches, "_multiprocessors", lambda _: _MULTIPROCESSORS))
    for each in patches:
        each.start()
    try:
        yield compiled
    finally:
        for each in patches:
            each.stop()


def compile_case(name: str, dtype: torch.dtype, tokens: int, width: int | None = None) -> list[Any]:
    """Compiled kernels of a benchmark case, forward and backward."""
    with compile_only() as compiled:
        case = make_case(name, tokens, width or WIDTHS[name], dtype, torch.device("cpu"), seed=0)
        compiled.clear()  # making a case runs the forward as well
        case.launch_forward()
        case.launch_backward()
    return compiled


def main(folder: Path) -> None:
    """Writes the PTX of every case, dtype and number of tokens to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in (129, 4032):
                for number, kernel in enumerate(compile_case(name, dtype, tokens)):
                    file = f"{name} {str(dtype).removeprefix('torch.')} {tokens} {number}.ptx".replace(" ", "_")
                    (folder / file).write_text(kernel.asm["ptx"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
