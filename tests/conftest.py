import pytest
import torch

from tests.jobs import data_root, nano_path

__all__ = ["data_root", "nano_path"]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread per process: oversubscribed cores are slower than idle ones."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def nano(nano_path):
    """Path of the nano checkpoint; its text encoder is in the same folder."""
    return nano_path


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def runner(capsys, caplog):
    """Runs commands in this process."""
    from tests.malformed import Runner

    return Runner(capsys, caplog)
