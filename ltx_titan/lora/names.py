"""Names of an adapted model's parameters: ours, the official checkpoint's, and diffusers'.

`LoRALinear` puts the frozen layer one level down, as its child `base`. Everything that reads or writes files translates
here and nowhere else.
"""

import re

ADAPTER_PARTS = ("lora_A", "lora_B", "magnitude")
_QUANTIZED_PARTS = ("qdata", "scale")

# Whole path components; where a name occurs as an ending of another one, only the whole component counts.
_TO_DIFFUSERS = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
_WRAPPER_LEVELS = re.compile(r"(?:^|(?<=\.))(?:_checkpoint_wrapped_module|_orig_mod)\.")


def without_wrappers(name: str) -> str:
    """`name` without the levels that activation checkpointing and compilation insert."""
    return _WRAPPER_LEVELS.sub("", name)


def official_name(name: str) -> str | None:
    """Official name of a module or parameter; None for what no official checkpoint has (adapters, quantised data)."""
    parts = without_wrappers(name).split(".")
    if any(part in ADAPTER_PARTS for part in parts) or parts[-1] in _QUANTIZED_PARTS:
        return None
    return ".".join(part for part in parts if part != "base")


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter: what is trained, saved and exported."""
    return any(part in ADAPTER_PARTS for part in name.split("."))


def diffusers_name(official: str) -> str:
    """Name in diffusers' transformer of an official module or parameter name."""
    return ".".join(_TO_DIFFUSERS.get(part, part) for part in official.split("."))
