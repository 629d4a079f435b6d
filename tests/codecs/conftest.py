import pytest
import torch

from ltx_titan.codecs.nano import make_nano


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other crawl where tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano(tmp_path_factory):
    """Path of the miniature checkpoint; its text encoder lies beside it."""
    return make_nano(tmp_path_factory.mktemp("nano"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
