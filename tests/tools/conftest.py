import io

import pytest
import torch
from rich.console import Console

from ltx_titan.codecs.nano import make_nano


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other crawl where tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """Path of the miniature checkpoint."""
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def console():
    """What a command prints; `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
