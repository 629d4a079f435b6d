"""Every kernel compiles for an H100 at the shapes of a block, without one: the interpreter checks numbers, not this."""

import re
import subprocess

import pytest
import torch
import triton

from ltx_titan.benchmarks.kernel_cases import CASES
from tests.kernels.compilation import (
    compile_adafactor,
    compile_adamw,
    compile_adamw8bit,
    compile_case,
    compile_float8,
    compile_sum_parts,
    trace_case,
)

pytestmark = pytest.mark.runs_on("cpu", "gpu")

SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor that one program can have


def spilled_bytes(kernel, folder) -> int:
    """Bytes of registers that did not fit and go through memory."""
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report).group(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_compiles_and_has_the_shared_memory_it_needs(name, dtype):
    compiled = compile_case(name, dtype, tokens=129)
    assert len(compiled) == 3  # forward, backward, and the sum of partials
    assert max(kernel.metadata.shared for kernel in compiled) <= SHARED_MEMORY


@pytest.mark.parametrize("name", CASES)
def test_no_kernel_spills_registers_in_the_dtype_of_training(tmp_path, name):
    compiled = compile_case(name, torch.bfloat16, tokens=129)
    spilled = {kernel.metadata.name: spilled_bytes(kernel, tmp_path) for kernel in compiled}
    assert not any(spilled.values()), spilled


@pytest.mark.parametrize(
    ("name", "is_frozen"),
    [(name, False) for name in CASES]
    + [(name, True) for name in ("norm_modulate", "residual_norm, 2 norms", "qk_norm_rope, audio keys")],
)
def test_a_compiler_copies_no_tokens(name, is_frozen):
    # torch.compile copies each argument that a kernel may write and that something else reads. Its analysis errs on
    # the safe side: an input that it takes for an output costs a copy.
    tokens, width = 64, 256
    launched = 0
    for graph in trace_case(name, tokens, width, is_frozen=is_frozen):
        for node in graph.nodes:
            if "triton_kernel_wrapper" not in str(node.target):
                continue
            launched += 1
            arguments = node.kwargs["kwargs"]
            for written in node.kwargs["tensors_to_clone"]:
                is_input = arguments[written].op == "placeholder"
                assert not is_input or arguments[written].meta["val"].numel() <= tokens, written
    assert launched == (2 if is_frozen else 3)  # forward, backward, and the sum of partials


def test_float8_kernels_compile_at_the_width_of_a_block_and_stay_in_registers(tmp_path):
    compiled = compile_float8(tokens=64, few=51, width=4096)
    assert len(compiled) == 17
    for kernel in compiled:
        assert kernel.metadata.shared <= SHARED_MEMORY
        assert spilled_bytes(kernel, tmp_path) == 0, kernel.metadata.name
    # Weights of one byte become factors of the tensor cores' bfloat16 matmul.
    products = [kernel for kernel in compiled if kernel.metadata.name == "_few_tokens_kernel"]
    assert len(products) == 4
    assert all("wgmma" in kernel.asm["ptx"] for kernel in products)


def test_adafactors_kernels_keep_their_tiles_in_registers_and_load_16_bytes_at_a_time(tmp_path):
    # Weights are at addresses from a table, of which the compiler knows only what it is told.
    compiled = compile_adafactor(("_sums_kernel", "_apply_kernel"))
    assert len(compiled) == 2
    for kernel in compiled.values():
        assert "ld.global.v4.b32" in kernel.asm["ptx"], kernel.metadata.name
        assert spilled_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_adamws_kernel_stays_in_registers_and_moves_16_bytes_at_a_time(tmp_path, dtypes):
    kernel = compile_adamw(*dtypes)
    ptx = kernel.asm["ptx"]
    wide = [len(re.findall(rf"\b{operation}\.global\.v4\.b32", ptx)) for operation in ("ld", "st")]
    # Four tensors are read and three are written.
    assert wide[0] >= 4
    assert wide[1] >= 3
    # What is left are the table, step counts and factors.
    assert wide[0] % 4 == 0
    assert wide[1] % 3 == 0
    assert not re.search(r"st\.global\.(?!v4)", ptx)
    assert spilled_bytes(kernel, tmp_path) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamws_kernel_of_8_bits_stays_in_registers_and_moves_four_weights_at_a_time(tmp_path, dtype):
    kernel = compile_adamw8bit(dtype)
    ptx = kernel.asm["ptx"]
    # A float32 gradient, and a weight of as much memory or of half of it.
    wide = r"v4" if dtype == torch.float32 else r"v[24]"
    assert len(re.findall(rf"ld\.global\.{wide}\.b32", ptx)) >= 2
    assert re.search(rf"st\.global\.{wide}\.b32", ptx)
    # Codes are moved by the word, never by the byte.
    assert not re.search(r"(ld|st)\.global\.b(8|16)", ptx)
    assert spilled_bytes(kernel, tmp_path) == 0


def test_gradients_are_added_16_bytes_at_a_time(tmp_path):
    kernel = compile_sum_parts(ranks=2, numel=8192)
    assert len(re.findall(r"ld\.global\.v4\.b32", kernel.asm["ptx"])) == 4  # two of each part
    assert len(re.findall(r"st\.global\.v4\.b32", kernel.asm["ptx"])) == 4
    assert spilled_bytes(kernel, tmp_path) == 0
    # Triton compiles a size of 1 as a constant.
    assert compile_sum_parts(ranks=3, numel=1).asm["ptx"]
