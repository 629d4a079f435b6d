"""`ltx-titan bench <benchmark>`: the benchmarks as commands."""

import argparse
from importlib import import_module
from importlib.util import find_spec

DESCRIPTION = """\
Measure the speed of this project's parts on the device at hand, beside the alternatives in the same run.

`kernels` holds each fused kernel against torch.compile and the bandwidth of a copy; `attention` torch's attention
back-ends against each other; `block` a training step per layer against diffusers; `step` where the time of a job's
whole training step goes; `encode` the video VAE's encoder.

examples:
  ltx-titan bench kernels --out rows.jsonl
  ltx-titan bench attention
  ltx-titan bench block --tokens 4032 16128 --providers triton torch diffusers
  ltx-titan bench step job.toml --model.num_layers=12
  ltx-titan bench encode --clip 1280x704x121
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks as commands of their own."""
    subparsers = parser.add_subparsers(dest="benchmark", metavar="<benchmark>", required=True)
    for name in ("kernels", "attention", "block", "step", "encode"):
        if name == "kernels" and find_spec("triton") is None:
            subparsers.add_parser(name, help="needs triton, which is not installed").set_defaults(benchmark_run=_refuse)
            continue
        module = import_module(f"ltx_titan.benchmarks.{name}")
        subparser = subparsers.add_parser(
            name,
            help=module.DESCRIPTION.splitlines()[0],
            description=module.DESCRIPTION,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(benchmark_run=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen benchmark; returns its exit status."""
    return arguments.benchmark_run(arguments)


def _refuse(arguments: argparse.Namespace) -> int:
    raise ValueError("triton is not installed; `pip install triton` beside a torch for CUDA, which pairs with it.")
