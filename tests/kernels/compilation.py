"""Compiles the kernels for an H100 without one, and writes their PTX to compare two versions of the code:

TRITON_DISABLE_LINE_INFO=1 python -m tests.kernels.compilation FOLDER      then diff -r FOLDER OTHER_FOLDER
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.library import wrap_triton
from triton.backends.compiler import GPUTarget

from ltx_titan.benchmarks.kernel_cases import CASES, WIDTHS, make_case
from ltx_titan_kernels import (
    adafactor,
    adamw,
    adamw8bit,
    few_tokens,
    float8,
    float8_rows,
    float8_weights,
    gated_residual_norm,
    launches,
    qk_norm_rope,
    rms_norm_modulate,
    sum_parts,
    weight_table,
)

_MODULES = (
    few_tokens,
    float8,
    float8_rows,
    float8_weights,
    gated_residual_norm,
    launches,
    qk_norm_rope,
    rms_norm_modulate,
)
_H100 = GPUTarget("cuda", 90, 32)
_MULTIPROCESSORS = 132


@contextmanager
def on_an_h100(launch: Callable[..., None]) -> Iterator[None]:
    """Within it, Triton compiles for an H100, and launched kernels are passed to `launch(kernel, grid, arguments)`."""

    def intercept(kernel: Any, _: torch.Tensor) -> Any:
        class OnGrid:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda **arguments: launch(kernel, grid, arguments)

        return OnGrid()

    driver = SimpleNamespace(
        get_current_target=lambda: _H100, get_current_device=lambda: 0, get_current_stream=lambda _: 0
    )
    with ExitStack() as patches:
        for module in _MODULES:
            patches.enter_context(patch.object(module, "wrap_if_traced", intercept))
        patches.enter_context(patch.object(triton.runtime.driver, "_active", driver))
        patches.enter_context(patch.object(launches, "_multiprocessors", lambda _: _MULTIPROCESSORS))
        yield


def compile_case(name: str, dtype: torch.dtype, tokens: int) -> list[Any]:
    """Compiled kernels of a benchmark case, forward and backward."""
    compiled: list[Any] = []
    with on_an_h100(lambda kernel, grid, arguments: compiled.append(kernel.warmup(grid=grid, **arguments))):
        case = make_case(name, tokens, WIDTHS[name], dtype, torch.device("cpu"), seed=0)
        compiled.clear()  # making a case runs the forward as well
        case.launch_forward()
        case.launch_backward()
    return compiled


def compile_float8(tokens: int, few: int, width: int) -> list[Any]:
    """Compiled kernels of float8 layers: quantization, transpositions, and both products of few tokens.

    Args:
        tokens, few: numbers of video and of audio tokens.
        width: of three layers of one input.
    """
    compiled: list[Any] = []
    weight = torch.zeros(width, width, dtype=torch.float8_e4m3fn)
    x, scale = torch.zeros(tokens, width, dtype=torch.bfloat16), torch.ones(width, 1, dtype=torch.bfloat16)
    with on_an_h100(lambda kernel, grid, arguments: compiled.append(kernel.warmup(grid=grid, **arguments))):
        adapters = torch.zeros(tokens, 128, dtype=torch.bfloat16), torch.ones(128)
        float8.quantize_joined([x, x, x, adapters[0]], [scale.flatten()] * 3 + [adapters[1]])
        float8.transpose_bytes([weight])
        for matrix in (weight, weight.to(torch.bfloat16)):
            float8_weights.quantize_transposed([matrix], scale.flatten().float(), torch.ones(1))
        # Wide weights and narrower ones, of which programs take other tiles.
        for x_few, w in ((x[:few], weight), (x[:few, : width // 2], weight[: width // 2, : width // 2].contiguous())):
            few_tokens.multiply_few_tokens(x_few, w, scale[: len(w)], bias=scale[: len(w)].flatten())
            out = torch.zeros_like(x_few)
            few_tokens.multiply_few_tokens(x_few, w, scale[: len(w)], out=out, transposed=True)
        wide = torch.zeros(tokens, 4 * width, dtype=torch.bfloat16)
        float8_rows.quantize_rows(x)
        float8_rows.quantize_rows(x, has_sum=True)
        float8_rows.quantize_parts([x, x, x], has_sum=True)
        float8_rows.quantize_rows(wide, is_gelu=True)
        float8_rows.quantize_rows(wide, wide.clone(), is_gelu=True, has_sum=True)
    return compiled


def compile_adafactor(names: Sequence[str]) -> dict[str, Any]:
    """Compiled kernels of Adafactor by name, for bfloat16 weights; only those of `names`."""
    weight, zero = torch.zeros(64, 128, dtype=torch.bfloat16), torch.zeros(())
    update = adafactor.Update(weight, weight, torch.zeros(64, 1), torch.zeros(1, 128), zero, zero, 0.0, 0)
    with compiled_from(adafactor, names) as compiled:
        adafactor.Updater(stochastic_rounding=True)([update])
    return compiled


def compile_adamw(dtype: torch.dtype, gradients: torch.dtype) -> Any:
    """Compiled kernel of AdamW for aligned weights and their moments, scaled and skipped on the device."""
    one = torch.ones(())
    lists = [[torch.zeros(64, 128, dtype=kind)] for kind in (dtype, gradients, dtype, dtype)]
    with compiled_from(adamw, ["_update_kernel"]) as compiled:
        adamw.Updater()(*lists, [one], lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, scale=one, skip=one)
    return compiled["_update_kernel"]


def compile_adamw8bit(dtype: torch.dtype) -> Any:
    """Compiled kernel of AdamW with moments of 8 bits for aligned weights, scaled, skipped and rounded at random."""
    one, codes, scales = torch.ones(()), torch.zeros(64, 128, dtype=torch.uint8), torch.zeros(64, 1)
    lists = [[torch.zeros(64, 128, dtype=dtype)], [torch.zeros(64, 128)], *[[codes], [scales]] * 2, [one]]
    with compiled_from(adamw8bit, ["_update_kernel"]) as compiled:
        update = adamw8bit.Updater(torch.zeros(256), torch.zeros(256))
        update(*lists, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, scale=one, skip=one, seeds=[7])
    return compiled["_update_kernel"]


def compile_sum_parts(ranks: int, numel: int) -> Any:
    """Compiled kernel that adds bfloat16 gradients of a number of ranks."""
    parts = torch.zeros(ranks, numel, dtype=torch.bfloat16)
    with compiled_from(sum_parts, ["_sum_parts_kernel"]) as compiled:
        sum_parts.sum_parts(parts[0], parts[1:], 0, torch.zeros(numel))
    return compiled["_sum_parts_kernel"]


@contextmanager
def compiled_from(module: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Within it, kernels of a module that are launched by name are compiled instead, if they are in `names`.

    Those of the table that they may read are not run either.
    """
    compiled: dict[str, Any] = {}

    def recorder(name: str, kernel: Any) -> Any:
        class OnGrid:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                def compile_if_named(*arguments: Any, **settings: Any) -> None:
                    if name in names:
                        compiled[name] = kernel.warmup(*arguments, grid=grid, **settings)

                return compile_if_named

        return OnGrid()

    with on_an_h100(lambda *_: None), ExitStack() as patches:
        for owner in (module, weight_table):
            for name in [name for name in vars(owner) if name.endswith("_kernel")]:
                patches.enter_context(patch.object(owner, name, recorder(name, getattr(owner, name))))
        yield compiled


def trace_case(name: str, tokens: int, width: int, *, is_frozen: bool = False) -> list[torch.fx.Graph]:
    """Forward and backward graph that torch.compile makes of a benchmark case; nothing is run.

    Args:
        name: of the case.
        tokens, width: of its tokens.
        is_frozen: train the tokens alone, not modulation and weights.
    """
    graphs = []

    def keep(module: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., list[torch.Tensor]]:
        graphs.append(module.graph)
        outputs = [node and node.meta["val"] for node in module.graph.output_node().args[0]]  # None: no gradient
        return make_boxed_func(lambda *_: [o if o is None else torch.zeros(o.shape, dtype=o.dtype) for o in outputs])

    def skip(*_: Any) -> None:
        pass

    with on_an_h100(skip):
        case = make_case(name, tokens, width, torch.bfloat16, torch.device("cpu"), seed=0)
        for parameter, leaf in case.leaves.items():
            leaf.requires_grad_(not is_frozen or parameter in ("x", "y", "q", "k"))
        with ExitStack() as traced:
            for module in _MODULES:
                traced.enter_context(patch.object(module, "wrap_if_traced", lambda kernel, _: wrap_triton(kernel)))
            compiled = torch.compile(case.kernel, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep))
            outputs = compiled(**case.leaves)
            trained = [leaf for leaf in case.leaves.values() if leaf.requires_grad]
            torch.autograd.grad(outputs, trained, [torch.randn_like(o) for o in outputs])
    return graphs


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
