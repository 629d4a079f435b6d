"""Names of tensors: in official checkpoint files, in an adapted model, and in diffusers.

A single-file checkpoint holds several components, distinguished by key prefixes. Two of them share a prefix: the text
connectors are stored under the transformer's. A `Component` maps a file key to the name its module uses, and back;
everything else works on module names. An adapted model keeps each frozen layer as the child `base` of its LoRA layer;
`official_name` removes that level. All translations between naming schemes are in this file.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.model.parts import stream_of

TRANSFORMER_PREFIX = "model.diffusion_model."
TEXT_PROJECTION_PREFIX = "text_embedding_projection."
VIDEO_CONNECTOR = "video_embeddings_connector."
AUDIO_CONNECTOR = "audio_embeddings_connector."
# Video-only files have a single connector, whose name has no stream prefix.
LONE_VIDEO_CONNECTOR = "embeddings_connector."

ADAPTER_PARTS = ("lora_A", "lora_B", "magnitude")
_QUANTIZED_PARTS = ("qdata", "scale")

# Whole path components: "adaln_single" is also the end of other components.
_FROM_DIFFUSERS = {
    "proj_in": "patchify_proj",
    "audio_proj_in": "audio_patchify_proj",
    "time_embed": "adaln_single",
    "audio_time_embed": "audio_adaln_single",
    "prompt_adaln": "prompt_adaln_single",
    "audio_prompt_adaln": "audio_prompt_adaln_single",
    "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
    "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
    "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
    "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
}

_TO_DIFFUSERS = {official: diffusers for diffusers, official in _FROM_DIFFUSERS.items()}

Modalities = Literal["av", "video", "audio"]


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint.

    Attributes:
        name: used in messages.
        module_name: file key -> name within the module; None for keys of other components.
        file_key: name within the module -> file key, as exports write it.
    """

    name: str
    module_name: Callable[[str], str | None]
    file_key: Callable[[str], str]

    @classmethod
    def from_keys(cls, name: str, keys: dict[str, str], prefixes: tuple[str, ...] = ()) -> "Component":
        """A component given by a table, for modules whose names differ from the file's in more than a prefix.

        Args:
            name: used in messages.
            keys: name within the module -> file key.
            prefixes: every file key that starts with one of these belongs to the component, so that one without an
                entry in `keys` is reported as unexpected. It keeps its file key as its name.
        """
        names = {key: name for name, key in keys.items()}
        assert len(names) == len(keys), f"{name}: two parameters have one file key"
        # str.startswith(()) is False, so without prefixes only the keys of the table belong to the component.
        return cls(name, lambda key: names.get(key, key if key.startswith(prefixes) else None), keys.__getitem__)


def _transformer_name(key: str) -> str | None:
    name = key.removeprefix(TRANSFORMER_PREFIX)
    is_connector = name.startswith((VIDEO_CONNECTOR, AUDIO_CONNECTOR, LONE_VIDEO_CONNECTOR))
    # `name != key`: a key without the prefix belongs to another component.
    return name if name != key and not is_connector else None


def _connector_name(key: str) -> str | None:
    name = key.removeprefix(TRANSFORMER_PREFIX)
    if name == key:
        return None
    if name.startswith(LONE_VIDEO_CONNECTOR):
        return VIDEO_CONNECTOR + name.removeprefix(LONE_VIDEO_CONNECTOR)
    return name if name.startswith((VIDEO_CONNECTOR, AUDIO_CONNECTOR)) else None


def _projection_name(key: str) -> str | None:
    return key.removeprefix(TEXT_PROJECTION_PREFIX) if key.startswith(TEXT_PROJECTION_PREFIX) else None


TRANSFORMER = Component("transformer", _transformer_name, lambda name: TRANSFORMER_PREFIX + name)
CONNECTORS = Component("text connectors", _connector_name, lambda name: TRANSFORMER_PREFIX + name)
TEXT_PROJECTION = Component("text projection", _projection_name, lambda name: TEXT_PROJECTION_PREFIX + name)


def unused_by(modalities: Modalities) -> Callable[[str], bool]:
    """Returns a predicate: transformer parameters that a model built for `modalities` does not have.

    A video model built from an audio-video file ignores the other stream's weights; pass this as `allow_unused`.
    """
    return lambda name: modalities != "av" and stream_of(name) != modalities


def official_name(name: str) -> str | None:
    """Official name of a module or parameter of an adapted model.

    Returns:
        The name without wrapper levels and without `base`; None for adapters and quantized data, which no official
        checkpoint has.
    """
    parts = without_wrappers(name).split(".")
    if any(part in ADAPTER_PARTS for part in parts) or parts[-1] in _QUANTIZED_PARTS:
        return None
    return ".".join(part for part in parts if part != "base")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter. These are the ones that are trained, saved and exported."""
    return any(part in ADAPTER_PARTS for part in name.split("."))


def name_from_diffusers(name: str) -> str:
    """Official name of a module or parameter of diffusers' transformer."""
    return ".".join(_FROM_DIFFUSERS.get(part, part) for part in name.split("."))


def name_to_diffusers(name: str) -> str:
    """Name in diffusers' transformer of an official module or parameter; the inverse of `name_from_diffusers`."""
    return ".".join(_TO_DIFFUSERS.get(part, part) for part in name.split("."))


def listed(names: Iterable[str], limit: int = 10) -> str:
    """Formats tensor names for a message: the first `limit` of them and the number of the rest."""
    names = list(names)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
