from tests.console import console, one_thread

__all__ = ["console", "one_thread"]
