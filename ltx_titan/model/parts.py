"""Parts of the transformer by the names of its parameters: streams, kinds of layers and blocks."""

from collections.abc import Iterable
from typing import Literal

# Names that stand for more than one module of a block; any other name is a module, or a part of a path.
_KINDS = {
    "self_attention": ("attn1", "audio_attn1"),
    "text_attention": ("attn2", "audio_attn2"),
    "feed_forward": ("ff", "audio_ff"),
}
_STREAMS = {"video": "video", "audio": "audio", "cross_modal": "cross"}

PARTS = (*_STREAMS, *_KINDS)
"""Names that `matches` reads as parts of the model rather than as module names."""


def stream_of(name: str) -> Literal["video", "audio", "cross"]:
    """Returns the stream that a transformer parameter serves.

    Args:
        name: official parameter name without the file prefix.

    Returns:
        "cross" for parameters that exist only in a model of both streams: the two cross-modal attentions, their
        scale/shift tables and their AdaLN (`av_ca_*`).
    """
    parts = name.split(".")
    # `transformer_blocks.<i>.<module>`: the module decides.
    head = parts[2] if parts[0] == "transformer_blocks" and len(parts) > 2 else parts[0]
    # Before the test for "audio_", which also begins `audio_to_video_attn`.
    if head.startswith(("audio_to_video_attn", "video_to_audio_attn", "scale_shift_table_a2v_ca", "av_ca_")):
        return "cross"
    return "audio" if head.startswith("audio_") else "video"


def block_of(name: str) -> int | None:
    """Number of the block that a module or parameter belongs to, from 0; None for one outside the blocks."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "transformer_blocks" and len(parts) > 1 else None


def matches(name: str, parts: Iterable[str], blocks: tuple[int, int] | None) -> bool:
    """Whether a module or parameter is meant by a selection of parts and blocks.

    Args:
        name: of the module or parameter, without wrapper levels; adapters keep their own last parts.
        parts: names of `PARTS`, or consecutive components of the name: `attn1.to_q`, `patchify_proj`, `lora_B`.
            One of them must match; none at all selects everything.
        blocks: first and last block; None selects all, and what is outside the blocks.
    """
    if blocks is not None:
        number = block_of(name)
        if number is None or not blocks[0] <= number <= blocks[1]:
            return False
    components = f".{name}."
    wanted = [module for part in parts for module in _KINDS.get(part, (part,))]
    return not wanted or any(
        stream_of(name) == _STREAMS[part] if part in _STREAMS else f".{part}." in components for part in wanted
    )
