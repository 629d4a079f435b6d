"""A tiny text encoder packed as LTX-2.5's: Gemma 4, tokenizer without a post-processor, projection, all in one file."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel

from ltx_titan.model import FeatureExtractor
from ltx_titan.model.init import init_random_
from ltx_titan.nano.pack_config import CONFIG

VERSION = "gemma4-12b-ltx-v1"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")
TEXT = {
    "model_type": "gemma4_unified_text",
    "vocab_size": len(SPECIAL) + 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GEMMA_CONFIG = {"model_type": "gemma4_unified", "gemma_version": VERSION, "text_config": TEXT}
SOURCE = json.dumps({"ltx_version": "2.5.0", "gemma_version": VERSION})


def language_model():
    """The model in the packed file, with weights that give every layer an effect."""
    config = AutoConfig.for_model(**TEXT)
    model = AutoModel.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            noise = torch.randn(tensor.shape, generator=generator)
            # Norm weights around 1, matrices that preserve the variance.
            tensor.copy_(noise * 0.3 + 1 if tensor.ndim < 2 else noise * tensor.shape[-1] ** -0.5)
    return model


def tokenizer():
    """One token per byte; like Gemma 4's, it adds no BOS."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    found = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return found


def as_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def packed_tensors(naming="model.language_model."):
    """All tensors of the file by name; `naming` is the prefix of the language model."""
    extractor = FeatureExtractor.from_config(CONFIG, {"hidden_size": 32, "num_hidden_layers": 6})
    init_random_(extractor, 1)
    tensors = {f"{naming}{name}": tensor.clone() for name, tensor in language_model().state_dict().items()}
    tensors |= {f"text_embedding_projection.{name}": tensor for name, tensor in extractor.state_dict().items()}
    settings = {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    # Another part of a multimodal file, which is not read.
    others = "model.embed_vision.patch_dense.weight" if naming != "model." else "vision_model.patch_dense.weight"
    return tensors | {
        "tokenizer_json": as_bytes(tokenizer().to_str()),
        "hf_asset__tokenizer_config.json": as_bytes(json.dumps(settings)),
        others: torch.zeros(2, 2),
    }


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
