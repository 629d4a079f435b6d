"""Headers of LoRA files of the trainers in use: which tensors make up which layer, and how its update is scaled.

    official     diffusion_model.<module>.lora_A.weight [rank, in], .lora_B.weight [out, rank]      B A
    diffusers    transformer.<diffusers module>.lora_A.weight; scale in the header                  s B A
    PEFT         base_model.model.<module>.lora_A.weight; scale in adapter_config.json              s B A
    kohya, musubi-tuner    lora_unet_<module, "_" for ".">.lora_down.weight, .lora_up, .alpha       alpha / rank B A
    DiffSynth    <module>.lora_A.default.weight                                                     B A

Prefixes, suffixes and `.alpha` may be combined in any way. What multiplies B A besides rank is read wherever a writer
may have left it: a file whose alpha is ignored loads without an error and computes another model.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ltx_titan.weights.digest import check_contents
from ltx_titan.weights.metadata import CheckpointMetadata, read_metadata
from ltx_titan.weights.names import TRANSFORMER_PREFIX, listed, name_from_diffusers

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
_DOWN_SUFFIXES = (DOWN, ".lora_A.default.weight", ".lora_down.weight", ".lora.down.weight")
_UP_SUFFIXES = (UP, ".lora_B.default.weight", ".lora_up.weight", ".lora.up.weight")
_ALPHA = ".alpha"

OFFICIAL_PREFIX = "diffusion_model."
PEFT_PREFIX = "base_model.model."
_PREFIXES = (PEFT_PREFIX, TRANSFORMER_PREFIX, OFFICIAL_PREFIX, "transformer.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")
# diffusers writes the adapter's PEFT config here, its keys prefixed with the component.
_DIFFUSERS_CONFIG = "lora_adapter_metadata"
# No factor on weights is larger; integers of JSON have no limit.
_LARGEST_ALPHA = 1e30
# Parts of adapters that are no plain LoRA, for the message.
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a LoRA of convolutions",
}


@dataclass(frozen=True)
class LoRALayer:
    """One layer of a LoRA file.

    Attributes:
        down_key, up_key: file keys of A [rank, in] and B [out, rank].
        rank: of the update.
        weight_shape: (out, in) of the adapted weight.
        scale: factor on B A: alpha / rank, where the file or its companion states an alpha; else 1.
    """

    down_key: str
    up_key: str
    rank: int
    weight_shape: tuple[int, int]
    scale: float


def read_lora_layers(path: str | Path, modules: Iterable[str]) -> dict[str, LoRALayer]:
    """Reads the header of a LoRA file, and compares its contents with their digest.

    Args:
        path: a LoRA file in any of the forms above.
        modules: official names of the model's layers, which names with "_" for "." are looked up in.

    Returns:
        The layers by official name; a layer that the model does not have keeps its name in the file.

    Raises:
        ValueError: the file has other tensors than pairs of A and B, or none; A and B do not fit each other; the scale
            cannot be known; the file is damaged.
    """
    metadata = read_metadata(path)
    flat_names = {module.replace(".", "_"): module for module in modules}
    pairs: dict[str, dict[str, str]] = {}
    foreign = []
    for key, info in metadata.tensors.items():
        module, part = _split(key)
        if part is None or (part != _ALPHA and len(info.shape) != 2):
            foreign.append(key)
        else:
            name = _official(module, flat_names)
            other = pairs.setdefault(name, {}).setdefault(part, key)
            if other != key:
                # Names of two tools in one file, of which only one could be loaded.
                raise ValueError(
                    f"{path}: expected one {part.removeprefix('.')} of {name}, found {other} and {key}; remove one."
                )
    unpaired = [key for keys in pairs.values() if DOWN not in keys or UP not in keys for key in keys.values()]
    if foreign or unpaired or not pairs:
        raise ValueError(f"{path}: {_refusal(foreign, unpaired)}")
    check_contents(path)
    alphas = _Alphas.read(metadata, {name: keys[_ALPHA] for name, keys in pairs.items() if _ALPHA in keys})
    layers = {}
    for name, keys in pairs.items():
        (rank, width), (height, other_rank) = (metadata.tensors[keys[part]].shape for part in (DOWN, UP))
        if rank != other_rank or rank == 0:
            raise ValueError(f"{path}: {name}: lora_A has rank {rank} and lora_B {other_rank}; the file is damaged.")
        layers[name] = LoRALayer(keys[DOWN], keys[UP], rank, (height, width), alphas.scale(name, rank))
    return layers


@dataclass(frozen=True)
class _Alphas:
    """Alphas of a file: those of single layers, and PEFT's config of all.

    Attributes:
        path: of the config, or of the file without one.
        of_layers: by official layer name.
        config: PEFT's `LoraConfig` as a dictionary; empty if the file has none.
    """

    path: Path
    of_layers: Mapping[str, float]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, metadata: CheckpointMetadata, keys: Mapping[str, str]) -> "_Alphas":
        """Reads `.alpha` tensors by layer, and the config in the header or, for PEFT, in the file beside it.

        Raises:
            ValueError: an alpha is no number, or the config cannot be read.
        """
        for key in keys.values():
            if math.prod(shape := metadata.tensors[key].shape) != 1:
                raise ValueError(
                    f"{metadata.path}: {key}: expected one number, found shape {list(shape)}; the file is damaged."
                )
        with safe_open(metadata.path, framework="pt") as file:
            of_layers = {name: _finite(metadata.path, key, file.get_tensor(key).item()) for name, key in keys.items()}
        if _DIFFUSERS_CONFIG in metadata.raw:
            config = _parse(metadata.path, metadata.raw[_DIFFUSERS_CONFIG])
            # Keys carry the component: "transformer.lora_alpha".
            return cls(metadata.path, of_layers, {key.rpartition(".")[2]: value for key, value in config.items()})
        if not any(key.startswith(PEFT_PREFIX) for key in metadata.tensors) or of_layers:
            return cls(metadata.path, of_layers, {})
        beside = metadata.path.parent / "adapter_config.json"
        if not beside.is_file():
            raise ValueError(
                f"{metadata.path}: a PEFT file, whose alpha is in {beside.name} beside it; expected that file, found "
                f'none. Copy it, or write one: {{"lora_alpha": ALPHA}}.'
            )
        return cls(beside, of_layers, _parse(beside, beside.read_text(encoding="utf-8")))

    def scale(self, name: str, rank: int) -> float:
        """Factor on B A of one layer.

        Raises:
            ValueError: the config's alpha is no number, or a pattern of it is no regular expression.
        """
        if name in self.of_layers:
            return self.of_layers[name] / rank
        key, alpha = "lora_alpha", self.config.get("lora_alpha")
        patterns = self.config.get("alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{self.path}: alpha_pattern: expected an object, found {patterns!r:.80}; correct it.")
        for pattern, value in patterns.items():
            try:
                # As PEFT matches patterns: whole components at the end of the name.
                is_match = re.match(rf"(.*\.)?({pattern})$", name)
            except re.error as error:
                raise ValueError(
                    f"{self.path}: alpha_pattern: expected regular expressions, found {pattern!r:.80} ({error}); "
                    f"correct it."
                ) from error
            if is_match:
                key, alpha = f"alpha_pattern.{pattern}", value
        if alpha is None:
            return 1.0
        alpha = _finite(self.path, key, alpha)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _finite(path: Path, key: str, value: Any) -> float:
    """The value as a number.

    Raises:
        ValueError: it is none, too large for a factor, or 0, with which a layer would have no effect; the message has
            file and key.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and -_LARGEST_ALPHA < value < _LARGEST_ALPHA and value != 0):
        raise ValueError(f"{path}: {key}: expected a finite number other than 0, found {value!r:.80}; correct it.")
    return float(value)


def flat_prefix(key: str) -> str | None:
    """Prefix of a key or layer name that has "_" for "."; None for other names."""
    return next((prefix for prefix in _FLAT_PREFIXES if key.startswith(prefix)), None)


def _split(key: str) -> tuple[str, str | None]:
    """Module and part (`DOWN`, `UP`, `_ALPHA`) of a file key; None for other tensors."""
    for part, suffixes in ((DOWN, _DOWN_SUFFIXES), (UP, _UP_SUFFIXES), (_ALPHA, (_ALPHA,))):
        for suffix in suffixes:
            if key.endswith(suffix):
                return key.removesuffix(suffix), part
    return key, None


def _official(module: str, flat_names: Mapping[str, str]) -> str:
    if prefix := flat_prefix(module):
        return flat_names.get(module.removeprefix(prefix), module)
    for prefix in _PREFIXES:  # in this order, because PEFT's comes before the others
        module = module.removeprefix(prefix)
    # No part of an official name is a name of diffusers.
    return name_from_diffusers(module)


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the adapter's config is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: the adapter's config is {type(config).__name__}, expected an object.")
    return config


def _refusal(foreign: list[str], unpaired: list[str]) -> str:
    problems = {"other than LoRA weights": foreign, "without the other of A and B": unpaired}
    lines = [f"{len(keys)} tensors {problem}: {listed(keys)}" for problem, keys in problems.items() if keys]
    text = (
        f"expected a LoRA file (pairs {OFFICIAL_PREFIX}<layer>{DOWN} and {UP}, or those of diffusers, PEFT or kohya), "
        f"found {'; '.join(lines) or 'no LoRA weights'}."
    )
    kinds = {kind for part, kind in _OTHER_KINDS.items() if any(part in key for key in foreign)}
    if kinds:
        text += f" This is {' and '.join(sorted(kinds))}: merge it into its base with the tool that made it."
    return text
