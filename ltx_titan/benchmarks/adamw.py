"""Times clipping and AdamW's update of one rank's shards on a GPU: that of a library, and the kernel.

    python -m ltx_titan.benchmarks.adamw docs/benchmarks/ltx23_full_step.toml --out rows.jsonl

Weights and gradients are float32, those of --blocks blocks sharded over --ranks ranks; so are moments, which torch's
fused update has as well, or they have 8 bits, as in torchao's compiled one. Times are those of the device, with
launches queued in advance; host_ms is what launching takes. The row also says how far weights and state of one block
are from the library's after 20 steps, and in how many elements: none with float32 moments on the torch version whose
operations the kernel has. The exit status is 1 if weights differ by more than rounding explains.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ltx_titan.benchmarks.measure import copy_bandwidth, environment, write_rows
from ltx_titan.common.options import Flag, Maybe, Positional, parse_options
from ltx_titan.common.tensors import free_device_memory
from ltx_titan.config import OptimizerSection, load_job
from ltx_titan.memory.workload import make_workload
from ltx_titan.optim import adamw, build_optimizers, lowbit
from ltx_titan.optim.adamw import ShardedAdamW
from ltx_titan.optim.lowbit import LowBitAdamW
from ltx_titan.parallel.grad_norm import clip_factor, grad_norms, scale_grads_
from ltx_titan.plan import plan_job
from ltx_titan_kernels import adamw as adamw_kernel
from ltx_titan_kernels import adamw8bit as adamw8bit_kernel

_COMPARED_STEPS = 20
_TIMED_STEPS = 10
Name = Literal["adamw", "adamw8bit"]
TOLERANCE: dict[Name, float] = {"adamw": 2 * _COMPARED_STEPS * 2**-24, "adamw8bit": 1e-4}
"""Of the largest weight. In each step both may round to float32 once, in different directions; a moment that does may
have the next code, of which steps of 1e-4 of weights up to 0.1 feel a few percent."""
_LR = 1e-4
# Bytes that an update moves for each weight.
_MOVED: dict[Name, float] = {"adamw": 28, "adamw8bit": 16.125}
# Longer than the host takes to launch anything that is timed.
_QUEUED_CYCLES = 100_000_000
_SHAPES = [
    {"chunk": chunk, "block": block, "warps": warps}
    for chunk, block, warps in (
        *((1 << 15, 512, 4), (1 << 15, 1024, 4), (1 << 15, 2048, 4), (1 << 15, 1024, 8), (1 << 15, 4096, 8)),
        *((1 << 12, 2048, 8), (1 << 13, 2048, 8), (1 << 15, 2048, 8), (1 << 17, 2048, 8)),
    )
]
"""Launches of the kernel for `--sweep`."""


@dataclass(frozen=True)
class AdamWBenchOptions:
    """Options of the benchmark of AdamW."""

    job: Positional[Path]
    """Job file, whose model has the blocks."""

    name: Name = "adamw"
    """`optimizer.name`."""

    ranks: int = 2
    """Ranks that the weights are sharded over."""

    blocks: int = 12
    """Blocks; each needs 16 bytes a weight of the shard: 37 GB for 12 blocks of LTX-2.3 over 2 ranks."""

    sweep: Flag = False
    """Also time other launches of the kernel."""

    out: Maybe[Path] = None
    """File for the row, as a JSON line."""


class Shards:
    """Shards of blocks with gradients, those of a block in one tensor as FSDP2 leaves them, and their optimizer."""

    def __init__(self, shapes: list[tuple[int, ...]], blocks: int, device: torch.device, name: Name = "adamw") -> None:
        generator = torch.Generator(device).manual_seed(0)
        sizes = [prod(shape) for shape in shapes]
        self.named: list[tuple[str, nn.Parameter]] = []
        for block in range(blocks):
            values, gradients = (
                torch.randn(sum(sizes), device=device, generator=generator).mul_(scale).split(sizes)
                for scale in (0.02, 1e-4)
            )
            for number, shape in enumerate(shapes):
                # Parameters have memory of their own, gradients are views.
                parameter = nn.Parameter(values[number].view(shape).clone())
                parameter.grad = gradients[number].view(shape)
                self.named.append((f"{block}.{number}", parameter))
        self.name = name
        self.optimizers = build_optimizers(self.named, OptimizerSection(name=name, lr=_LR))
        (self.adamw,) = self.optimizers.parts

    def norm(self) -> Tensor:
        """Norm of all gradients."""
        return grad_norms(self.named)[0]

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients, in place."""
        scale_grads_((parameter for _, parameter in self.named), factor)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and state, by what they are."""
        for _, parameter in self.named:
            yield "weights", parameter.detach()
            for name, value in self.adamw.state[parameter].items():
                if name != "step":
                    yield name, value.float()


@contextmanager
def torchs_update() -> Iterator[None]:
    """Within it, the optimizer's update is torch's, or torchao's."""
    with patch.object(adamw, "runs_triton", lambda _: False), patch.object(lowbit, "runs_triton", lambda _: False):
        yield


def compare(shapes: list[tuple[int, ...]], device: torch.device, name: Name = "adamw") -> dict[str, float]:
    """Differences of the kernel's update from the library's, of the shards of one block."""
    ours, theirs = Shards(shapes, 1, device, name), Shards(shapes, 1, device, name)
    for step in range(_COMPARED_STEPS):
        for shards in (ours, theirs):
            # Torch's update stores the scaled gradients.
            for number, (_, parameter) in enumerate(shards.named):
                generator = torch.Generator(device).manual_seed(1000 * step + number)
                assert parameter.grad is not None
                parameter.grad.normal_(generator=generator).mul_(1e-4)
        factor = clip_factor(theirs.norm(), 0.5)
        ours.optimizers.step(factor)
        with torchs_update():
            theirs.optimizers.step(factor)
    differ, worst, largest = (defaultdict[str, float](float) for _ in range(3))
    for (kind, a), (_, b) in zip(ours.tensors(), theirs.tensors(), strict=True):
        if a.numel():
            differ[kind] += int((a != b).sum())
            worst[kind] = max(worst[kind], float((a - b).abs().max()))
            largest[kind] = max(largest[kind], float(b.abs().max()))
    found: dict[str, float] = {"compared": sum(parameter.numel() for _, parameter in ours.named)}
    for kind in worst:
        found |= {f"differ_{kind}": differ[kind], f"relative_{kind}": worst[kind] / largest[kind]}
    return found


def assert_kernels(shards: Shards) -> None:
    """Updates once, and checks that the kernels took every weight: what follows would time the library's update."""
    taken: list[bool] = []
    with ExitStack() as patches:
        for module in (adamw_kernel, adamw8bit_kernel):
            update = module.Updater.__call__

            def record(*args: Any, update: Callable[..., bool] = update, **settings: Any) -> bool:
                taken.append(update(*args, **settings))
                return taken[-1]

            patches.enter_context(patch.object(module.Updater, "__call__", record))
        shards.optimizers.step()
    if not taken or not all(taken):
        raise RuntimeError("the kernels do not take these weights.")


def time_passes(shards: Shards) -> dict[str, dict[str, float]]:
    """Milliseconds and GB/s of each pass and of the passes of a step, by name."""
    count = sum(parameter.numel() for _, parameter in shards.named)
    # Not 1, which the passes might otherwise be free to skip.
    factor = torch.full((), 0.999, device=shards.named[0][1].device)
    skip = torch.zeros((), device=factor.device)
    moved = _MOVED[shards.name]
    # torchao's update divides the gradients in a pass of its own, torch's stores the quotients.
    scaled = 8 if shards.name == "adamw8bit" else 4
    assert_kernels(shards)

    def clip(update: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            clip_factor(shards.norm(), 1.0)
            update()

        return run

    def scale_and_update() -> None:
        shards.scale(factor)
        shards.optimizers.step(skip=skip)

    def update() -> None:
        shards.optimizers.step(factor, skip)

    found = {
        "norm": _times(shards.norm, 4 * count),
        "scale": _times(lambda: shards.scale(factor), 8 * count),
    }
    with torchs_update():
        found["torch"] = _times(lambda: shards.optimizers.step(skip=skip), moved * count)
        found["torch, factor"] = _times(update, (moved + scaled) * count)
        found["norm, scale, torch"] = _times(clip(scale_and_update), (moved + 12) * count)
        found["norm, torch with factor"] = _times(clip(update), (moved + scaled + 4) * count)
    found["kernel"] = _times(lambda: shards.optimizers.step(skip=skip), moved * count)
    found["kernel, factor"] = _times(update, moved * count)
    found["norm, kernel with factor"] = _times(clip(update), (moved + 4) * count)
    return found


def _times(step: Callable[[], object], moved: float) -> dict[str, float]:
    """Median milliseconds of a step on the device and of its launches on the host, and gigabytes per second."""
    step()
    device, host = [], []
    for _ in range(_TIMED_STEPS):
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_QUEUED_CYCLES)
        begun = time.perf_counter()
        start.record()
        step()
        end.record()
        host.append(1e3 * (time.perf_counter() - begun))
        end.synchronize()
        device.append(start.elapsed_time(end))
    ms = statistics.median(device)
    return {"ms": round(ms, 3), "gb_per_s": round(moved / ms / 1e6), "host_ms": round(statistics.median(host), 2)}


def print_table(found: dict[str, dict[str, float]]) -> None:
    """Prints a row for each pass."""
    for name, values in found.items():
        print(f"{name:40} {values['ms']:8.2f} ms {values['gb_per_s']:6.0f} GB/s, host {values['host_ms']:6.2f} ms")


def shard_shapes(job: Path, ranks: int) -> list[tuple[int, ...]]:
    """Shapes of the first rank's shards of a block: FSDP2 splits rows."""
    work = make_workload(plan_job(load_job(job, []), 1))
    shapes = (weight.shape or (1,) for weight in work.block.items)
    return [(-(-rows // ranks), *rest) for rows, *rest in shapes]


def launch_as(shards: Shards, shape: dict[str, int]) -> None:
    """Makes the kernel of most weights take another launch."""
    if isinstance(shards.adamw, LowBitAdamW):
        assert shards.adamw._updaters is not None, "after a step"
        by_codes, by_values = shards.adamw._updaters
        assert by_codes is not None
        shards.adamw._updaters = adamw8bit_kernel.Updater(*by_codes.levels, **shape), by_values
    else:
        assert isinstance(shards.adamw, ShardedAdamW)
        shards.adamw._updater = adamw_kernel.Updater(**shape)


def main() -> int:
    """Measures and compares; returns 1 if weights differ by more than the tolerance."""
    options = parse_options(AdamWBenchOptions, sys.argv[1:], prog="ltx_titan.benchmarks.adamw", description=__doc__)
    device = torch.device("cuda")
    shapes = shard_shapes(options.job, options.ranks)
    row: dict[str, object] = {"name": options.name, "ranks": options.ranks, "blocks": options.blocks}
    differences = compare(shapes, device, options.name)
    row |= differences
    print(differences, flush=True)
    free_device_memory()
    row["copy_gb_per_s"] = round(copy_bandwidth(device) / 1e9)
    shards = Shards(shapes, options.blocks, device, options.name)
    row |= {"weights": sum(parameter.numel() for _, parameter in shards.named), "tensors": len(shards.named)}
    passes = time_passes(shards)
    if options.sweep:
        factor = torch.full((), 0.999, device=device)
        moved = _MOVED[options.name] * sum(parameter.numel() for _, parameter in shards.named)
        for shape in _SHAPES:
            launch_as(shards, shape)
            name = ", ".join(f"{key} {value}" for key, value in shape.items())
            passes[name] = _times(lambda: shards.optimizers.step(factor), moved)
    print_table(passes)
    row["passes"] = passes
    print(f"ROW {row}", flush=True)
    write_rows(options.out, [{**environment(device), **row}])
    return 1 if differences["relative_weights"] > TOLERANCE[options.name] else 0


if __name__ == "__main__":
    sys.exit(main())
