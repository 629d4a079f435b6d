"""Selection of the adapted layers: presets per stream and per training mode, and matching of name endings.

A pattern matches a layer if its name equals the pattern or ends with "." + pattern. So `to_k` matches all attentions of
a block, while `attn1.to_k` matches the video's self-attention and not `audio_attn1.to_k`.
"""

import difflib
from collections.abc import Iterable

from torch import nn

from ltx_titan.weights import QuantizedLinear

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("net.0.proj", "net.2")


def _within(modules: Iterable[str], layers: Iterable[str]) -> tuple[str, ...]:
    layers = tuple(layers)
    return tuple(f"{module}.{layer}" for module in modules for layer in layers)


_VIDEO = _within(("attn1", "attn2"), _PROJECTIONS)
_VIDEO_FFN = _within(("ff",), _FEED_FORWARD)
_AUDIO = _within(("audio_attn1", "audio_attn2"), _PROJECTIONS)
_AUDIO_FFN = _within(("audio_ff",), _FEED_FORWARD)
_VIDEO_TO_AUDIO = _within(("video_to_audio_attn",), _PROJECTIONS)

PRESETS: dict[str, tuple[str, ...]] = {
    # Parts of a block, to be combined. Names without "ffn" are self-attention and text cross-attention.
    "all_attention": _PROJECTIONS,
    "video": _VIDEO,
    "video_ffn": _VIDEO_FFN,
    "audio": _AUDIO,
    "audio_ffn": _AUDIO_FFN,
    "audio_to_video": _within(("audio_to_video_attn",), _PROJECTIONS),
    "video_to_audio": _VIDEO_TO_AUDIO,
    # One per training mode. Projections without a module match all six attentions of a block.
    "t2v": _PROJECTIONS,
    "i2v": _PROJECTIONS,
    "a2v": _PROJECTIONS,
    "video_extension": _PROJECTIONS,
    "av2av": _PROJECTIONS,
    "v2v": _VIDEO + _VIDEO_FFN,
    "video_inpainting": _VIDEO,
    "video_outpainting": _VIDEO,
    "t2a": _AUDIO + _AUDIO_FFN,
    "audio_extension": _AUDIO + _AUDIO_FFN,
    "audio_inpainting": _AUDIO + _AUDIO_FFN,
    "a2a": _AUDIO + _AUDIO_FFN,
    "v2a": _AUDIO + _AUDIO_FFN + _VIDEO_TO_AUDIO,
}


def find_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Returns the names of the linear layers that `targets` match, in the model's order.

    Args:
        model: a transformer without adapters.
        targets: presets and name endings.

    Raises:
        ValueError: a pattern matches no linear layer; the message has the closest names.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | QuantizedLinear)]
    chosen: set[str] = set()
    for target in targets:
        for pattern in PRESETS.get(target, (target,)):
            found = [name for name in linears if name == pattern or name.endswith("." + pattern)]
            if not found:
                raise ValueError(_no_match(target, pattern, linears))
            chosen.update(found)
    return [name for name in linears if name in chosen]


def _no_match(target: str, pattern: str, linears: list[str]) -> str:
    which = f"'{pattern}'" + (f" (of the preset '{target}')" if target != pattern else "")
    text = f"lora.targets: {which} matches no linear layer of this model."
    known = sorted({ending for name in linears for ending in _endings(name)})
    close = difflib.get_close_matches(pattern, [*PRESETS, *known], n=5, cutoff=0.6)
    if close:
        return f"{text} Did you mean {' or '.join(close)}?"
    return f"{text} Expected a preset ({', '.join(PRESETS)}) or the ending of a layer's name."


def _endings(name: str) -> list[str]:
    """Endings of a layer's name below its block, such as `attn1.to_q` and `to_q`."""
    parts = name.split(".")
    if parts[0] == "transformer_blocks":
        parts = parts[2:]
    return [".".join(parts[start:]) for start in range(len(parts)) if not parts[start].isdigit()]
