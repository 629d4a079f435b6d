"""Contents of an exported checkpoint besides the trained weights, and the header that lists them.

Inference tools take the text connectors from the transformer's file: ComfyUI computes with uninitialized memory where
they are missing, and ltx-pipelines ends with an error. Tensors that training does not change are therefore copied from
the files that the job was trained from, in their dtypes.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ltx_titan.common.tensors import SAFETENSORS_DTYPES
from ltx_titan.config import ExportLayout
from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.export import ExportTensor
from ltx_titan.weights.metadata import CheckpointMetadata, ModelSource, read_metadata
from ltx_titan.weights.names import CONNECTORS, TRANSFORMER
from ltx_titan.weights.stored import stored_weights

# Sections of the config and the prefixes of the tensors that they describe.
_DESCRIBED = {"vae": "vae.", "audio_vae": "audio_vae.", "vocoder": "vocoder."}


def complete_export(
    trained: Sequence[ExportTensor], source: ModelSource, connectors_path: str | Path | None, layout: ExportLayout
) -> tuple[list[ExportTensor], dict[str, str]]:
    """Adds what a layout asks for to the trained tensors; returns all tensors of the file and its header.

    - `transformer`: nothing.
    - `with_connectors`: the text connectors, and what the base's transformer has and the job did not build (the other
      stream of a video or audio job).
    - `complete`: everything in the base's file.

    Args:
        trained: tensors of the transformer.
        source: of the base; nothing is added to random weights.
        connectors_path: `model.connectors_path` of the job. Its connectors, with which the job was trained, replace the
            base's.
        layout: `checkpoint.export_layout` of the job.
    """
    tensors = {tensor.name: tensor for tensor in trained}
    if source.path is not None and layout != "transformer":
        base = read_metadata(source.path)
        connectors = base if connectors_path is None else read_metadata(connectors_path)
        # Of a quantized base every weight is in `trained`, merged; scales of quantized weights are no weights.
        rest = [key for key in stored_weights(base) if TRANSFORMER.module_name(key) is not None]
        if layout == "complete":
            rest += [key for key in base.tensors if _is_neither(key)]
        copies = _copies(connectors, [key for key in connectors.tensors if CONNECTORS.module_name(key) is not None])
        # Trained tensors come last: they replace the base's.
        tensors = copies | _copies(base, rest) | tensors
    return list(tensors.values()), _header(source, tensors)


def _header(source: ModelSource, keys: Collection[str]) -> dict[str, str]:
    """The base's metadata with the config sections of what the file holds.

    Readers build what the config lists: given a section `vae` without its tensors, ltx-pipelines takes the file for a
    complete checkpoint.
    """
    config = {
        section: value
        for section, value in source.config.items()
        if section not in _DESCRIBED or any(key.startswith(_DESCRIBED[section]) for key in keys)
    }
    return {**source.metadata, "config": json.dumps(config)}


def _is_neither(key: str) -> bool:
    return TRANSFORMER.module_name(key) is None and CONNECTORS.module_name(key) is None


def _copies(metadata: CheckpointMetadata, keys: Iterable[str]) -> dict[str, ExportTensor]:
    # One handle for all: it is closed with the last of the tensors that read from it.
    file = safe_open(metadata.path, framework="pt", device="cpu")
    copies = {}
    for key in keys:
        info = metadata.tensors[key]
        copies[key] = ExportTensor(key, info.shape, SAFETENSORS_DTYPES[info.dtype], partial(_read, file, metadata, key))
    return copies


def _read(file: Any, metadata: CheckpointMetadata, key: str) -> Tensor:
    # Otherwise a damaged tensor would be copied and pass for a whole one.
    check_contents(metadata.path, [metadata.range_of(key)])
    return file.get_tensor(key)
