"""Fixtures of what a command is run with, for a folder's conftest to import."""

import io

import pytest
from rich.console import Console


@pytest.fixture
def console():
    """A console whose output `console.file.getvalue()` returns."""
    return Console(file=io.StringIO(), width=200)
