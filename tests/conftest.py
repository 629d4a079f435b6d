import gc

import pytest
import torch

from tests.jobs import data_root, nano_path

__all__ = ["data_root", "nano_path"]


# Files that take about a minute or more, longest first: one that starts last keeps the other workers waiting.
LONGEST = (
    "test_interpreted.py",
    "test_prediction.py",
    "test_train.py",
    "test_parallel_jobs.py",
    "test_modes.py",
    "test_reliability.py",
    "test_launch.py",
    "test_engine.py",
    "test_fault_injection.py",
    "test_training.py",
    "test_sharded.py",
    "test_exactness.py",
)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish():
    """Exempts imported modules from garbage collection: jobs collect often, and searching them takes half a second."""
    gc.collect()
    gc.freeze()
    # Building a large model makes objects by the hundred thousand, none of them garbage.
    gc.set_threshold(50_000, 20, 20)


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
