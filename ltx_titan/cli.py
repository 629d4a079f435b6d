"""`ltx-titan <command>`: every tool of this package under one name; also `python -m ltx_titan.cli <command>`.

A command is a module with `DESCRIPTION`, `add_arguments(parser)` and `run(arguments) -> exit status`. Only the module
of the command that is called is imported, so that the list of commands appears at once. One that reads a job also takes
`--section.key=value`: its parser has a default for `overrides`.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from ltx_titan.common.logs import quiet_libraries

# command: (module, what it does in one line)
COMMANDS = {
    "make-nano": ("ltx_titan.nano.pack", "write a miniature LTX-2.3 pack with random weights, to try things on"),
    "make-debug-dataset": ("ltx_titan.nano.debug_dataset", "write a small captioned data set, to try things on"),
    "make-checkpoint": (
        "ltx_titan.nano.random_checkpoint",
        "write a checkpoint of a released model's size with random weights, to measure with",
    ),
    "estimate": (
        "ltx_titan.estimate.command",
        "predict memory and step time of a job, find its fastest mesh, build it dry",
    ),
    "bench": ("ltx_titan.benchmarks.bench", "measure kernels and the block on this device"),
    "split-scenes": ("ltx_titan.commands.split_scenes", "cut long videos into clips of one scene each"),
    "caption": ("ltx_titan.commands.captioning.caption", "describe clips with a multimodal model"),
    "compute-reference": ("ltx_titan.commands.compute_reference", "make reference videos: edges, grey, blur, depth"),
    "process-dataset": ("ltx_titan.commands.process.process_dataset", "encode clips and captions for training"),
    "process-videos": (
        "ltx_titan.commands.process.process_videos",
        "encode videos, images and audio, without captions",
    ),
    "process-captions": ("ltx_titan.commands.process.process_captions", "encode captions, without their media"),
    "inspect": (
        "ltx_titan.commands.inspection.inspect_data",
        "look at clips or prepared data: a contact sheet and a table",
    ),
    "decode-latents": ("ltx_titan.commands.decode_latents", "turn prepared latents back into pictures and audio"),
    "import-config": ("ltx_titan.commands.import_ltx", "turn a job of the LTX Trainer (YAML) into one of ours (TOML)"),
    "sample": ("ltx_titan.commands.sample", "sample clips with a checkpoint, or with a base and a LoRA"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status. What a user can fix is printed as one line, without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    parser = argparse.ArgumentParser(
        prog="ltx-titan",
        description="Fine-tuning of the LTX-2 audio-video diffusion transformers: tools around training. "
        "'ltx-titan <command> --help' explains a command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="<command>", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if argv[:1] == [name]:
            module = import_module(module_name)
            subparser.description = module.DESCRIPTION
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    arguments, rest = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        arguments.overrides = [argument for argument in rest if argument.startswith("--") and "." in argument]
        rest = [argument for argument in rest if argument not in arguments.overrides]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"ltx-titan {arguments.command}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
