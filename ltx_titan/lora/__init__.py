from ltx_titan.lora.apply import adapters, apply_lora, init_lora_
from ltx_titan.lora.dropout import DropoutClock
from ltx_titan.lora.linear import AdapterLinear, LoRALinear, merged_weight
from ltx_titan.lora.load import init_base_, load_base
from ltx_titan.lora.names import diffusers_name, is_adapter, official_name
from ltx_titan.lora.targets import PRESETS, find_targets

__all__ = [
    "PRESETS",
    "AdapterLinear",
    "DropoutClock",
    "LoRALinear",
    "adapters",
    "apply_lora",
    "diffusers_name",
    "find_targets",
    "init_base_",
    "init_lora_",
    "is_adapter",
    "load_base",
    "merged_weight",
    "official_name",
]
