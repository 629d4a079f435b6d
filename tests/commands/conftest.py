from tests.console import console

__all__ = ["console"]
