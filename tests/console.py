"""Fixtures of what a command is run with, for a folder's conftest to import."""

import io

import pytest
from rich.console import Console


@pytest.fixture
def console():
    """What a command prints; `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
