import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other crawl where tests run side by side."""
    torch.set_num_threads(1)
