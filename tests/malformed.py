"""Runs commands in this process on malformed inputs, and judges what they say.

A refusal is clear if the command ends with a non-zero exit code, prints no traceback, and its message names the file or
key, what was found and what to do. Each row of a table lists the parts that its message must have.
"""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from ltx_titan.cli import main as command_main
from ltx_titan.train import main as train_main

TIMEOUT_S = 60


class Accepted(BaseException):
    """A malformed job reached the trainer."""


@pytest.fixture
def refuse_to_train(monkeypatch):
    """A job that reaches the trainer was accepted."""

    def accept(plan):
        raise Accepted(f"accepted: {plan.job}")

    monkeypatch.setattr("ltx_titan.train.entry.Trainer", accept)


class Outcome(NamedTuple):
    """Outcome of a command: its exit code, and everything it printed and logged."""

    code: int
    text: str


class Row(NamedTuple):
    """One malformed input.

    Attributes:
        name: what is broken, and how; unique in its table.
        change: the malformed input, as the table's test takes it.
        parts: texts that the message must have.
    """

    name: str
    change: Any
    parts: tuple[str, ...]


def rows(*table: tuple[str, Any, tuple[str, ...] | str]) -> list[Any]:
    """Parameters of a test: one per row, named after it."""
    made = [Row(name, change, (parts,) if isinstance(parts, str) else parts) for name, change, parts in table]
    assert len({row.name for row in made}) == len(made), "two rows of one name"
    return [pytest.param(row, id=row.name) for row in made]


def check(outcome: Outcome, row: Row, *, code: int = 1) -> None:
    """Fails unless a refusal is clear."""
    assert outcome.code in (code, 2), f"exit code {outcome.code}: {outcome.text or 'not a word'}"
    assert "Traceback" not in outcome.text, outcome.text
    missing = [part for part in row.parts if part not in outcome.text]
    assert not missing, f"no {missing} in: {outcome.text}"


class Runner:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capsys, self._caplog = capsys, caplog

    def train(self, *arguments: object) -> Outcome:
        """Runs one rank of a job, as torchrun starts it."""
        return self._run(train_main, arguments)

    def command(self, *arguments: object) -> Outcome:
        """Runs `ltx-titan` with these arguments."""
        return self._run(command_main, arguments)

    def _run(self, main: Callable[[list[str]], int], arguments: tuple[object, ...]) -> Outcome:
        self._capsys.readouterr()
        self._caplog.clear()
        with self._caplog.at_level(logging.INFO, "ltx_titan"), _limited():
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as exit_:
                code = exit_.code if isinstance(exit_.code, int) else 1
        printed = self._capsys.readouterr()
        return Outcome(code, printed.out + printed.err + self._caplog.text)


@contextmanager
def _limited() -> Iterator[None]:
    """Ends a command that hangs."""

    def end(*_: object) -> None:
        raise TimeoutError(f"still running after {TIMEOUT_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(TIMEOUT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
