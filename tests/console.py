"""Fixtures of what a command is run with, for a folder's conftest to import."""

import io

import pytest
import torch
from rich.console import Console


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other crawl where tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture
def console():
    """What a command prints; `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
