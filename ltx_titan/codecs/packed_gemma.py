"""The text encoder of LTX-2.5: a fine-tuned Gemma 4 with its tokenizer, in one safetensors file.

transformers cannot load the file directly. Its metadata has the configuration (`gemma_config`), its tensors are the
weights under one of two naming schemes, the tokenizer (`tokenizer_json`) and small files of the original folder
(`hf_asset__<name>`) as bytes, and the checkpoint's text projection. Only the language model is loaded; the vision and
audio parts of a multimodal file are not read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ltx_titan.weights import CheckpointMetadata, Component, read_metadata, read_tensors

_TOKENIZER = "tokenizer_json"
_ASSET = "hf_asset__"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class PackedGemma:
    """The header of a packed text encoder.

    Attributes:
        metadata: of the file.
        config: configuration of the language model.
        version: name of the fine-tuned model (`gemma4-12b-ltx-v1`); None if the file does not specify it.
    """

    metadata: CheckpointMetadata
    config: PretrainedConfig
    version: str | None


def open_packed_gemma(path: str | Path) -> PackedGemma:
    """Reads the header of a packed text encoder.

    Raises:
        ValueError: the file is not a packed text encoder, or the installed transformers has no class for its model.
    """
    metadata = read_metadata(path)
    text = metadata.raw.get("gemma_config")
    if text is None:
        raise ValueError(
            f"{path}: metadata has no 'gemma_config' (found keys {sorted(metadata.raw)}), so this is not a packed text "
            "encoder; use the file under text_encoders/ of the LTX-2.5 pack, or a folder of Gemma 3 for LTX-2 and 2.3"
        )
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: metadata entry 'gemma_config' is not JSON: {error}") from error
    if _TOKENIZER not in metadata.tensors:
        raise ValueError(f"{path}: lacks the tensor {_TOKENIZER!r} with the tokenizer; download the packed file again")
    settings = _text_config(path, config)
    return PackedGemma(metadata, settings, config.get("gemma_version"))


def load_packed_model(packed: PackedGemma, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the language model strictly: every weight is in the file and has its shape.

    Args:
        packed: from `open_packed_gemma`.
        device: destination; on `meta` the file is checked and not read.
        dtype: of the weights.

    Raises:
        ValueError: weights are missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = AutoModel.from_config(packed.config, trust_remote_code=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    nested = "model.language_model."
    prefixes: tuple[str, ...]
    # Two namings are in circulation: that of the multimodal class, with the language model nested, and a flat one.
    if packed.metadata.prefix(nested):
        prefix, prefixes = nested, (nested,)
    else:
        # Other parts of a multimodal file share the prefix "model.", so only the model's own children are checked.
        prefix, prefixes = "model.", tuple({f"model.{name.partition('.')[0]}." for name in shapes})
    component = Component.from_keys("text encoder", {name: prefix + name for name in shapes}, prefixes)
    weights = read_tensors(packed.metadata, shapes, component, device="meta" if _is_meta(device) else "cpu")
    if _is_meta(device):
        return model
    # Through transformers rather than `load_state_dict`: it also computes the buffers that no file stores.
    return type(model).from_pretrained(None, config=packed.config, state_dict=weights, dtype=dtype).to(device)


def load_packed_tokenizer(packed: PackedGemma) -> PreTrainedTokenizerFast:
    """Loads the file's tokenizer unchanged and declares its special tokens.

    Raises:
        ValueError: it cannot be read, or no BOS token is specified.
    """
    path = packed.metadata.path
    try:
        tokenizer = Tokenizer.from_str(_text(packed.metadata, _TOKENIZER))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{path}: the tensor {_TOKENIZER!r} is not a tokenizer ({error})") from error
    asset = f"{_ASSET}tokenizer_config.json"
    settings = json.loads(_text(packed.metadata, asset)) if asset in packed.metadata.tensors else {}
    special = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        if isinstance(token, dict):  # an AddedToken serialized with its options
            token = token.get("content")
        # Without tokenizer settings the config has at least the ids.
        index = getattr(packed.config, f"{name}_id", None)
        if token is None and isinstance(index, int):
            token = tokenizer.id_to_token(index)
        if token is not None:
            special[name] = token
    if "bos_token" not in special:
        raise ValueError(
            f"{path}: expected a bos_token in {asset} or gemma_config, found none; captions start with one, so use the "
            "official packed file"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _text_config(path: str | Path, config: dict[str, Any]) -> PretrainedConfig:
    # The config of a multimodal model, or of its language model alone.
    text = config.get("text_config", config) if isinstance(config, dict) else None
    if not isinstance(text, dict):
        raise ValueError(
            f"{path}: expected a table of settings in gemma_config, found another value; download it again"
        )
    # A nested config may omit its own type.
    kind = str(text.get("model_type") or f"{config.get('model_type')}_text")
    if not kind.startswith("gemma4"):
        raise ValueError(f"{path}: gemma_config describes a {kind!r}, expected a Gemma 4 (gemma4..._text)")
    try:
        return AutoConfig.for_model(kind, **{key: value for key, value in text.items() if key != "model_type"})
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model of type {kind!r}, the text encoder's; "
            "install transformers 5.23 or newer"
        ) from error


def _is_meta(device: str | torch.device) -> bool:
    return torch.device(device).type == "meta"


def _text(metadata: CheckpointMetadata, name: str) -> str:
    info = metadata.tensors[name]
    if info.dtype != "U8":
        raise ValueError(f"{metadata.path}: tensor {name!r} is {info.dtype}, expected the bytes of a text (U8)")
    with metadata.path.open("rb") as handle:
        handle.seek(info.start)
        return handle.read(info.end - info.start).decode()
