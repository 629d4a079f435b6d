"""The text encoder of LTX-2.5: a Gemma 4 tuned for it, with its tokenizer, in one safetensors file.

The file is no folder that transformers reads. Its metadata holds the configuration (`gemma_config`), its tensors the
weights under one of two namings, the tokenizer (`tokenizer_json`) and small files of the original folder
(`hf_asset__<name>`) as bytes; the checkpoint's text projection lies beside them. The language model alone is taken from
it; the vision and audio parts of a multimodal file stay where they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ltx_titan.weights.single_file import SingleFile, check_names, check_shapes, open_header

_TOKENIZER = "tokenizer_json"
_ASSET = "hf_asset__"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class PackedGemma:
    """What the header of a packed text encoder says.

    Attributes:
        file: the file.
        config: configuration of the language model.
        version: which tuning it is (`gemma4-12b-ltx-v1`), None where the file does not say.
    """

    file: SingleFile
    config: PretrainedConfig
    version: str | None


def open_packed_gemma(path: str | Path) -> PackedGemma:
    """Read the header of a packed text encoder.

    Raises:
        ValueError: the file is none, or the installed transformers has no class for its model.
    """
    file = open_header(path)
    metadata = file.metadata
    text = metadata.raw.get("gemma_config")
    if text is None:
        raise ValueError(
            f"{path}: metadata has no 'gemma_config' (found keys {sorted(metadata.raw)}), so this is no packed text "
            "encoder; give the file under text_encoders/ of the LTX-2.5 pack, or a folder of Gemma 3 for LTX-2 and 2.3"
        )
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: metadata entry 'gemma_config' is not JSON: {error}") from error
    if _TOKENIZER not in file.names:
        raise ValueError(f"{path}: lacks the tensor {_TOKENIZER!r}, in which the packed file keeps its tokenizer")
    return PackedGemma(file, _text_config(path, config), config.get("gemma_version"))


def load_packed_model(packed: PackedGemma, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The language model, strictly: every weight is in the file and has its shape.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    file = packed.file
    with torch.device("meta"):
        model = AutoModel.from_config(packed.config)
    is_nested = any(name.startswith("model.language_model.") for name in file.names)
    prefix = "model.language_model." if is_nested else "model."
    own = model.state_dict()
    covers = (prefix,) if is_nested else tuple({f"{prefix}{name.partition('.')[0]}." for name in own})
    names = {name: prefix + name for name in own}
    check_names(file, set(names.values()), covers)
    check_shapes(file, {stored: tuple(own[name].shape) for name, stored in names.items()})
    if torch.device(device).type == "meta":
        return model
    with safe_open(file.path, framework="pt") as handle:
        weights = {name: handle.get_tensor(stored) for name, stored in names.items()}
    # Through transformers rather than `load_state_dict`: it also computes the buffers that no file stores.
    return type(model).from_pretrained(None, config=packed.config, state_dict=weights, dtype=dtype).to(device)


def load_packed_tokenizer(packed: PackedGemma) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as the file has it, told which of its tokens are special.

    Raises:
        ValueError: it cannot be read, or names no token for the beginning of a text.
    """
    path = packed.file.path
    try:
        tokenizer = Tokenizer.from_str(_text(packed.file, _TOKENIZER))
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{path}: its tensor {_TOKENIZER!r} is no tokenizer ({error})") from error
    asset = f"{_ASSET}tokenizer_config.json"
    settings = json.loads(_text(packed.file, asset)) if asset in packed.file.names else {}
    special = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        index = getattr(packed.config, f"{name}_id", None)
        if token is None and isinstance(index, int):
            token = tokenizer.id_to_token(index)
        if token is not None:
            special[name] = token
    if "bos_token" not in special:
        raise ValueError(
            f"{path}: neither {asset} nor gemma_config name a bos_token; captions begin with one, so this file's "
            "tokenizer cannot be used as it is"
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _text_config(path: str | Path, config: dict[str, Any]) -> PretrainedConfig:
    text = config.get("text_config", config)
    kind = text.get("model_type") or f"{config.get('model_type')}_text"
    if not kind.startswith("gemma4"):
        raise ValueError(f"{path}: gemma_config describes a {kind!r}, expected a Gemma 4 (gemma4..._text)")
    try:
        return AutoConfig.for_model(kind, **{key: value for key, value in text.items() if key != "model_type"})
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: transformers {transformers.__version__} has no model of type {kind!r}, the text encoder's; "
            "install transformers 5.23 or newer"
        ) from error


def _text(file: SingleFile, name: str) -> str:
    info = file.metadata.tensors[name]
    if info.dtype != "U8":
        raise ValueError(f"{file.path}: tensor {name!r} is {info.dtype}, expected the bytes of a text (U8)")
    with file.path.open("rb") as handle:
        handle.seek(info.start)
        return handle.read(info.end - info.start).decode()
