"""Where a job's transformer comes from: an official file, or random weights of a released shape."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltx_titan.weights.metadata import read_metadata
from ltx_titan.weights.shapes import released_config


@dataclass(frozen=True)
class ModelSource:
    """What is known of a transformer before it is built.

    Attributes:
        config: the config object of checkpoint metadata, with the key `transformer`.
        metadata: all metadata entries, carried over into exports.
        path: the file with the weights; None for random ones.
    """

    config: dict[str, Any]
    metadata: dict[str, str]
    path: Path | None


def read_source(checkpoint_path: str | None, shape: str | None, num_layers: int | None) -> ModelSource:
    """Reads a checkpoint's header, or looks up a released shape.

    Args:
        checkpoint_path: an official safetensors file, or None for random weights.
        shape: name of a released shape, or a JSON file with checkpoint metadata; with random weights only.
        num_layers: number of blocks to keep of that shape; None keeps all.

    Raises:
        ValueError: the file is missing, truncated or no transformer checkpoint; the shape is unknown.
    """
    if checkpoint_path is not None:
        metadata = read_metadata(checkpoint_path)
        assert metadata.transformer_config is not None
        return ModelSource(metadata.config, dict(metadata.raw), Path(checkpoint_path))
    config = released_config(shape)
    if num_layers is not None:
        config = {**config, "transformer": {**config["transformer"], "num_layers": num_layers}}
    return ModelSource(config, {"config": json.dumps(config)}, None)
