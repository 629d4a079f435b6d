"""Checks, tunes and times the fused kernels at the shapes of a block.

    ltx-titan bench kernels [--out rows.jsonl] [--tokens 16128 8064 4032 32256] [--widths 4096 2048] [--budget 330]

1. check: outputs and every gradient against float64, eager and inside torch.compile(fullgraph=True), on this device.
2. sweep: each kernel under several launches at 16,128 tokens; the fastest serves the third part.
3. time: CUDA-graph replays beside torch.compile of the plain form (and that form eager), as a share of the bandwidth
   that a plain copy reaches here.

A kernel that fails is reported and left out. When the budget is used up the rest is skipped, and the table says so.
Exit status 1 if a check failed.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from ltx_titan.benchmarks.kernel_cases import CASES, KernelCase, make_case
from ltx_titan.benchmarks.measure import copy_bandwidth, environment, input_sets, time_ms, write_rows
from ltx_titan_kernels.modulation_rows import Launch

DESCRIPTION = __doc__

SWEEP_TOKENS = 16_128
# Two timesteps take the launch of one; at 2048 only queries and keys between the streams are as long as the video.
SWEPT = {
    4096: ("norm_modulate", "residual_norm", "residual_norm, 2 norms", "residual", "qk_norm_rope", "qk_norm, text"),
    2048: ("qk_norm_rope, 1 axis",),
}
CHECK_SHAPES = ((1001, 4096, torch.bfloat16), (333, 2048, torch.bfloat16), (67, 3840, torch.float32))
# Relative L2. One rounding to bfloat16 is at most 2 ** -8 of an element, 2 ** -9.5 on average over random ones; the
# sums behind row gradients are float32 until their last rounding. Float32 sums of thousands of terms stay under 1e-5.
BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


@dataclass
class Session:
    """What the three parts share."""

    device: torch.device
    deadline: float
    rows: list[dict] = field(default_factory=list)
    failures: int = 0

    def attempt(self, part: str, name: str, work: Callable[[], dict | list[dict]], **shape: object) -> object:
        """Runs `work`, records its rows, or why there are none."""
        label = {"part": part, "kernel": name, **shape}
        if time.monotonic() > self.deadline:
            self.rows.append({**label, "skipped": "budget used up"})
            return None
        try:
            found = work()
        # Whatever goes wrong with one kernel (a compiler error, a launch failure), the others are still of interest.
        except Exception as error:
            self.failures += 1
            text = f"{type(error).__name__}: {error}".splitlines()
            self.rows.append({**label, "error": " | ".join(text)[:800]})
            print(f"{part} {name} {shape}: FAILED {text[0][:300]}", flush=True)
            return None
        self.rows.extend({**label, **row} for row in (found if isinstance(found, list) else [found]))
        return found


def check(session: Session, name: str, tokens: int, width: int, dtype: torch.dtype, is_compiled: bool) -> dict:
    """Largest relative L2 errors of outputs and gradients, eager or both eager and compiled.

    Raises:
        AssertionError: one is beyond its bound.
    """
    case = make_case(name, tokens, width, dtype, session.device, seed=tokens)
    wide = {leaf: x.detach().double().requires_grad_() for leaf, x in case.leaves.items()}
    expected = case.reference(**wide)
    cotangents = [torch.randn_like(e).to(dtype) for e in expected]
    expected_gradients = torch.autograd.grad(expected, list(wide.values()), [c.double() for c in cotangents])
    errors = {}
    modes = {"eager": case.kernel}
    if is_compiled:
        modes["compiled"] = torch.compile(case.kernel, fullgraph=True, dynamic=False)
    for mode, run in modes.items():
        outputs = run(**case.leaves)
        gradients = torch.autograd.grad(outputs, list(case.leaves.values()), cotangents)
        pairs = [(f"output {i}", o, e) for i, (o, e) in enumerate(zip(outputs, expected, strict=True))]
        pairs += zip((f"d {leaf}" for leaf in case.leaves), gradients, expected_gradients, strict=True)
        for what, actual, exact in pairs:
            error = _relative(actual, exact)
            errors[f"{mode} {what}"] = error
            assert error <= BOUNDS[dtype], f"{mode} {what}: relative error {error:.2e} > {BOUNDS[dtype]:.0e}"
    return {"largest_error": max(errors.values()), "errors": errors}


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def sweep(session: Session, name: str, width: int, tokens: int) -> list[dict]:
    """Milliseconds of forward and backward under several launches, fastest first within each."""
    cases = _cases(session, name, tokens, width)
    rows = []
    for direction in ("forward", "backward"):
        found = []
        default = getattr(cases[0], f"default_{direction}")
        base = width // 512
        # The backward kernels hold more rows: more warps for the same registers, and more to gain from fetching ahead.
        warps, stages = (
            ((base // 2, base, 2 * base), (1, 2)) if direction == "forward" else ((base, 2 * base), (1, 2, 3))
        )
        for launch in {default: None} | {Launch(*of): None for of in product(warps, (1, 2, 3, 4, 8, 16), stages)}:
            calls = [partial(getattr(case, f"launch_{direction}"), launch=launch) for case in cases]
            row = {"direction": direction, **asdict(launch), "is_default": launch == default}
            try:
                row["ms"] = time_ms(calls, session.device)
            # A launch can ask for more registers or shared memory than there are.
            except Exception as error:
                row["error"] = str(error).splitlines()[0][:200]
            found.append(row)
            if time.monotonic() > session.deadline:
                break
        rows += sorted(found, key=lambda row: row.get("ms", float("inf")))
    return rows


def best_launch(rows: list[dict] | None, direction: str, default: Launch) -> Launch:
    """The fastest launch of a sweep."""
    timed = [row for row in rows or () if row["direction"] == direction and "ms" in row]
    if not timed:
        return default
    return Launch(timed[0]["warps"], timed[0]["programs"], timed[0]["stages"])


def measure(session: Session, name: str, tokens: int, width: int, copy: float, swept: list[dict] | None) -> list[dict]:
    """One row per provider: milliseconds, GB/s and share of copy bandwidth, forward and backward."""
    cases = _cases(session, name, tokens, width)
    first = cases[0]
    launches = {d: best_launch(swept, d, getattr(first, f"default_{d}")) for d in ("forward", "backward")}
    alone = [
        time_ms([partial(getattr(case, f"launch_{d}"), launch=launch) for case in cases], session.device)
        for d, launch in launches.items()
    ]
    times = {"triton": tuple(alone)}
    times["triton, as an operation"] = _time_autograd(session, cases, first.kernel)
    if session.device.type == "cuda":
        compiled = torch.compile(first.reference, fullgraph=True, dynamic=False)
        times["torch.compile"] = _time_autograd(session, cases, compiled)
    if tokens == SWEEP_TOKENS:
        times["eager"] = _time_autograd(session, cases, first.reference)
    return [
        {
            "provider": provider,
            "forward_ms": forward,
            "backward_ms": backward,
            "forward_gb_s": first.forward_bytes / forward / 1e6,
            "backward_gb_s": first.backward_bytes / backward / 1e6,
            "forward_of_copy": first.forward_bytes / forward * 1e3 / copy,
            "backward_of_copy": first.backward_bytes / backward * 1e3 / copy,
            "launches": {d: asdict(launch) for d, launch in launches.items()} if provider == "triton" else None,
        }
        for provider, (forward, backward) in times.items()
    ]


def _cases(session: Session, name: str, tokens: int, width: int) -> list[KernelCase]:
    first = make_case(name, tokens, width, torch.bfloat16, session.device, seed=0)
    count = input_sets(first.backward_bytes, session.device)
    return [
        first,
        *(make_case(name, tokens, width, torch.bfloat16, session.device, seed=i) for i in range(1, count)),
    ]


def _time_autograd(session: Session, cases: list[KernelCase], run: Callable) -> tuple[float, float]:
    """Forward that keeps what backward needs, and backward as the difference to both together."""
    cotangents = [torch.randn_like(output) for output in run(**cases[0].leaves)]

    def both(case: KernelCase) -> None:
        torch.autograd.grad(run(**case.leaves), list(case.leaves.values()), cotangents)

    forward = time_ms([partial(run, **case.leaves) for case in cases], session.device)
    together = time_ms([partial(both, case) for case in cases], session.device)
    return forward, together - forward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", type=Path, help="write rows as JSON lines")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_128, 8_064, 4_032, 32_256])
    parser.add_argument("--widths", type=int, nargs="+", default=[4096, 2048])
    parser.add_argument("--kernels", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--parts", nargs="+", choices=["check", "sweep", "time"], default=["check", "sweep", "time"])
    parser.add_argument("--budget", type=float, default=330, help="seconds after which the rest is skipped")


def run(arguments: argparse.Namespace) -> int:
    """Runs the parts and prints the tables."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    session = Session(device, started + arguments.budget)
    copy = copy_bandwidth(device)
    common = {**environment(device), "copy_gb_s": copy / 1e9}
    print(f"{common['device']}, torch {common['torch']}: copy {copy / 1e12:.2f} TB/s", flush=True)
    if "check" in arguments.parts:
        shapes = CHECK_SHAPES if device.type == "cuda" else ((19, 256, torch.float32),)
        for name, (tokens, width, dtype) in product(arguments.kernels, shapes):
            shape = {"tokens": tokens, "width": width, "dtype": str(dtype)}
            # Compilation takes seconds and does not depend on the shape.
            is_compiled = device.type == "cuda" and (tokens, width, dtype) == shapes[0]
            work = partial(check, session, name, tokens, width, dtype, is_compiled)
            session.attempt("check", name, work, **shape)
        print(f"checks: {session.failures} failed, {time.monotonic() - started:.0f} s", flush=True)
    swept: dict[tuple[str, int], object] = {}
    if "sweep" in arguments.parts:
        for width, name in product(arguments.widths, arguments.kernels):
            tokens = SWEEP_TOKENS if device.type == "cuda" else min(arguments.tokens)
            if name in SWEPT.get(width, ()):
                work = partial(sweep, session, name, width, tokens)
                swept[name, width] = session.attempt("sweep", name, work, width=width, tokens=tokens)
            write_rows(arguments.out, [{**common, **row} for row in session.rows])
        print(f"sweep done, {time.monotonic() - started:.0f} s", flush=True)
    if "time" in arguments.parts:
        for width, tokens, name in product(arguments.widths, arguments.tokens, arguments.kernels):
            launches = swept.get((name, width)) or swept.get((name.removesuffix(", 2 timesteps"), width))
            work = partial(measure, session, name, tokens, width, copy, launches)
            session.attempt("time", name, work, width=width, tokens=tokens)
            write_rows(arguments.out, [{**common, **row} for row in session.rows])
    write_rows(arguments.out, [{**common, **row} for row in session.rows])
    _print_tables(session.rows)
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if session.failures else 0


def _print_tables(rows: list[dict]) -> None:
    for row in rows:
        if row["part"] == "check" and "largest_error" in row:
            print(f"check {row['kernel']:28} {row['tokens']:>5} x {row['width']} {row['dtype']:15}", end=" ")
            print(f"largest error {row['largest_error']:.1e}")
    print("\nfastest launches (warps, programs per multiprocessor, stages), ms; and the default's")
    for key in dict.fromkeys((r["kernel"], r["width"], r["direction"]) for r in rows if "direction" in r):
        timed = [r for r in rows if "ms" in r and (r["kernel"], r["width"], r["direction"]) == key]
        shown = [*timed[:3], *(r for r in timed[3:] if r["is_default"])]
        cells = [f"({r['warps']}, {r['programs']}, {r['stages']}) {r['ms']:.4f}" for r in shown]
        print(f"{key[0]:28} {key[1]} {key[2]:9} " + "  ".join(cells))
    print("\nkernel                        width tokens provider                 fwd us  of copy   bwd us  of copy")
    for row in rows:
        if row["part"] == "time" and "provider" in row:
            print(
                f"{row['kernel']:29} {row['width']:>5} {row['tokens']:>6} {row['provider']:23} "
                f"{row['forward_ms'] * 1e3:>7.1f} {row['forward_of_copy']:>7.2f} "
                f"{row['backward_ms'] * 1e3:>9.1f} {row['backward_of_copy']:>7.2f}"
            )
    skipped = sum("skipped" in row for row in rows)
    if skipped:
        print(f"{skipped} measurements skipped: the budget was used up")


def main() -> int:
    """Runs as `python -m ltx_titan.benchmarks.kernels`."""
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
