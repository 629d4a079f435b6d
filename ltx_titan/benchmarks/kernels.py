"""Checks, tunes and times the fused kernels at the shapes of a block.

    ltx-titan bench kernels [--out rows.jsonl] [--tokens 4032 8064 16128 32256] [--parts time]

1. check: outputs and every gradient against float64, eager and inside torch.compile(fullgraph=True), on this device.
2. sweep: each kernel with several launches at 4,032 and 16,128 tokens; the third part uses the fastest.
3. time: CUDA-graph replays, compared with torch.compile of the reference (and the reference eager), as a share of the
   bandwidth of a plain copy on this device.

Each kernel is compiled in a separate process, all in parallel; then they are timed one by one. A kernel that fails is
reported and skipped; the exit status is then 1.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ltx_titan.benchmarks.kernel_cases import CASES, WIDTHS, KernelCase, make_case
from ltx_titan.benchmarks.measure import copy_bandwidth, environment, input_sets, time_ms, write_rows
from ltx_titan.benchmarks.turns import device_alone, in_turns
from ltx_titan.common.options import Maybe
from ltx_titan_kernels.launches import Launch

DESCRIPTION = __doc__

SWEEP_TOKENS = (4_032, 16_128)
# Two timesteps use the launch of one.
NOT_SWEPT = ("norm_modulate, 2 timesteps", "residual_norm, 2 timesteps")
# At width 4096: warps, programs per multiprocessor, stages.
LAUNCHES = {
    "forward": tuple(product((4, 8, 16), (2, 4, 8, 32), (1, 2))),
    "backward": tuple(product((4, 8, 16), (1, 2, 4), (1, 2, 3))),
}
CHECK_SHAPES = ((1001, 4096, torch.bfloat16), (333, 2048, torch.bfloat16), (67, 3840, torch.float32))
# Relative L2. One rounding to bfloat16 is at most 2 ** -8 of an element, 2 ** -9.5 on average over random ones; the
# sums behind modulation gradients are float32 until their last rounding. Float32 sums of thousands of terms stay under
# 1e-5.
BOUNDS = {torch.bfloat16: 4e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class KernelOptions:
    """Options of `ltx-titan bench kernels`."""

    out: Maybe[Path] = None
    """File for the rows, as JSON lines."""

    tokens: tuple[int, ...] = (4_032, 8_064, 16_128, 32_256)
    """Numbers of tokens to time the kernels at."""

    kernels: Maybe[tuple[str, ...]] = None
    """Names of kernels. Default: all."""

    parts: tuple[Literal["check", "sweep", "time"], ...] = ("check", "sweep", "time")
    """Parts to run."""


def check(name: str, tokens: int, width: int, dtype: torch.dtype, is_compiled: bool, device: torch.device) -> dict:
    """Relative L2 errors of outputs and gradients against float64, eager and optionally compiled.

    Raises:
        AssertionError: an error exceeds its bound.
    """
    case = make_case(name, tokens, width, dtype, device, seed=tokens)
    wide = {leaf: x.detach().double().requires_grad_() for leaf, x in case.leaves.items()}
    expected = case.reference(**wide)
    # Rounded to the dtype first and then upcast, so that kernel and reference get equal gradients.
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
        for tensor, actual, exact in pairs:
            error = _relative(actual, exact)
            errors[f"{mode} {tensor}"] = error
            assert error <= BOUNDS[dtype], f"{mode} {tensor}: relative error {error:.2e} > {BOUNDS[dtype]:.0e}"
    return {"largest_error": max(errors.values()), "errors": errors}


def _relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@dataclass(frozen=True)
class KernelRequest:
    """Benchmark request for one kernel.

    Attributes:
        name: see `CASES`.
        width: of the tokens.
        tokens: numbers of tokens to time it at.
        parts: among "check", "sweep" and "time".
        copy: bytes per second of a plain copy.
    """

    name: str
    width: int
    tokens: tuple[int, ...]
    parts: tuple[str, ...]
    copy: float


def examine(request: KernelRequest, device: torch.device, take_turn: Callable[[], None]) -> list[dict]:
    """Runs the requested parts for one kernel; returns their rows."""
    rows = []
    if "check" in request.parts:
        # Only one shape is compiled: compilation takes seconds and does not depend on the shape.
        shapes = [shape for shape in CHECK_SHAPES if device.type == "cuda"] or [(19, 256, torch.float32)]
        for number, (tokens, width, dtype) in enumerate(shapes):
            is_compiled = device.type == "cuda" and number == 0
            found = check(request.name, tokens, width, dtype, is_compiled, device)
            rows.append({"part": "check", "tokens": tokens, "width": width, "dtype": str(dtype), **found})
    sweeps = request.name not in NOT_SWEPT and "sweep" in request.parts
    candidates = _compilable(request, device) if sweeps else {}
    compiled = {}
    if "time" in request.parts and device.type == "cuda":
        for tokens in request.tokens:
            case = make_case(request.name, tokens, request.width, torch.bfloat16, device, seed=0)
            compiled[tokens] = torch.compile(case.reference, fullgraph=True, dynamic=False)
            _forward_and_backward(case, compiled[tokens])
            _forward_and_backward(case, case.kernel)
            del case
    take_turn()
    best: dict[str, Launch] = {}
    for direction, launches in candidates.items():
        swept = sweep(request, direction, launches, device)
        rows += swept
        best[direction] = Launch(*(swept[0][field] for field in ("warps", "programs", "stages")))
    if "time" in request.parts:
        for tokens in request.tokens:
            rows += measure(request, tokens, best, compiled.get(tokens), device)
    return [{"kernel": request.name, "width": request.width, **row} for row in rows]


def _forward_and_backward(case: KernelCase, run: Callable[..., Sequence[Tensor]]) -> None:
    outputs = run(**case.leaves)
    torch.autograd.grad(outputs, list(case.leaves.values()), [torch.randn_like(output) for output in outputs])


def _sweep_tokens(request: KernelRequest, device: torch.device) -> tuple[int, ...]:
    return SWEEP_TOKENS if device.type == "cuda" else request.tokens


def _compilable(request: KernelRequest, device: torch.device) -> dict[str, list[Launch]]:
    """Launches that compile and run; some need more registers or shared memory than the device has."""
    case = make_case(request.name, min(_sweep_tokens(request, device)), request.width, torch.bfloat16, device, seed=0)
    found: dict[str, list[Launch]] = {}
    for direction, launches in LAUNCHES.items():
        run = getattr(case, f"launch_{direction}")
        # Without a GPU this runs in the interpreter, where launches do not differ in time.
        wanted = [Launch(*l).scaled_to(request.width) for l in (launches if device.type == "cuda" else launches[:1])]
        # The default is always among the candidates, so that a sweep shows what another launch would gain.
        default = getattr(case, f"default_{direction}")
        if default.stages is None:
            wanted = [replace(launch, stages=None) for launch in wanted]
        found[direction] = []
        for launch in dict.fromkeys([default, *wanted]):
            try:
                run(launch=launch)
                found[direction].append(launch)
            except Exception as error:
                reason = str(error).splitlines()[0][:150]
                print(f"{request.name} {request.width} {direction} {launch}: {reason}", flush=True)
    return found


def sweep(request: KernelRequest, direction: str, launches: list[Launch], device: torch.device) -> list[dict]:
    """Milliseconds of one direction with each launch, the fastest over all token counts first."""
    times: dict[Launch, dict[int, float]] = {launch: {} for launch in launches}
    counts = _sweep_tokens(request, device)
    for tokens in counts:
        cases = _cases(request, tokens, device)
        for launch in launches:
            calls = [partial(getattr(case, f"launch_{direction}"), launch=launch) for case in cases]
            times[launch][tokens] = time_ms(calls, device)
    # Each token count weighs the same: sums of milliseconds would be decided by the largest.
    least = {tokens: min(found[tokens] for found in times.values()) for tokens in counts}

    def excess(launch: Launch) -> float:
        return sum(times[launch][tokens] / least[tokens] for tokens in counts)

    return [
        {
            "part": "sweep",
            "direction": direction,
            **asdict(launch),
            "is_default": launch == launches[0],
            "ms": {str(tokens): ms for tokens, ms in times[launch].items()},
        }
        for launch in sorted(launches, key=excess)
    ]


def measure(
    request: KernelRequest, tokens: int, best: dict[str, Launch], compiled: Callable | None, device: torch.device
) -> list[dict]:
    """One row per provider: milliseconds, GB/s and share of copy bandwidth, forward and backward."""
    cases = _cases(request, tokens, device)
    first = cases[0]
    launches = {d: best.get(d, getattr(first, f"default_{d}")) for d in LAUNCHES}
    alone = [
        time_ms([partial(getattr(case, f"launch_{d}"), launch=launch) for case in cases], device)
        for d, launch in launches.items()
    ]
    times = {"triton": tuple(alone)}
    times["triton, as an operation"] = _time_autograd(cases, first.kernel, device)
    if compiled is not None:
        times["torch.compile"] = _time_autograd(cases, compiled, device)
    # At one size only: eager takes several times as long and is not what the kernels compete with.
    if tokens == max(SWEEP_TOKENS):
        times["eager"] = _time_autograd(cases, first.reference, device)
    return [
        {
            "part": "time",
            "tokens": tokens,
            "provider": provider,
            "forward_ms": forward,
            "backward_ms": backward,
            "forward_gb_s": first.forward_bytes / forward / 1e6,
            "backward_gb_s": first.backward_bytes / backward / 1e6,
            "forward_of_copy": first.forward_bytes / forward * 1e3 / request.copy,
            "backward_of_copy": first.backward_bytes / backward * 1e3 / request.copy,
            "launches": {d: asdict(launch) for d, launch in launches.items()} if provider == "triton" else None,
        }
        for provider, (forward, backward) in times.items()
    ]


def _cases(request: KernelRequest, tokens: int, device: torch.device) -> list[KernelCase]:
    first = make_case(request.name, tokens, request.width, torch.bfloat16, device, seed=0)
    count = input_sets(first.backward_bytes, device)
    others = (make_case(request.name, tokens, request.width, torch.bfloat16, device, seed=i) for i in range(1, count))
    return [first, *others]


def _time_autograd(cases: list[KernelCase], run: Callable, device: torch.device) -> tuple[float, float]:
    """Times of forward, with what it saves for backward, and of backward, as the difference to both together."""
    cotangents = [torch.randn_like(output) for output in run(**cases[0].leaves)]

    def forward_and_backward(case: KernelCase) -> None:
        torch.autograd.grad(run(**case.leaves), list(case.leaves.values()), cotangents)

    forward = time_ms([partial(run, **case.leaves) for case in cases], device)
    total = time_ms([partial(forward_and_backward, case) for case in cases], device)
    # Backward cannot be replayed alone: autograd frees what forward saved.
    return forward, total - forward


def run(options: KernelOptions) -> int:
    """Runs the requested parts and prints their tables."""
    names = options.kernels or tuple(CASES)
    if unknown := [name for name in names if name not in CASES]:
        raise ValueError(f"--kernels: expected some of {list(CASES)}, found {unknown}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.monotonic()
    with device_alone():
        # Measured on this card rather than taken from a datasheet: cards of one kind differ by a few percent.
        copy = copy_bandwidth(device)
    common = {**environment(device), "copy_gb_s": copy / 1e9}
    print(f"{common['device']}, torch {common['torch']}: copy {copy / 1e12:.2f} TB/s", flush=True)
    requests = [KernelRequest(name, WIDTHS[name], options.tokens, options.parts, copy) for name in names]
    rows, failures = [], 0
    found = in_turns([partial(examine, request, device) for request in requests], device)
    for request, result in zip(requests, found, strict=True):
        if isinstance(result, Exception):
            failures += 1
            rows.append({"kernel": request.name, "width": request.width, "error": str(result)})
            print(f"{request.name} {request.width} FAILED {str(result)[:600]}", flush=True)
        else:
            rows += result
        write_rows(options.out, [{**common, **row} for row in rows])
    _print_tables(rows)
    print(f"{time.monotonic() - started:.0f} s")
    return 1 if failures else 0


def _print_tables(rows: list[dict]) -> None:
    for row in rows:
        if row.get("part") == "check":
            print(f"check {row['kernel']:28} {row['tokens']:>5} x {row['width']} {row['dtype']:15}", end=" ")
            print(f"largest error {row['largest_error']:.1e}")
    print("\nbest launches (warps, programs per multiprocessor, stages), us at each token count; last the default's")
    for key in dict.fromkeys((r["kernel"], r["width"], r["direction"]) for r in rows if "direction" in r):
        timed = [r for r in rows if (r["kernel"], r["width"], r.get("direction")) == key]
        shown = [*timed[:4], *(r for r in timed[4:] if r["is_default"])]
        cells = [
            f"({r['warps']}, {r['programs']}, {r['stages']}) " + "/".join(f"{ms * 1e3:.1f}" for ms in r["ms"].values())
            for r in shown
        ]
        print(f"{key[0]:28} {key[1]} {key[2]:9} " + "  ".join(cells))
    print("\nkernel                        width tokens provider                 fwd us  of copy   bwd us  of copy")
    for row in rows:
        if row.get("part") == "time":
            print(
                f"{row['kernel']:29} {row['width']:>5} {row['tokens']:>6} {row['provider']:23} "
                f"{row['forward_ms'] * 1e3:>7.1f} {row['forward_of_copy']:>7.2f} "
                f"{row['backward_ms'] * 1e3:>9.1f} {row['backward_of_copy']:>7.2f}"
            )
