"""Command-line options from a dataclass: every field is written once, its docstring is the help text.

    @dataclass(frozen=True)
    class CutOptions:
        video: Positional[Path]
        '''Video to cut.'''
        output: Annotated[Maybe[Path], alias("-o")] = None
        '''Folder of the clips. Default: the folder of the video.'''
        detector: Literal["content", "adaptive"] = "content"
        '''Method that finds cuts.'''
        overwrite: Flag = False
        '''Cut again.'''

tyro turns this into `VIDEO [-o PATH] [--output PATH] [--detector {content,adaptive}] [--overwrite]`, with types,
choices and defaults in `--help`. `Maybe[Path]` is `Path | None`; `Flag` is `bool`, which alone would add `--no-...`;
`tuple[int, ...]` takes several values. A field that is itself an option dataclass in `Group[...]` becomes a titled
group whose flags have no prefix.
"""

import contextlib
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import tyro

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Options = TypeVar("Options", bound="DataclassInstance")

Positional: TypeAlias = Annotated[T, tyro.conf.Positional]
"""Positional argument; its name in upper case is the placeholder in the usage line."""

Group: TypeAlias = Annotated[T, tyro.conf.OmitArgPrefixes]
"""Nested dataclass whose options are listed under a separate title."""

# The empty hint omits "(default: False)" and "(default: None)" from the help.
_WITHOUT_DEFAULT = tyro.conf.arg(help_behavior_hint="")

Flag: TypeAlias = Annotated[bool, tyro.conf.FlagCreatePairsOff, _WITHOUT_DEFAULT]
"""`--flag` without `--no-flag`, for switches that are off by default."""

Maybe: TypeAlias = Annotated[T | None, _WITHOUT_DEFAULT]
"""Option without a default value; its docstring says what happens without it."""

Repeated: TypeAlias = Annotated[tuple[T, ...], tyro.conf.UseAppendAction]
"""Option that may be passed several times."""

Overrides: TypeAlias = Annotated[tuple[str, ...], tyro.conf.Suppress]
"""Type of the field `overrides`: collects `--section.key=value`, which overrides single values of a job."""

_OVERRIDE = re.compile(r"--\w[\w-]*(\.[\w-]+)+(=.*)?", re.DOTALL)
# tyro draws its errors into a box, and styles them if standard output is a terminal.
_BOX = re.compile(r"\x1b\[[0-9;]*m|[╭╮╰╯│]|─(?!─)")
_RULE = "───"


def alias(*names: str) -> Any:
    """Adds names to an option, for example `-o`; used in `Annotated[...]`."""
    return tyro.conf.arg(aliases=list(names))


def placeholder(text: str) -> Any:
    """Sets the text that the help shows instead of the type of a value; used in `Annotated[...]`."""
    return tyro.conf.arg(metavar=text)


def default_device() -> str:
    """`cuda` if there is a GPU, else `cpu`."""
    # Here, because torch takes seconds to import and some commands do without it.
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def parse_size(text: str, option: str) -> tuple[int, int, int]:
    """Parses the size of a clip, `WxHxF`: width and height in pixels, and the number of frames.

    Raises:
        ValueError: the text has another form. The message names `option`.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} is {text!r}; expected WxHxF, for example 768x448x89")
    width, height, frames = map(int, parts)
    return width, height, frames


def parse_options(cls: type[Options], arguments: Sequence[str], *, prog: str, description: str) -> Options:
    """Parses a command line into an options dataclass.

    Args:
        cls: options of the command. A field `overrides` receives the arguments of the form `--section.key=value`.
        arguments: command line after the command's name.
        prog: name of the command in usage and errors.
        description: text of `--help` above the options.

    Raises:
        SystemExit: with code 0 after `--help`; with code 2 and one line on stderr if an argument is unknown, missing or
            has a value of another type.
    """
    overrides = []
    if "overrides" in cls.__dataclass_fields__:
        overrides = [argument for argument in arguments if _OVERRIDE.fullmatch(argument)]
        arguments = [argument for argument in arguments if not _OVERRIDE.fullmatch(argument)]
    errors = io.StringIO()
    try:
        # tyro prints and exits; captured, its box of several lines becomes one.
        with contextlib.redirect_stderr(errors):
            # DisallowNone: the help would otherwise list {None} among the values of every `Maybe`.
            parsed = tyro.cli(
                cls,
                args=arguments,
                prog=prog,
                description=description,
                config=(tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName),
            )
    except SystemExit as exit_:
        if exit_.code:
            print(f"{prog}: {_one_line(errors.getvalue())} (see {prog} --help)", file=sys.stderr)
        raise
    return replace(parsed, overrides=tuple(overrides)) if overrides else parsed


def _one_line(error: str) -> str:
    """The first section of tyro's box without its frame and title."""
    lines = error.splitlines()
    message = []
    for line in lines[1:] if lines and "╭" in lines[0] else lines:
        if _RULE in line:
            break
        message.append(_BOX.sub("", line))
    return " ".join(" ".join(message).split())
