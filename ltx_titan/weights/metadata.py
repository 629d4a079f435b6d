"""Headers of safetensors files: model config, version, and the name, dtype and shape of every tensor.

Only the header is read (a few hundred kilobytes of a 46 GB file), so that a job's paths and its model can be checked
before any process group or GPU is touched. The model's architecture is decided by the config in the header and by
nothing else: there is no version switch.
"""

import json
import time
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from ltx_titan.common.tensors import SAFETENSORS_DTYPES
from ltx_titan.weights.digest import DIGEST_KEY
from ltx_titan.weights.schema import check_config, parse_header
from ltx_titan.weights.shapes import released_config

DEFAULT_SCALE_FACTORS = (8, 32, 32)
# The format's own limit; a larger number means that the first eight bytes are not a header length.
_MAX_HEADER_BYTES = 100_000_000
# Some file systems store times in steps of up to two seconds.
_RECENT_NS = 4_000_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Header entry of one tensor. `start` and `end` are byte offsets into the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class CheckpointMetadata:
    """The header of a checkpoint file.

    Attributes:
        path: the file.
        config: the parsed `config` entry; sections that are null (in split files) are empty objects.
        model_version: such as "2.3.0", or None.
        raw: the header's unparsed `__metadata__`, strings to strings, without the digest of the contents.
        tensors: entry of every tensor by file key.
    """

    path: Path
    config: dict[str, Any]
    model_version: str | None
    raw: dict[str, str] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def transformer_config(self) -> dict[str, Any]:
        """The `transformer` section of the config.

        Raises:
            ValueError: the section is missing; the message describes what the file contains instead.
        """
        config = self.config.get("transformer")
        if not config:
            raise ValueError(
                f"{self.path}: the metadata has no 'config.transformer', so the model cannot be built from it. "
                f"This {_describe(self)}. Set model.checkpoint_path to an official LTX-2 checkpoint "
                "(for LTX-2.5 the file under diffusion_models/)."
            )
        # Before a model is built: a wrong number would build, and list as missing, thousands of tensors.
        layers, blocks = config.get("num_layers", 48), self._num_blocks()
        if blocks not in (0, layers):
            raise ValueError(
                f"{self.path}: config.transformer.num_layers = {layers}: expected {blocks}, the number of transformer "
                "blocks in the file. The file is damaged or was edited; use the official one."
            )
        return config

    def _num_blocks(self) -> int:
        """Number of transformer blocks in the file."""
        numbers = {name.partition("transformer_blocks.")[2].partition(".")[0] for name in self.tensors}
        # The connectors have `transformer_1d_blocks`.
        return len({number for number in numbers if number.isdecimal()})

    def section(self, name: str, component: str) -> dict[str, Any]:
        """Section `name` of the config, for instance `vae`.

        Args:
            name: key in the config.
            component: what it configures, for the message.

        Raises:
            ValueError: the file does not describe that component.
        """
        section = self.config.get(name)
        if not section:
            raise ValueError(
                f"{self.path}: the metadata has no 'config.{name}', so there is no {component} to build from it. "
                f"This {_describe(self)}. Use the official file that contains the {component}."
            )
        return section

    def range_of(self, key: str) -> tuple[int, int]:
        """Bytes of a tensor in the file: start and end."""
        return self.tensors[key].start, self.tensors[key].end

    def prefix(self, prefix: str) -> str:
        """Returns `prefix` if tensors have it, else the empty string: files of a split pack use bare names."""
        return prefix if any(name.startswith(prefix) for name in self.tensors) else ""


@dataclass(frozen=True)
class ModelSource:
    """Config and weights that a job's transformer is built from.

    Attributes:
        config: the config object of checkpoint metadata, with the key `transformer`.
        metadata: all metadata entries, copied into exports.
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
        ValueError: the file is missing, truncated or has no transformer; the shape is unknown.
    """
    if checkpoint_path is not None:
        metadata = read_metadata(checkpoint_path)
        metadata.transformer_config()  # raises for a file without a transformer
        return ModelSource(metadata.config, dict(metadata.raw), metadata.path)
    assert shape is not None, "random weights need a shape"
    config = released_config(shape)
    if num_layers is not None:  # a smaller model with blocks of the full size
        config = {**config, "transformer": {**config["transformer"], "num_layers": num_layers}}
    return ModelSource(config, {"config": json.dumps(config)}, None)


def read_metadata(path: str | Path) -> CheckpointMetadata:
    """Reads and checks the header of a safetensors file.

    Args:
        path: a `.safetensors` file.

    Raises:
        ValueError: the file is missing, is not a safetensors file, or is cut short.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a file (.safetensors), such as those in a run's export folder.")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a checkpoint (.safetensors), correct the path.")
    status = path.stat()
    # A job asks for the same header a dozen times, which holds some 5,000 tensors. A file that has just been written
    # could be written again within the clock's resolution, and is read each time.
    if time.time_ns() - status.st_mtime_ns < _RECENT_NS:
        return _parse_file(path)
    cached = _parse_unchanged_file(path, status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
    return replace(cached, config=deepcopy(cached.config), raw=dict(cached.raw))


@lru_cache(maxsize=8)
def _parse_unchanged_file(path: Path, *status: int) -> CheckpointMetadata:
    return _parse_file(path)


def _parse_file(path: Path) -> CheckpointMetadata:
    header, raw, data_start = _read_header(path)
    tensors = {name: _tensor_info(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, tensors, data_start)
    # An interrupted download has a valid header; only the sizes reveal it before the last tensors are read.
    expected = max((info.end for info in tensors.values()), default=data_start)
    found = path.stat().st_size
    if found != expected:
        problem = "cut short (an interrupted download or copy?)" if found < expected else "longer than its tensors"
        raise ValueError(
            f"{path}: file is {problem}: expected {expected:,} bytes, found {found:,}. Download or copy it again."
        )
    # Of this file's contents: no entry to show, nor to copy into other files.
    raw = {key: value for key, value in raw.items() if key != DIGEST_KEY}
    return CheckpointMetadata(path, _parse_config(path, raw), raw.get("model_version"), raw, tensors)


def read_config(path: str | Path) -> dict[str, Any]:
    """Reads the config object of a checkpoint.

    Raises:
        ValueError: as `read_metadata`, or the metadata has no config.
    """
    metadata = read_metadata(path)
    if not metadata.config:
        raise ValueError(
            f"{path}: the metadata has no JSON object 'config' (found keys {sorted(metadata.raw)}), which the sizes of "
            "all models are read from. Use the official file rather than a converted one."
        )
    return metadata.config


def scale_factors(config: dict[str, Any]) -> tuple[int, int, int]:
    """Compression of the video autoencoder as (time, height, width).

    Each block of `vae.encoder_blocks` (or `vae.decoder_blocks`) whose name starts with `compress_space` or
    `compress_all` halves space, with `compress_time` or `compress_all` halves time; the patch size is another factor
    of space.

    Args:
        config: the whole config object of a checkpoint's metadata.

    Returns:
        The factors; 8, 32, 32 if the config lists no blocks (audio-only files, the nested config of LTX-2.5).
    """
    vae = config.get("vae") or {}
    blocks = vae.get("encoder_blocks") or vae.get("decoder_blocks")
    # The nested config of LTX-2.5 lists them elsewhere; all releases compress alike.
    if not isinstance(blocks, list):
        return DEFAULT_SCALE_FACTORS
    # The patch size acts on space only: the codec patchifies each frame.
    time, space = 1, int(vae.get("patch_size", 4))
    for name, _ in blocks:
        if name.startswith(("compress_space", "compress_all")):
            space *= 2
        if name.startswith(("compress_time", "compress_all")):
            time *= 2
    return time, space, space


def _read_header(path: Path) -> tuple[dict[str, Any], dict[str, str], int]:
    """The header's entries, its `__metadata__`, and the offset at which tensor data starts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file (found {size:,} bytes, a header length of {length:,}).")
        # Other formats start with other bytes, whose number would read as a length.
        if size > 8 and file.read(1) != b"{":
            raise ValueError(f"{path}: not a safetensors file (found no JSON object at byte 8).")
        if size < 8 + length:
            raise ValueError(
                f"{path}: file is cut short: the header alone needs {8 + length:,} bytes, found {size:,}. "
                "Download or copy it again."
            )
        file.seek(8)
        text = file.read(length)
    return *parse_header(path, text), 8 + length


def _tensor_info(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    # Unknown dtypes (packed 4-bit formats) are refused only when such a tensor is loaded.
    if dtype in SAFETENSORS_DTYPES:
        needed = prod(shape) * SAFETENSORS_DTYPES[dtype].itemsize
        if needed != end - start:
            raise ValueError(
                f"{path}: tensor '{name}' of shape {list(shape)} and dtype {dtype} needs {needed:,} bytes, the header "
                f"has {end - start:,}. The file is damaged: download or copy it again."
            )
    return TensorInfo(dtype, shape, data_start + start, data_start + end)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], data_start: int) -> None:
    """Checks that the tensors cover the data without gap or overlap, as the format demands."""
    # A reader that trusts the offsets would take one tensor's bytes for another's.
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end or info.end < info.start:
            raise ValueError(
                f"{path}: tensor '{name}' has data_offsets {[info.start - data_start, info.end - data_start]}, expected"
                f" it to start at {end - data_start}, where the one before it ends. The file is damaged: download or "
                "copy it again."
            )
        end = info.end


def _parse_config(path: Path, raw: dict[str, str]) -> dict[str, Any]:
    if "config" not in raw:
        return {}
    try:
        config = json.loads(raw["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata entry 'config' is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: metadata entry 'config' is {type(config).__name__}, expected an object.")
    check_config(path, config)
    # Split packs write null for components of other files; an empty object needs no special case in readers.
    return {section: {} if value is None else value for section, value in config.items()}


def _describe(metadata: CheckpointMetadata) -> str:
    """Describes a file that lacks the expected config section, as a predicate: "holds a text encoder"."""
    names = list(metadata.tensors)
    sections = ", ".join(section for section, config in metadata.config.items() if config) or "none"
    summary = f"has {len(names)} tensors (first: {', '.join(names[:3]) or 'none'}) and config sections: {sections}"
    if metadata.config.get("transformer"):
        return summary
    if any(".lora_" in name or ".lora." in name for name in names):
        return "is a LoRA file"
    # After LoRA files, whose names contain those of the blocks as well.
    if any("transformer_blocks.0." in name for name in names):
        return (
            "holds transformer weights without the official metadata (another trainer's or a converted file); "
            "use the official file, or export one that carries its config"
        )
    if any(name.startswith(("encoder.", "decoder.", "vae.", "audio_vae.")) for name in names):
        return "holds an autoencoder and no transformer"
    if "gemma_config" in metadata.raw or any("embed_tokens" in name for name in names):
        return "holds a text encoder"
    return summary
