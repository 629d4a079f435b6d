"""The only place that knows how tensors are called inside official checkpoint files.

A one-file checkpoint holds several components, told apart by key prefixes. Two of them share a prefix: the text
connectors lie under the transformer's. A `Component` maps a file key to the name its module uses, and back;
everything else in the package works on module names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

TRANSFORMER_PREFIX = "model.diffusion_model."
TEXT_PROJECTION_PREFIX = "text_embedding_projection."
VIDEO_CONNECTOR = "video_embeddings_connector."
AUDIO_CONNECTOR = "audio_embeddings_connector."
# Video-only files have one connector and leave its stream out of the name.
LONE_VIDEO_CONNECTOR = "embeddings_connector."

Modalities = Literal["av", "video", "audio"]


@dataclass(frozen=True)
class Component:
    """One part of a checkpoint.

    Attributes:
        name: what to call it in messages.
        module_name: file key -> name within the module, None for keys of other components.
        file_key: name within the module -> file key, as we write it.
    """

    name: str
    module_name: Callable[[str], str | None]
    file_key: Callable[[str], str]


def _transformer_name(key: str) -> str | None:
    name = key.removeprefix(TRANSFORMER_PREFIX)
    is_connector = name.startswith((VIDEO_CONNECTOR, AUDIO_CONNECTOR, LONE_VIDEO_CONNECTOR))
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


def stream_of(name: str) -> Literal["video", "audio", "cross"]:
    """Which stream a transformer parameter serves.

    Args:
        name: official parameter name without the file prefix.

    Returns:
        "cross" for what exists only in a model of both streams: the two cross attentions, their scale/shift tables and
        their AdaLN (`av_ca_*`).
    """
    parts = name.split(".")
    head = parts[2] if parts[0] == "transformer_blocks" and len(parts) > 2 else parts[0]
    if head.startswith(("audio_to_video_attn", "video_to_audio_attn", "scale_shift_table_a2v_ca", "av_ca_")):
        return "cross"
    return "audio" if head.startswith("audio_") else "video"


def unused_by(modalities: Modalities) -> Callable[[str], bool]:
    """Predicate of the transformer parameters that a model built for `modalities` does not have.

    A video model built from an audio-video file leaves the other stream's weights alone; pass this as `allow_unused`.
    """
    return lambda name: modalities != "av" and stream_of(name) != modalities
