"""`ltx-titan <command>`: training and every tool around it; also `python -m ltx_titan.cli <command>`.

A command is a module, or an object in one, with `DESCRIPTION`, the text of its `--help`, and `run(options) -> exit
status`, whose annotation names the dataclass of its options (`common/options.py`). Only the module of the command that
is called is imported, so that `ltx-titan --help` does not wait for torch.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from ltx_titan import __version__
from ltx_titan.common.logs import escape_names, quiet_libraries
from ltx_titan.common.secrets import redacted

# command: (module or module:object, one line for the list of commands)
COMMANDS = {
    "train": ("ltx_titan.launch", "train a job on the GPUs of this node, or of several"),
    "estimate": ("ltx_titan.estimate.command", "predict memory and step time of a job, search its fastest mesh"),
    "sample": ("ltx_titan.commands.sample", "sample clips from a checkpoint, with or without a LoRA"),
    "export": ("ltx_titan.commands.export", "export a checkpoint for inference tools, from any mesh"),
    "import-config": ("ltx_titan.commands.import_ltx", "convert a job of the LTX Trainer (YAML) to a job file (TOML)"),
    "split-scenes": ("ltx_titan.commands.split_scenes", "cut long videos into clips of one scene each"),
    "caption": ("ltx_titan.commands.captioning.caption", "caption clips with a multimodal model"),
    "compute-reference": (
        "ltx_titan.commands.compute_reference",
        "compute reference videos: edges, gray, blur or depth",
    ),
    "inspect": (
        "ltx_titan.commands.inspection.inspect_data",
        "check clips or prepared data: contact sheet, buckets, tokens",
    ),
    "process-dataset": ("ltx_titan.commands.process.command:DATASET", "encode clips and captions for training"),
    "process-videos": ("ltx_titan.commands.process.command:VIDEOS", "encode videos, images and audio only"),
    "process-captions": ("ltx_titan.commands.process.command:CAPTIONS", "encode captions only"),
    "decode-latents": ("ltx_titan.commands.decode_latents", "decode prepared latents to video and audio files"),
    "lora info": ("ltx_titan.commands.lora:INFO", "show base model, rank, alpha, trigger word and norms of a LoRA"),
    "lora merge": ("ltx_titan.commands.lora:MERGE", "merge a LoRA into a checkpoint"),
    "lora extract": ("ltx_titan.commands.lora:EXTRACT", "make a LoRA from the difference of two checkpoints"),
    "lora convert": ("ltx_titan.commands.lora:CONVERT", "convert a LoRA for another tool"),
    "lora resize": ("ltx_titan.commands.lora:RESIZE", "reduce a LoRA to a smaller rank"),
    "make-nano": ("ltx_titan.nano.pack", "write a miniature LTX-2.3 pack with random weights"),
    "make-debug-dataset": ("ltx_titan.nano.debug_dataset", "write a small captioned dataset"),
    "make-checkpoint": (
        "ltx_titan.nano.random_checkpoint",
        "write a checkpoint of a released model's size with random weights",
    ),
    "bench kernels": ("ltx_titan.benchmarks.kernels", "check and time the fused kernels"),
    "bench attention": ("ltx_titan.benchmarks.attention", "time the attention backends of torch"),
    "bench block": ("ltx_titan.benchmarks.block", "time a transformer block in training, next to diffusers"),
    "bench step": ("ltx_titan.benchmarks.step", "profile a training step of a job: where its time goes"),
    "bench encode": ("ltx_titan.benchmarks.encode", "time the encoder of the video VAE"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors that a user can fix are printed without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    escape_names()
    words = 2 if argv[:1] in (["bench"], ["lora"]) else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        # Ends the program: it prints the list of commands or the version, or refuses the command.
        _command_list(argv[: words - 1]).parse_args(argv[words - 1 :])
    prog = f"ltx-titan {name}"
    try:
        module_name, _, object_name = COMMANDS[name][0].partition(":")
        module = import_module(module_name)
        return _run(getattr(module, object_name) if object_name else module, argv[words:], prog)
    except ModuleNotFoundError as error:
        if (error.name or "ltx_titan").startswith("ltx_titan"):
            raise
        print(f"{prog}: needs the package {error.name}, which is not installed", file=sys.stderr)
    except OSError as error:
        from ltx_titan.common.files import describe_os_error

        print(f"{prog}: {redacted(describe_os_error(error, Path()))}", file=sys.stderr)
    except ValueError as error:
        print(f"{prog}: {redacted(str(error))}", file=sys.stderr)
    return 1


def _run(command: Any, arguments: list[str], prog: str) -> int:
    # Here, so that the list of commands appears without importing tyro.
    from ltx_titan.common.options import parse_options

    options = get_type_hints(command.run)["options"]
    return command.run(parse_options(options, arguments, prog=prog, description=command.DESCRIPTION))


def _command_list(group: list[str]) -> argparse.ArgumentParser:
    """The parser of `ltx-titan --help` for no group, or of `ltx-titan bench --help`, `ltx-titan lora --help`."""
    parser = argparse.ArgumentParser(
        prog=" ".join(["ltx-titan", *group]),
        description="Fine-tuning of the LTX-2 audio-video diffusion transformers. "
        "'ltx-titan <command> --help' explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"ltx-titan {__version__}")
    commands = parser.add_subparsers(metavar="<command>", required=True)
    prefix = "".join(f"{word} " for word in group)
    for command, (_, summary) in COMMANDS.items():
        if command.startswith(prefix):
            commands.add_parser(command.removeprefix(prefix), help=summary)
    return parser


if __name__ == "__main__":
    sys.exit(main())
