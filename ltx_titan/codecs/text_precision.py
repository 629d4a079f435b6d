"""A text encoder whose weights take 8 or 4 bits, for GPUs that 24 GB of Gemma do not fit on.

The layers are those of a quantised training base; embeddings and norms keep their precision. Features come out slightly
different, least with int8, most with int4: a data set should be encoded in one form.
"""

from typing import Literal

import torch
from torch import nn

from ltx_titan.codecs.text_encoder import TextEncoder
from ltx_titan.weights.quantized import QuantizedLinear

TextPrecision = Literal["full", "int8", "float8", "int4"]


@torch.no_grad()
def quantize_text_encoder(encoder: TextEncoder, precision: TextPrecision, device: str | torch.device) -> TextEncoder:
    """Quantises every linear layer of an encoder and moves it to a device, layer by layer.

    Args:
        encoder: on the host; changed in place.
        precision: form of the weights; "full" only moves.
        device: where it is to run. It never holds more than one layer in full precision.
    """
    if precision != "full":
        linears = [(name, layer) for name, layer in encoder.model.named_modules() if isinstance(layer, nn.Linear)]
        for name, layer in linears:
            encoder.model.set_submodule(name, QuantizedLinear.from_linear(layer.to(device), precision))
    encoder.model.to(device)
    return encoder
