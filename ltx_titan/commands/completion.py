"""`ltx-titan completion`: a script with which a shell completes commands, options and their values."""

import contextlib
import io
from dataclasses import dataclass, make_dataclass
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from ltx_titan.commands.catalog import COMMANDS, load_command
from ltx_titan.common.options import Positional

DESCRIPTION = """\
Print a script with which a shell completes commands, options and their values. It is made from the options of all
commands, which takes a while: write it to a file once, and again after an update.

examples:
  ltx-titan completion bash > ~/.local/share/bash-completion/completions/ltx-titan
  ltx-titan completion zsh > "${fpath[1]}/_ltx-titan"
"""


@dataclass(frozen=True)
class CompletionOptions:
    """Options of `ltx-titan completion`."""

    shell: Positional[Literal["bash", "zsh", "tcsh"]]
    """Shell that the script is for."""


def run(options: CompletionOptions) -> int:
    """Runs the command; returns the exit status."""
    print(completion_script(options.shell))
    return 0


def completion_script(shell: str) -> str:
    """The script for one shell."""
    commands: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for name in COMMANDS:
        options = get_type_hints(load_command(name).run)["options"]
        group, _, command = name.rpartition(" ")
        (groups.setdefault(group, {}) if group else commands)[command] = options
    for group, members in groups.items():
        commands[group] = make_dataclass(group, [("command", _one_of(members))])
    script = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(script):
        tyro.cli(
            _one_of(commands),
            prog="ltx-titan",
            args=["--tyro-print-completion", shell],
            config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName, tyro.conf.OmitSubcommandPrefixes),
        )
    return script.getvalue().rstrip()


def _one_of(commands: dict[str, Any]) -> Any:
    """A union type, of which tyro makes subcommands."""
    return reduce(or_, (Annotated[options, tyro.conf.subcommand(name=name)] for name, options in commands.items()))
