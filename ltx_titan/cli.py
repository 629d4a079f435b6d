"""`ltx-titan <command>`: training and every tool around it; also `python -m ltx_titan.cli <command>`.

A command is a module, or an object in one, with `DESCRIPTION`, the text of its `--help`, and `run(options) -> exit
status`, whose annotation names the dataclass of its options (`common/options.py`). Only the module of the command that
is called is imported, so that `ltx-titan --help` does not wait for torch.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from ltx_titan import __version__
from ltx_titan.commands.catalog import COMMANDS, load_command
from ltx_titan.common.logs import escape_names, quiet_libraries
from ltx_titan.common.secrets import redacted


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; errors that a user can fix are printed without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    escape_names()
    # `bench` and `lora` are groups of commands.
    words = 2 if argv and any(command.startswith(f"{argv[0]} ") for command in COMMANDS) else 1
    name = " ".join(argv[:words])
    if name not in COMMANDS:
        # Ends the program: it prints the list of commands or the version, or refuses the command.
        _command_list(argv[: words - 1]).parse_args(argv[words - 1 :])
    prog = f"ltx-titan {name}"
    try:
        return _run(load_command(name), argv[words:], prog)
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
