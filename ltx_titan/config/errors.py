"""Errors of a job: every problem at once, one line each, with key, value, expected values and remedy.

Reporting all of them lets a user fix a job in one pass, before a cluster is allocated.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MISSING = object()
"""`Problem.found` of a key that the job does not set."""

EXPECTED_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string in quotes",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "missing": "a value",
    "finite_number": "a finite number",
    "int_from_float": "an integer",
}
"""Error types of pydantic -> the words of someone who writes TOML or JSON; messages of other types are readable."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a job.

    Attributes:
        key: dotted name, for example `training.steps`; empty if `origin` itself (a file, an override) is wrong.
        found: the value in the job, `MISSING` without one.
        expected: valid values, to be read after the word "expected"; empty if `remedy` is a complete message.
        remedy: what to do about it.
        origin: file or override that the value came from; empty for the job as a whole.
    """

    key: str
    found: Any
    expected: str
    remedy: str
    origin: str = ""

    def line(self) -> str:
        """Formats the problem as one line."""
        subject = self.key
        if self.key and self.found is MISSING:
            subject = f"{self.key} is missing"
        elif self.key and (self.expected or not isinstance(self.found, dict)):
            # A complete message about a table names the fields that matter, so the table itself is not printed.
            subject = f"{self.key} = {as_toml(self.found)}"
        prefix = ": ".join(part for part in (self.origin, subject) if part)
        text = f"expected {self.expected}; {self.remedy}" if self.expected else self.remedy
        return f"{prefix}: {text}"


class ConfigError(ValueError):
    """An invalid job.

    Attributes:
        problems: all problems found.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problem.line() for problem in self.problems))


def as_toml(value: Any) -> str:
    """Formats `value` as in a job file, on one line, truncated to 200 characters."""
    match value:
        # Before the default case: str(True) is not TOML.
        case bool():
            text = str(value).lower()
        case str():
            text = '"' + value.replace("\n", "\\n") + '"'
        case None:
            text = "unset"
        case list() | tuple():
            text = "[" + ", ".join(as_toml(item) for item in value) + "]"
        case dict():
            text = "{" + ", ".join(f"{key} = {as_toml(item)}" for key, item in value.items()) + "}"
        case _:
            text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def nearest(name: str, valid: Iterable[str]) -> str:
    """Formats a remedy for an unknown `name`: the closest valid names, then all of them."""
    valid = sorted(valid)
    # Below difflib's default of 0.6, under which `dp` is not close to `tp`.
    close = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"


def must_be_file(key: str, path: str) -> Iterator[Problem]:
    """Problem of a path that is not a file."""
    if not Path(path).is_file():
        what = "a file, not a folder" if Path(path).is_dir() else "a file that exists on this machine"
        yield Problem(key, path, what, "correct the path or download the file")
