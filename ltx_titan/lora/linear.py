"""A frozen linear layer with a trainable low-rank adapter in parallel.

    LoRA    y = W x + b + s B A x                              s = alpha / rank, or alpha / sqrt(rank)
    DoRA    y = m * (W + s B A) x / |W + s B A| + b            norm and magnitude m per output

Children are `base` (nn.Linear or QuantizedLinear), `lora_A` and `lora_B`; the plans for tensor parallelism, float8 and
FSDP2 address them by these names. Adapters are float32 on a bfloat16 base: their updates are too small for bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.config import LoRASection
from ltx_titan.lora.dropout import drop
from ltx_titan.model.adapted_linear import AdaptedWeights, apply_adapted
from ltx_titan.weights import QuantizedLinear


class AdapterLinear(nn.Linear):
    """A linear layer without bias that computes in the dtype of its input, whatever the dtype of its weight."""

    def reset_parameters(self) -> None:
        """Does nothing: `init_lora_` initializes adapters."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        return F.linear(x, self.weight.to(x.dtype))


class LoRALinear(nn.Module):
    """Wraps a frozen layer; see the formulas above. Adapters are uninitialized: call `init_lora_`.

    Attributes:
        is_on: False leaves the adapter out. A Python value: compiled code is specialized on it.
    """

    dropout_time: Tensor
    dropout_layer: Tensor

    def __init__(self, base: nn.Linear | QuantizedLinear, settings: LoRASection) -> None:
        super().__init__()
        device = base.scale.device if isinstance(base, QuantizedLinear) else base.weight.device
        options: dict[str, Any] = {"bias": False, "dtype": torch.float32, "device": device}
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base = base
        self.lora_A = AdapterLinear(base.in_features, settings.rank, **options)
        self.lora_B = AdapterLinear(settings.rank, base.out_features, **options)
        # One norm per output, trained; None is plain LoRA.
        self.magnitude = None
        if settings.dora:
            self.magnitude = nn.Parameter(torch.empty(base.out_features, dtype=torch.float32, device=device))
        self.scaling = settings.scaling
        self.is_on = True
        self.dropout = settings.dropout
        if settings.dropout > 0:
            # DropoutStep sets the values; tensors rather than numbers, so that all layers share one compiled graph.
            self.register_buffer("dropout_time", torch.zeros((), dtype=torch.int64, device=device), persistent=False)
            self.register_buffer("dropout_layer", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The frozen weight [out, in]; code written for a plain linear layer reads its dtype here."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias [out], or None."""
        return self.base.bias

    @property
    def _has_formula(self) -> bool:
        """Whether the layer is W x + b + s B A x, without magnitudes or dropout."""
        return self.magnitude is None and not (self.dropout > 0 and self.training)

    def adapted_weights(self, dtype: torch.dtype) -> AdaptedWeights | None:
        """Weights for `model.adapted_linear` with inputs of `dtype`; None if this layer computes otherwise."""
        if not (self.is_on and self._has_formula):
            return None
        base, scale = self.base, None
        # Sharded and float8 layers, and other quantized bases, are other classes, with matmuls of their own.
        if type(base) is nn.Linear and base.weight.dtype == dtype:
            weight = base.weight
        elif isinstance(base, QuantizedLinear) and base.computes_in_float8(dtype):
            weight, scale = base.qdata, base.scale
        else:
            return None
        lora_a, lora_b = self.lora_A.weight.to(dtype), self.lora_B.weight.to(dtype)
        return AdaptedWeights(weight, self.bias, lora_a, lora_b, self.scaling, scale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not self.is_on:
            return self.base(x)
        weights = self.adapted_weights(x.dtype)
        if weights is not None:
            (y,), _ = apply_adapted(x, [weights])
            return y
        h = x
        if self.dropout > 0 and self.training:
            # The odd multiplier (2^32 / golden ratio) spreads consecutive steps over all 32 bits of the key.
            h = drop(x, self.dropout, self.dropout_time * 0x9E3779B1 + self.dropout_layer)
        # The scale on the rank-sized activation, the smallest tensor of the three.
        update = self.lora_B(self.lora_A(h) * self.scaling)
        if self.magnitude is None:
            return self.base(x) + update
        # DoRA scales W x without its bias. In float32: base output minus bias cancels in bfloat16.
        bias = 0.0 if self.bias is None else self.bias.float()
        directed = self.base(x).float() - bias + update.float()
        return (directed * (self.magnitude / self._norms()) + bias).to(x.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """Norm of each row of W + s B A [out], a constant to the gradient as in the DoRA paper.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) . b + s^2 b (A A^T) b^T: the sum itself is never materialized.
        """
        w, a, b = self.weight.float(), self.lora_A.weight.float(), self.lora_B.weight.float()
        cross = ((w @ a.T) * b).sum(1)
        squares = ((b @ (a @ a.T)) * b).sum(1)
        # Rounding can make a near-zero sum negative; the epsilon protects the division.
        return (w.square().sum(1) + 2 * self.scaling * cross + self.scaling**2 * squares).clamp(min=0).sqrt() + 1e-12


class AdapterSwitch:
    """Switches all adapters of a model off for a while.

    Args:
        model: adapted by `apply_lora`, sharded or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, LoRALinear)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Context in which the model is its base; a backward pass must not run in it, nor recompute what ran in it."""
        for layer in self._layers:
            layer.is_on = False
        try:
            yield
        finally:
            for layer in self._layers:
                layer.is_on = True
