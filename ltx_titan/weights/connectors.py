"""The text connectors of a checkpoint, whole and on one device: for preprocessing and for prompts.

Training shards them instead; see `ltx_titan.build`.
"""

from pathlib import Path

import torch

from ltx_titan.model import TextConnectors
from ltx_titan.weights.load import load_parameters
from ltx_titan.weights.metadata import read_metadata
from ltx_titan.weights.names import CONNECTORS


def load_text_connectors(path: str | Path, device: str | torch.device, dtype: torch.dtype) -> TextConnectors:
    """Loads both connectors, frozen.

    Args:
        path: the single-file checkpoint.
        device: where they run.
        dtype: of their weights.

    Raises:
        ValueError: the file holds none, or ones that do not match its metadata.
    """
    with torch.device("meta"):
        connectors = TextConnectors.from_config(read_metadata(path).config).to(dtype)
    connectors.to_empty(device=device)
    load_parameters(connectors, path, component=CONNECTORS)
    return connectors.requires_grad_(False).eval()
