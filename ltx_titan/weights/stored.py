"""Weights as checkpoint files store them: plain, fp8 with a scale, or NVFP4 with two levels of scales.

    fp8      `m.weight` F8_E4M3 [out, in], `m.weight_scale` a number           W = weight * weight_scale
    NVFP4    `m.weight` U8 [out, in / 2], two 4-bit floats (e2m1) a byte,      W = e2m1 * weight_scale * weight_scale_2
             `m.weight_scale` F8_E4M3 for 16 columns each, `m.weight_scale_2` a number

Both may have an `m.input_scale` for activations, which is ignored here. The quantized layers differ between releases:
they are recognized per tensor, by its dtype and its companions.

A reader requests a box of the weight and gets its values in float32, dequantized on the device; a rank that holds a
shard reads only the bytes of its rows. Full fine-tuning cannot start from a quantized file: rounding has removed the
bits that small updates change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from ltx_titan.weights.metadata import CheckpointMetadata, TensorInfo
from ltx_titan.weights.tensors import Box

Form = Literal["plain", "fp8", "nvfp4"]
_PLAIN = ("F64", "F32", "F16", "BF16")
_COMPANIONS = ("weight_scale", "weight_scale_2", "input_scale", "comfy_quant")
_DECLARED = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}
_BLOCK = 16
# Scales of the blocked layout are grouped in tiles of 128 rows x 4 columns.
_TILE_ROWS, _TILE_COLUMNS = 128, 4
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes of a 4-bit float."""


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a file.

    Attributes:
        key: in the file.
        form: storage format.
        shape: of the weight, which for NVFP4 is not that of the tensor in the file (two columns per byte).
        start: byte offset, for reading in file order.
        companions: kind (`weight_scale`, ...) -> key of the tensors that belong to it.
        problem: why it cannot be read; empty if it can.
    """

    key: str
    form: Form
    shape: tuple[int, ...]
    start: int
    companions: Mapping[str, str]
    problem: str = ""

    def read(self, file: Any, box: Box, device: torch.device) -> Tensor:
        """Reads a part of the weight.

        Args:
            file: from `safe_open`.
            box: one slice per dimension; empty for a scalar.
            device: dequantization runs there.

        Returns:
            A plain weight as stored, on the CPU; a quantized one in float32, on `device`.
        """
        if self.form == "plain":
            return file.get_slice(self.key)[box] if box else file.get_tensor(self.key)
        if self.form == "fp8":
            # In float32, so that the caller's cast is the only rounding.
            data, scale = self.read_fp8(file, box, device)
            return data.float() * scale
        rows, columns = box
        # Rows are read whole and columns selected last, since 16 columns share a scale and two share a byte.
        codes, scales = self.read_nvfp4(file, rows, device)
        values = torch.tensor(E2M1_VALUES, device=device)[codes.int()]
        return (values.unflatten(1, (-1, _BLOCK)) * scales[:, :, None]).flatten(1)[:, columns]

    def read_fp8(self, file: Any, box: Box, device: torch.device) -> tuple[Tensor, float]:
        """Reads a part of an fp8 weight without dequantizing it, and its scale (1 if the file has none)."""
        # A plain cast to fp8 has no scale.
        key = self.companions.get("weight_scale")
        scale = 1.0 if key is None else file.get_tensor(key).float().item()
        return file.get_slice(self.key)[box].to(device), scale

    def read_nvfp4(self, file: Any, rows: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Reads rows of an NVFP4 weight: codes [rows, in], uint8, and float32 scales [rows, in / 16] of both levels."""
        packed = file.get_slice(self.key)[rows].to(device)
        # The first of two weights is in the upper nibble of the byte.
        codes = torch.stack((packed >> 4, packed & 15), dim=-1).flatten(1)
        # All scales, 1/16 byte per weight: in the blocked layout the rows of a shard are not contiguous.
        blocked = file.get_tensor(self.companions["weight_scale"]).to(device).float()
        scales = unblocked(blocked, self.shape[0], self.shape[1] // _BLOCK)[rows]
        return codes, scales * file.get_tensor(self.companions["weight_scale_2"]).float().item()


def stored_weights(metadata: CheckpointMetadata) -> dict[str, StoredWeight]:
    """Returns all weights of a file by key, without the companions of quantized ones."""
    declared = _declared_formats(metadata)
    weights: dict[str, StoredWeight] = {}
    companions: set[str] = set()
    for key, info in metadata.tensors.items():
        module, _, kind = key.rpartition(".")
        found = {}
        # Only a quantized weight has companions: `weight_scale` of a plain layer would be a separate parameter.
        if kind == "weight" and info.dtype not in _PLAIN:
            found = {name: f"{module}.{name}" for name in _COMPANIONS if f"{module}.{name}" in metadata.tensors}
        weights[key] = _describe(metadata, key, info, found, declared.get(module))
        companions.update(found.values())
    return {key: weight for key, weight in weights.items() if key not in companions}


def quantized_forms(metadata: CheckpointMetadata) -> dict[Form, int]:
    """Counts the quantized weights of a file by form; empty for a file of plain weights."""
    counts: dict[Form, int] = {}
    for weight in stored_weights(metadata).values():
        if weight.form != "plain":
            counts[weight.form] = counts.get(weight.form, 0) + 1
    return counts


def refuse_quantized(metadata: CheckpointMetadata) -> None:
    """Refuses a quantized file as the start of full fine-tuning.

    Raises:
        ValueError: the file has quantized weights.
    """
    if counts := quantized_forms(metadata):
        found = " and ".join(f"{count} {form}" for form, count in counts.items())
        raise ValueError(
            f'{metadata.path}: model.mode = "full" needs unrounded weights, found {found} weights; training would keep '
            "their rounding errors. Set model.checkpoint_path to the bf16 release, or model.mode = "
            '"lora", whose frozen base may be quantized.'
        )


def unblocked(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """Reorders block scales from the layout that tensor cores read to row-major [rows, columns].

    The layout (cuBLAS, "1D block scaling factors layout"): tiles of 128 rows x 4 columns, row-major; within a tile, the
    offset of row r and column c is (r % 32) * 16 + (r // 32) * 4 + c. Sizes are padded to whole tiles.
    """
    down, right = -(-rows // _TILE_ROWS), -(-columns // _TILE_COLUMNS)
    # Dimensions: row of tiles, column of tiles, r % 32, r // 32, c. Row-major order needs r // 32 before r % 32.
    tiles = blocked.reshape(down, right, 32, 4, _TILE_COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(down * _TILE_ROWS, right * _TILE_COLUMNS)
    return plain[:rows, :columns]


def _describe(
    metadata: CheckpointMetadata, key: str, info: TensorInfo, companions: dict[str, str], declared: str | None
) -> StoredWeight:
    if info.dtype == "F8_E4M3":
        problem = _scale_problem(metadata, companions, "weight_scale", required=False)
        problem = problem or _declaration_problem("fp8", declared)
        return StoredWeight(key, "fp8", info.shape, info.start, companions, problem)
    # U8 alone is not enough: embedded tokenizers and declarations are bytes, too.
    if info.dtype == "U8" and "weight_scale" in companions and len(info.shape) == 2:
        shape = (info.shape[0], 2 * info.shape[1])
        problem = _scale_problem(metadata, companions, "weight_scale_2", required=True)
        problem = problem or _block_problem(metadata, companions["weight_scale"], shape)
        problem = problem or _declaration_problem("nvfp4", declared)
        return StoredWeight(key, "nvfp4", shape, info.start, companions, problem)
    problem = "" if info.dtype in _PLAIN else f"is {info.dtype}, expected one of {', '.join(_PLAIN)}, fp8 or NVFP4"
    return StoredWeight(key, "plain", info.shape, info.start, companions, problem)


def _scale_problem(metadata: CheckpointMetadata, companions: dict[str, str], kind: str, required: bool) -> str:
    if kind not in companions:
        return f"has no {kind}" if required else ""
    info = metadata.tensors[companions[kind]]
    if prod(info.shape) == 1 and info.dtype in _PLAIN:
        return ""
    return f"has a {kind} of {info.dtype} {list(info.shape)}, expected a single number"


def _block_problem(metadata: CheckpointMetadata, key: str, shape: tuple[int, int]) -> str:
    info = metadata.tensors[key]
    rows = -(-shape[0] // _TILE_ROWS) * _TILE_ROWS
    columns = -(-(shape[1] // _BLOCK) // _TILE_COLUMNS) * _TILE_COLUMNS
    if info.dtype == "F8_E4M3" and shape[1] % _BLOCK == 0 and prod(info.shape) == rows * columns:
        return ""
    found = f"{info.dtype} {list(info.shape)}"
    return f"has a weight_scale of {found}, expected F8_E4M3 {[rows, columns]} (padded to tiles of 128 x 4)"


def _declaration_problem(form: Form, declared: str | None) -> str:
    """Checks the declared format. NVFP4 must be declared: nibble and scale order cannot be seen from the data."""
    if declared == _DECLARED[form] or (declared is None and form == "fp8"):
        return ""
    if declared is None:
        return "is NVFP4 without a declared layout (no '_quantization_metadata' in the header, no comfy_quant tensor)"
    return f"is declared as {declared!r}, found {form}"


def _declared_formats(metadata: CheckpointMetadata) -> dict[str, str]:
    """Maps modules to quantization formats, from the header's `_quantization_metadata` and `comfy_quant` tensors.

    Both are JSON, ComfyUI's convention, in which the format implies the layout: `nvfp4` means upper nibble first and
    scales in blocked order.
    """
    formats: dict[str, str] = {}
    if text := metadata.raw.get("_quantization_metadata"):
        layers = _parsed(text).get("layers")
        for module, settings in (layers if isinstance(layers, dict) else {}).items():
            if isinstance(settings, dict) and isinstance(settings.get("format"), str):
                formats[module] = settings["format"]
    for key, info in metadata.tensors.items():
        # A few dozen bytes of JSON per layer, stored as a tensor.
        if key.endswith(".comfy_quant") and info.dtype == "U8":
            with metadata.path.open("rb") as file:
                file.seek(info.start)
                found = _parsed(file.read(info.end - info.start)).get("format")
            if isinstance(found, str):
                formats[key.removesuffix(".comfy_quant")] = found
    return formats


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
