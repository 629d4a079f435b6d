from tests.jobs import data_root, nano_path

__all__ = ["data_root", "nano_path"]
