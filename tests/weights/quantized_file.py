"""Official quantized forms, written from the formulas of the formats, independent of our own functions."""

import json

import torch

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def fp8(weight):
    """Stores a weight as the fp8 releases do; returns (tensors by kind, the dequantized weight)."""
    scale = weight.float().abs().max() / 448
    data = (weight.float() / scale).to(torch.float8_e4m3fn)
    stored = {"weight": data, "weight_scale": scale.clone(), "input_scale": torch.tensor(0.37)}
    return stored, data.float() * scale


def nvfp4(weight):
    """Stores a weight as the NVFP4 releases do; returns (tensors by kind, the dequantized weight)."""
    rows, columns = weight.shape
    blocks = weight.float().unflatten(1, (-1, 16))
    tensor_scale = weight.float().abs().max() / (6 * 448)
    scales = (blocks.abs().amax(2) / 6 / tensor_scale).to(torch.float8_e4m3fn)
    step = scales.float() * tensor_scale
    grid = torch.tensor(E2M1)
    codes = ((blocks / step[:, :, None]).abs()[..., None] - grid).abs().argmin(-1)
    values = (grid[codes] * blocks.sign() * step[:, :, None]).flatten(1)
    codes = (codes + 8 * (blocks < 0)).flatten(1).to(torch.uint8)
    packed = codes[:, 0::2] * 16 + codes[:, 1::2]
    # Position at which cuBLAS reads the scale of row r and block c.
    tiles_down, tiles_right = -(-rows // 128), -(-(columns // 16) // 4)
    blocked = torch.zeros(tiles_down * tiles_right * 512).to(torch.float8_e4m3fn)
    for r in range(rows):
        for c in range(columns // 16):
            tile = r // 128 * tiles_right + c // 4
            blocked[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    stored = {
        "weight": packed,
        "weight_scale": blocked.view(tiles_down * 128, tiles_right * 4),
        "weight_scale_2": tensor_scale.clone(),
    }
    return stored, values


FORMS = {"fp8": fp8, "nvfp4": nvfp4}


def quantize(tensors, form, chosen):
    """Replaces the weights `chosen(module)` names; returns (tensors, dequantized weights, header entries)."""
    stored, values, layers = {}, {}, {}
    for key, tensor in tensors.items():
        module, _, kind = key.rpartition(".")
        if kind == "weight" and chosen(module):
            parts, values[key] = FORMS[form](tensor)
            stored |= {f"{module}.{name}": part.contiguous() for name, part in parts.items()}
            layers[module] = {"format": {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}[form]}
        else:
            stored[key] = values[key] = tensor.contiguous()
    return stored, values, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
