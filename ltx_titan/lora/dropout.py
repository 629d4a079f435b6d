"""Dropout without random state: a mask is a hash of (seed, step, layer, element).

Activation checkpointing recomputes a block in the backward pass and must get the same mask; a resumed job must get the
masks of the uninterrupted one. Both hold by construction, with no generator state to save, restore or trace.
"""

import torch
from torch import Tensor, nn

from ltx_titan.common.tensors import seed_of, without_wrappers

_MASK_32 = 0xFFFFFFFF
# Multiplier of a common 32-bit integer hash; small enough that 32-bit operands do not overflow int64.
_MIXER = 0x45D9F3B


def drop(x: Tensor, probability: float, key: Tensor) -> Tensor:
    """Sets each element to zero with `probability` and scales the rest by 1 / (1 - probability).

    Args:
        x: any shape.
        probability: in [0, 1).
        key: int64 scalar; the same key and shape give the same mask on every device.
    """
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    # Each side is mixed before the xor, or index and key pairs with an equal xor would share a mask bit.
    bits = _mix(_mix(index) ^ _mix(key))
    kept = bits >= int(probability * 2**32)
    return torch.where(kept, x / (1 - probability), 0)


def layer_key(seed: int, name: str, rank: int) -> int:
    """Hash key of a layer's masks, 32 bits.

    Args:
        seed: of the job.
        name: of the layer, without wrapper levels.
        rank: index among the ranks that hold different tokens, which must draw different masks.
    """
    return seed_of(f"{seed}/{rank}/{name}", num_bytes=4)


class DropoutStep:
    """Sets the step from which all adapters derive their dropout mask.

    Create it after `to_empty`, which would overwrite its buffers; call `set` before every forward.

    Args:
        model: the adapted model, on its device.
        seed: of the job.
        rank: index among the ranks that hold different tokens (dp and cp); ranks of one tp group share it.
    """

    def __init__(self, model: nn.Module, seed: int, rank: int = 0) -> None:
        self._time: Tensor | None = None
        for name, module in model.named_modules():
            if getattr(module, "dropout", 0.0) and hasattr(module, "dropout_time"):
                device = module.dropout_time.device
                if self._time is None:
                    self._time = torch.zeros((), dtype=torch.int64, device=device)
                # One tensor for all layers: a step then costs a single fill.
                module.dropout_time = self._time
                module.dropout_layer = torch.tensor(layer_key(seed, without_wrappers(name), rank), device=device)

    def set(self, micro_step: int) -> None:
        """Selects the masks of a forward pass.

        Args:
            micro_step: forward passes before this one since the job started: step * accumulation + micro-batch.
        """
        if self._time is not None:
            self._time.fill_(micro_step)


def _mix(value: Tensor) -> Tensor:
    """Mixes the low 32 bits of an int64: each input bit affects every output bit."""
    value = value & _MASK_32
    value = ((value >> 16 ^ value) * _MIXER) & _MASK_32
    value = ((value >> 16 ^ value) * _MIXER) & _MASK_32
    return value >> 16 ^ value
