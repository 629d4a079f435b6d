"""Types of what a file says about itself: the header of a safetensors file and the config object in its metadata.

Both come from anywhere, so nothing else in the project reads a value of them before this module has checked its type
and range. Keys that no reader uses are not checked, and are kept. Values are strict, as in a job: `"32"` is not 32.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ltx_titan.config.errors import EXPECTED_TYPES, as_toml

# Dtypes of the format. A file with any other cannot be opened; some of these are refused only when they are loaded.
_FORMAT_DTYPES = (
    *("BOOL", "U8", "I8", "U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64", "F64", "C64"),
    *("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2"),
)

# Far above every release, and far below what would take minutes to build.
Size = Annotated[int, Field(ge=1, le=2**20)]
_Count = Annotated[int, Field(ge=1, le=1000)]
_Number = Annotated[float, Field(gt=0.0, le=1e12)]
_Positions = Annotated[list[_Number], Field(min_length=1, max_length=1)]
# Kind and options; JSON has lists only, which a strict model would refuse for a tuple.
_Blocks = list[Annotated[tuple[str, dict[str, Any] | int], Field(strict=False)]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Entry(_Part):
    """Header entry of one tensor."""

    dtype: str
    shape: list[Annotated[int, Field(ge=0, lt=2**63)]]
    data_offsets: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=2, max_length=2)]


class _Transformer(_Part):
    """`config.transformer`: the sizes of the model and of its text connectors."""

    num_layers: _Count = 48
    num_attention_heads: Size = 32
    attention_head_dim: Size = 128
    in_channels: Size = 128
    out_channels: Size = 128
    cross_attention_dim: Size = 4096
    caption_channels: Size = 3840
    positional_embedding_max_pos: Annotated[list[_Number], Field(min_length=3, max_length=3)] = [20, 2048, 2048]
    audio_num_attention_heads: Size = 32
    audio_attention_head_dim: Size = 64
    audio_in_channels: Size = 128
    audio_out_channels: Size = 128
    audio_cross_attention_dim: Size = 2048
    audio_positional_embedding_max_pos: _Positions = [20]
    ff_bias: bool = True
    audio_ff_bias: bool = True
    norm_eps: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-6
    positional_embedding_theta: _Number = 10000.0
    timestep_scale_multiplier: _Number = 1000
    av_ca_timestep_scale_multiplier: _Number = 1
    rope_type: str = "split"
    frequencies_precision: str | None = None
    apply_gated_attention: bool = False
    cross_attention_adaln: bool = False
    use_prompt_adaln_single: bool = True
    use_keyframes_abs_pos_embedding: bool = False
    caption_proj_before_connector: bool | None = None
    caption_projection_first_linear: bool | None = None
    caption_proj_input_norm: bool | None = None
    caption_projection_second_linear: bool | None = None
    connector_num_attention_heads: Size = 30
    connector_attention_head_dim: Size = 128
    connector_num_layers: _Count = 2
    audio_connector_num_attention_heads: Size = 30
    audio_connector_attention_head_dim: Size = 128
    audio_connector_num_layers: _Count = 2
    connector_positional_embedding_max_pos: _Positions = [1]
    connector_num_learnable_registers: Size | None = 128
    connector_apply_gated_attention: bool = False
    connector_ff_bias: bool = True


class _VideoEncoder(_Part):
    blocks: _Blocks | None = None
    patch_size: _Count = 4


class _VideoVae(_Part):
    """`config.vae`."""

    encoder_blocks: _Blocks | None = None
    decoder_blocks: _Blocks | None = None
    encoder: _VideoEncoder | None = None
    patch_size: _Count = 4
    latent_channels: Size = 128
    in_channels: Size = 3
    out_channels: Size = 3
    decoder_base_channels: Size = 128
    causal_decoder: bool = False


class _Network(_Part):
    ch: Size = 128
    out_ch: Size = 2
    ch_mult: list[Size] = [1, 2, 4]
    # 0 is an architecture too: levels of a resampler each, and one block per level in the decoder.
    num_res_blocks: Annotated[int, Field(ge=0, le=1000)] = 2
    attn_resolutions: list[Size] | None = None
    in_channels: Size = 2
    resolution: Size = 256
    z_channels: Size = 8
    mel_bins: Size | None = 64


class _AudioParameters(_Part):
    ddconfig: _Network | None = None
    sampling_rate: Size = 16000


class _AudioModel(_Part):
    params: _AudioParameters = _AudioParameters()


class _Stft(_Part):
    filter_length: Size = 1024
    hop_length: Size = 160


class _Mel(_Part):
    n_mel_channels: Size = 64
    mel_fmin: Annotated[float, Field(ge=0.0)] = 0.0
    mel_fmax: _Number = 8000.0


class _Preprocessing(_Part):
    stft: _Stft = _Stft()
    mel: _Mel = _Mel()


class _AudioVae(_Part):
    """`config.audio_vae`."""

    model: _AudioModel = _AudioModel()
    preprocessing: _Preprocessing = _Preprocessing()


class _Generator(_Part):
    upsample_initial_channel: Size = 1024
    upsample_rates: list[Size] = []
    upsample_kernel_sizes: list[Size] = []
    resblock_kernel_sizes: list[Size] = []
    resblock_dilation_sizes: list[list[Size]] = []
    output_sampling_rate: Size = 24000
    input_sampling_rate: Size = 16000
    n_fft: Size = 512
    hop_length: Size = 80
    win_size: Size = 512
    num_mels: Size = 64


class _Vocoder(_Generator):
    """`config.vocoder`: one generator, or two under `vocoder` and `bwe`."""

    vocoder: _Generator | None = None
    bwe: _Generator | None = None


class _Config(_Part):
    transformer: _Transformer | None = None
    vae: _VideoVae | None = None
    audio_vae: _AudioVae | None = None
    vocoder: _Vocoder | None = None


_HEADER = TypeAdapter(dict[str, _Entry])
_STRINGS = TypeAdapter(dict[str, Annotated[str, Field(strict=True)]])


def parse_header(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Parses the JSON header of a safetensors file.

    Returns:
        Tensor entries (`dtype`, `shape`, `data_offsets`) by name, in the order of the file, and `__metadata__`.

    Raises:
        ValueError: it is not JSON, or a value has another type; names the file and the key.
    """
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a safetensors file (its header is not JSON: {error}).") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: not a safetensors file (its header is {type(header).__name__}, expected an object).")
    raw = header.pop("__metadata__", {})
    where = f"{path}: header"
    _validate(_STRINGS, raw, f"{where}.__metadata__")
    _validate(_HEADER, header, where)
    for name, entry in header.items():
        if entry["dtype"] not in _FORMAT_DTYPES:
            raise ValueError(
                f"{where}.{name}.dtype = {as_toml(entry['dtype'])}: expected one of {', '.join(_FORMAT_DTYPES)}; "
                "the file is damaged: download or copy it again."
            )
    return header, raw


def check_config(where: str | Path, config: Any) -> None:
    """Checks types and ranges of everything that is read from a checkpoint's config object.

    Args:
        where: the file, for messages.
        config: the parsed `config` entry; sections that are null are fine.

    Raises:
        ValueError: a value has another type or is out of range; names the file and the key.
    """
    _validate(TypeAdapter(_Config), config, f"{where}: config")


def _validate(adapter: TypeAdapter[Any], value: Any, where: str) -> None:
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        # A union's alternatives are part of pydantic's location, and of no file.
        parts = [
            str(part) for part in detail["loc"] if not str(part).startswith(("list[", "function-", "int", "float"))
        ]
        expected = EXPECTED_TYPES.get(detail["type"]) or detail["msg"].removeprefix("Input should be ")
        raise ValueError(
            f"{'.'.join([where, *parts])} = {as_toml(detail['input'])}: expected {expected}. The file is damaged or of "
            "another tool; use the official one."
        ) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    # Python keeps the last of two equal keys, other readers the first or none: the file would mean two things.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries are called {next(name for name in names if names.count(name) > 1)!r}")
    return found
