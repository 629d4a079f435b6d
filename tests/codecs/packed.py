"""A tiny text encoder packed as LTX-2.5's: Gemma 4, tokenizer without a post-processor, projection, all in one file."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ltx_titan.nano.pack_config import CONFIG
from ltx_titan.nano.split_pack import GEMMA_CONFIG, SOURCE, language_model, packed_tensors, tokenizer
from ltx_titan.nano.split_pack import GEMMA_VERSION as VERSION
from ltx_titan.nano.split_pack import TEXT_CONFIG as TEXT
from ltx_titan.nano.text_encoder import SPECIAL_TOKENS as SPECIAL

__all__ = ["GEMMA_CONFIG", "SOURCE", "SPECIAL", "TEXT", "VERSION", "language_model", "packed_tensors", "tokenizer"]


def write_packed(path: Path, tensors=None, config=None) -> Path:
    """The packed file."""
    metadata = {"format": "pt", "gemma_config": json.dumps(config or GEMMA_CONFIG)}
    save_file(tensors or packed_tensors(), path, metadata)
    return path


def write_transformer_file(path: Path, **metadata) -> Path:
    """A transformer file of the same release, without text projection."""
    config = {"transformer": CONFIG["transformer"], "vae": None, "audio_vae": None, "vocoder": None}
    save_file(
        {"model.diffusion_model.patchify_proj.bias": torch.zeros(1)}, path, {"config": json.dumps(config), **metadata}
    )
    return path
