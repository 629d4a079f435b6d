"""Times Adafactor's update of one block on a GPU: by the kernels, the same as a CUDA graph, and in plain PyTorch.

    python -m ltx_titan.benchmarks.adafactor docs/benchmarks/ltx23_full_step.toml --out rows.jsonl

Weights and gradients are bfloat16, rounding is stochastic. The row also says how many weights differ between the three
after four steps: none between kernels and graph; against PyTorch those whose sums, in another order, round differently.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from ltx_titan.benchmarks.measure import environment, write_rows
from ltx_titan.common.options import Maybe, Positional, parse_options
from ltx_titan.config import load_job
from ltx_titan.memory.workload import make_workload
from ltx_titan.optim import adafactor
from ltx_titan.plan import plan_job

_COMPARED_STEPS = 4
_TIMED_STEPS = 20


@dataclass(frozen=True)
class AdafactorBenchOptions:
    """Options of the benchmark of Adafactor."""

    job: Positional[Path]
    """Job file, whose model has the block."""

    out: Maybe[Path] = None
    """File for the row, as a JSON line."""


class _Block:
    """Parameters of a block with gradients in one tensor, as FSDP2 leaves them, and their optimizer."""

    def __init__(self, shapes: list[tuple[int, ...]], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(size: int, scale: float) -> torch.Tensor:
            values = torch.randn(size, device=device, generator=generator)
            return values.mul_(scale).bfloat16()

        sizes = [prod(shape) for shape in shapes]
        self.parameters = [
            nn.Parameter(w.view(s)) for w, s in zip(draw(sum(sizes), 0.02).split(sizes), shapes, strict=True)
        ]
        self._gradients = draw(sum(sizes), 1e-6).split(sizes)
        self.optimizer = adafactor.Adafactor(self.parameters, lr=1e-3, stochastic_rounding=True)

    def step(self) -> None:
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        self.optimizer.step()


def _times(step: Callable[[], None]) -> dict[str, float]:
    """Median milliseconds of a step on the device, and of its launches on the host."""
    device, host = [], []
    for _ in range(_TIMED_STEPS):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun = time.perf_counter()
        start.record()
        step()
        end.record()
        host.append(1e3 * (time.perf_counter() - begun))
        end.synchronize()
        device.append(start.elapsed_time(end))
    return {"ms": statistics.median(device), "host_ms": statistics.median(host)}


def main() -> int:
    """Measures and compares; returns 1 if the graph's weights differ from those of the kernels."""
    options = parse_options(
        AdafactorBenchOptions, sys.argv[1:], prog="ltx_titan.benchmarks.adafactor", description=__doc__
    )
    device = torch.device("cuda")
    work = make_workload(plan_job(load_job(options.job, []), 1))
    shapes = [tuple(weight.shape) for weight in work.block.items]
    row: dict[str, object] = {"weights": sum(map(prod, shapes)), "tensors": len(shapes)}
    blocks = {name: _Block(shapes, device) for name in ("kernels", "graph", "pytorch")}
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        blocks["graph"].step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        blocks["graph"].step()
    for _ in range(_COMPARED_STEPS - 1):
        graph.replay()
    for _ in range(_COMPARED_STEPS):
        blocks["kernels"].step()
        with patch.object(adafactor, "_has_kernels", lambda _: False):
            blocks["pytorch"].step()
    for name in ("graph", "pytorch"):
        pairs = zip(blocks["kernels"].parameters, blocks[name].parameters, strict=True)
        row[f"differ_{name}"] = sum(int((a != b).sum()) for a, b in pairs)
    row["kernels"], row["graph"] = _times(blocks["kernels"].step), _times(graph.replay)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    blocks["kernels"].step()
    row["kernels_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    with patch.object(adafactor, "_has_kernels", lambda _: False):
        row["pytorch"] = _times(blocks["pytorch"].step)
    row["pytorch_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    print(f"ROW {row}", flush=True)
    write_rows(options.out, [{**environment(device), **row}])
    return 1 if row["differ_graph"] else 0


if __name__ == "__main__":
    sys.exit(main())
