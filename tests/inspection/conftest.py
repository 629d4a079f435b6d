import pytest

from tests.console import console, one_thread

__all__ = ["console", "nano", "one_thread"]


@pytest.fixture(scope="session")
def nano(nano_path):
    """Path of the miniature checkpoint."""
    return nano_path
