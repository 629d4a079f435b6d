"""LoRA and DoRA adapters on a frozen, optionally quantized transformer."""

from ltx_titan.lora.apply import adapter_weights, adapters, apply_lora, check_ranks, init_lora_
from ltx_titan.lora.dropout import DropoutStep
from ltx_titan.lora.linear import AdapterLinear, AdapterSwitch, LoRALinear
from ltx_titan.lora.load import init_base_, load_base
from ltx_titan.lora.targets import PRESETS, find_targets
from ltx_titan.weights import is_adapter

__all__ = [
    "PRESETS",
    "AdapterLinear",
    "AdapterSwitch",
    "DropoutStep",
    "LoRALinear",
    "adapter_weights",
    "adapters",
    "apply_lora",
    "check_ranks",
    "find_targets",
    "init_base_",
    "init_lora_",
    "is_adapter",
    "load_base",
]
