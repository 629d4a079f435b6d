"""Reads the metadata of a saved state without running code from it.

torch.distributed.checkpoint stores its metadata as a pickle and reads it with `pickle.load`, which calls whatever the
file names: a dump folder from a stranger would run their code at the first look. Metadata consists of a handful of
torch's own classes, so nothing else is resolved here.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

METADATA_FILE = ".metadata"

# Classes only: a function of these modules could be called with arguments from the file.
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}
# `torch.serialization._get_layout` is how a layout is pickled; it looks a name up in a fixed table.
_FUNCTIONS = {("torch.serialization", "_get_layout")}


class _MetadataUnpickler(pickle.Unpickler):
    """Resolves the classes of DCP's metadata and torch's dtypes; refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _CLASSES.get(module, ()) or (module, name) in _FUNCTIONS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which checkpoint metadata never contains")


class StateReader(FileSystemReader):
    """torch's reader of a step folder, with restricted and cached metadata. Shards are read with `weights_only`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path / METADATA_FILE
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads `.metadata`, once.

        Raises:
            ValueError: it is missing, unreadable, or refers to anything but metadata.
        """
        if self._metadata is None:
            self._metadata = _read(self._file)
            # As torch's own reader does: the id distinguishes loads in the planner's cache.
            self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata


def _read(file: Path) -> Metadata:
    try:
        metadata = _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()
    except FileNotFoundError as error:
        raise ValueError(".metadata is missing") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f".metadata is unreadable ({type(error).__name__}: {error})") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f".metadata is unreadable (expected metadata, found {type(metadata).__name__})")
    return metadata
