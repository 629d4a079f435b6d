"""Speed of this project's parts on the device at hand, beside the alternatives in the same run.

    ltx-titan bench kernels     each fused kernel against torch.compile and copy bandwidth
    ltx-titan bench block       a training step per layer against diffusers
"""

import argparse

from ltx_titan.benchmarks import block, kernels

DESCRIPTION = __doc__


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmarks as commands of their own."""
    subparsers = parser.add_subparsers(dest="benchmark", metavar="<benchmark>", required=True)
    for name, module in (("kernels", kernels), ("block", block)):
        subparser = subparsers.add_parser(
            name, description=module.DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(subparser)
        subparser.set_defaults(benchmark_run=module.run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the chosen benchmark; returns its exit status."""
    return arguments.benchmark_run(arguments)
