"""Every kernel compiles for an H100 at the shapes of a block, without one: the interpreter checks numbers, not this."""

import re
import subprocess
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

import ltx_titan_kernels.gated_residual_norm
import ltx_titan_kernels.modulation_rows
import ltx_titan_kernels.qk_norm_rope_backward
import ltx_titan_kernels.qk_norm_rope_forward
import ltx_titan_kernels.rms_norm_modulate
from ltx_titan.benchmarks.kernel_cases import CASES, WIDTHS, make_case

LAUNCHERS = (
    ltx_titan_kernels.gated_residual_norm,
    ltx_titan_kernels.modulation_rows,
    ltx_titan_kernels.qk_norm_rope_backward,
    ltx_titan_kernels.qk_norm_rope_forward,
    ltx_titan_kernels.rms_norm_modulate,
)
H100 = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor that one program can have


class OnlyCompiled:
    """Stands for a kernel: launched, it is compiled for an H100 and kept."""

    def __init__(self, kernel, found):
        self.kernel = kernel
        self.found = found

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.found.append(self.kernel.warmup(*arguments, grid=grid, **options))


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that launchers compile instead of running them."""
    found = []
    device = SimpleNamespace(
        get_current_target=lambda: H100, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", device)
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "runnable", lambda kernel, _: OnlyCompiled(kernel, found))
    return found


def spilled_bytes(kernel, folder) -> int:
    """Bytes of registers that did not fit and go through memory."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report).group(1))


def compile_case(name, dtype, compiled):
    case = make_case(name, 129, WIDTHS[name], dtype, torch.device("cpu"), seed=0)
    case.launch_forward()
    case.launch_backward()
    assert len(compiled) >= 3  # forward, backward, and the sums over programs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_and_has_the_shared_memory_it_wants(compiled, name, dtype):
    compile_case(name, dtype, compiled)
    assert max(kernel.metadata.shared for kernel in compiled) <= SHARED_MEMORY


@pytest.mark.parametrize("name", CASES)
def test_no_kernel_spills_registers_in_the_dtype_of_training(compiled, tmp_path, name):
    compile_case(name, torch.bfloat16, compiled)
    spilled = {kernel.metadata.name: spilled_bytes(kernel, tmp_path) for kernel in compiled}
    assert not any(spilled.values()), spilled
