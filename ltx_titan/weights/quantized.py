"""Frozen linear layers whose weight is stored in 8 or 4 bits.

    int8     q in [-127, 127]      one scale per row                     1    byte per weight
    float8   e4m3                  one scale per row                     1    byte per weight
    int4     q in [-8, 7]          one scale per 128 weights of a row    0.52 bytes per weight
    nvfp4    e2m1, +-{0 ... 6}     one scale per 16 weights of a row     0.63 bytes per weight

torchao's primitives choose the scales and round. Its weight-only tensor subclasses are not used: in 0.18 FSDP2 cannot
shard them (`aten.split` or `aten.new_zeros` is missing, int4 needs another library). Here data and scales are plain
frozen parameters, which shard, gather and move like any other.

FSDP2 of torch 2.11 refuses integer parameters and gathers floating-point ones in the compute dtype. Bytes are therefore
stored as the bits of bfloat16 numbers, two bytes per number. Their values are meaningless, but a parameter already in
the compute dtype is only ever copied; and if the compute dtype is float32, a bfloat16 is its upper half, bit for bit.

The matmul runs in the input's dtype after dequantization, which torch.compile turns into one pass over the weight. Only
the quantized data is saved for the backward pass. Layers of the form "float8" can instead multiply in float8, see
model/float8_linear.py and `use_float8_matmuls`.

Weights of an official fp8 or NVFP4 file keep their bits in the matching form; the scales, float32 in the file, are
rounded to bfloat16, which changes a weight by no more than rounding that weight to bfloat16 would (2^-8).
"""

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ltx_titan.config import BaseDtype, Float8Matmuls
from ltx_titan.model.float8_linear import (
    FEWEST_TOKENS,
    FLOAT8_MULTIPLE,
    Float8Linear,
    few_tokens_linear,
    matmul_refusal,
)

QUANTIZED: tuple[BaseDtype, ...] = ("int8", "int4", "float8", "nvfp4")
_SCALE_DTYPE = torch.bfloat16
_BYTES_DTYPE = torch.bfloat16
_INT4_GROUP = 128
_INT4_SMALLEST_GROUP = 16
_NVFP4_GROUP = 16
_FLOAT8_CAPABILITY = (8, 9)
_FOUR_BITS = ("int4", "nvfp4")
# Without compilation each operation of a dequantization writes all its numbers: 10 to 18 bytes a weight are alive at a
# time, 1.2 GB for the largest layer in "nvfp4". So it is done in parts, of 4 million weights and up to 72 MiB.
_WEIGHTS_AT_A_TIME = 1 << 22
_E2M1_LARGEST = 6.0
# Midpoints between neighbors of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class QuantizedLinear(nn.Module):
    """`y = W x + b` with a quantized W.

    Parameters, all frozen: `qdata`, bfloat16, two bytes per number ([out, in / 2] for 8 bits; [out, in / 4] for 4 bits,
    where the low nibble of a byte is an even column and the high nibble the next), `scale` [out, groups], bfloat16, and
    `bias` [out] if the layer has one.

    Attributes:
        in_float8: multiply in float8 instead of dequantizing. A Python value: compiled code is specialized on it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        form: BaseDtype,
        *,
        bias: bool,
        bias_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.form = in_features, out_features, form
        width, groups = packed_width(in_features, form), _groups(in_features, form)
        self.qdata = _frozen(torch.empty(out_features, width, dtype=_BYTES_DTYPE, device=device))
        self.scale = _frozen(torch.empty(out_features, groups, dtype=_SCALE_DTYPE, device=device))
        self.bias = _frozen(torch.empty(out_features, dtype=bias_dtype, device=device)) if bias else None
        self.in_float8 = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: BaseDtype) -> "QuantizedLinear":
        """Quantizes a layer; on the meta device only shapes are converted, and `load_base` fills them later.

        Raises:
            ValueError: the form does not support rows of this length.
        """
        weight = linear.weight
        layer = cls(
            linear.in_features,
            linear.out_features,
            form,
            bias=linear.bias is not None,
            bias_dtype=weight.dtype,
            device=weight.device,
        )
        if not weight.is_meta:
            with torch.no_grad():
                qdata, scale = quantize_rows(weight, form)
                layer.qdata.copy_(qdata)
                layer.scale.copy_(scale)
                if layer.bias is not None:
                    layer.bias.copy_(linear.bias)
        return layer

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [out, in] in the dtype of the scales, computed on every access."""
        return dequantize(self.qdata, self.scale, self.form, self.scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in the dtype of `x`."""
        if self.computes_in_float8(x.dtype):
            tokens = x.flatten(0, -2)
            if len(tokens) >= FEWEST_TOKENS:
                y = Float8Linear.apply(tokens, self.qdata, self.scale, self.bias)
            else:
                y = few_tokens_linear(tokens, self.qdata, self.scale, self.bias)
            return y.unflatten(0, x.shape[:-1])
        # An autograd function, because autograd of dequantize-then-matmul would save the dequantized weight for the
        # backward pass.
        return _FrozenMatmul.apply(x, self.qdata, self.scale, self.bias, self.form)

    def computes_in_float8(self, dtype: torch.dtype) -> bool:
        """Whether the operations of `model/float8_linear.py` are used for inputs of `dtype`: not for float32."""
        return self.in_float8 and dtype == torch.bfloat16 and self.qdata.dtype == _BYTES_DTYPE


class _FrozenMatmul(torch.autograd.Function):
    """Matmul with a quantized weight; only the input gets a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qdata: Tensor, scale: Tensor, bias: Tensor | None, form: BaseDtype) -> Tensor:
        # Neither x (W is frozen) nor the dequantized weight is saved.
        ctx.save_for_backward(qdata, scale)
        ctx.form = form
        weight = dequantize(qdata, scale, form, x.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        qdata, scale = ctx.saved_tensors
        weight = dequantize(qdata, scale, ctx.form, grad.dtype, is_second_use=True)
        return grad @ weight, None, None, None, None


def use_float8_matmuls(model: nn.Module, device: torch.device, dtype: torch.dtype, wanted: Float8Matmuls) -> str | None:
    """Lets layers of the form "float8" multiply in float8, where their widths are supported.

    Args:
        model: changed in place.
        device: on which it will run.
        dtype: in which it computes.
        wanted: "auto" where the device has float8 matmuls; "on" also on a CPU, which emulates them.

    Returns:
        The reason why no layer does; None if some do.

    Raises:
        ValueError: "on", but there is a reason.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, QuantizedLinear)
        and layer.form == "float8"
        and layer.in_features % FLOAT8_MULTIPLE == 0
        and layer.out_features % FLOAT8_MULTIPLE == 0
    ]
    reason = "it is switched off" if wanted == "off" else _obstacle(layers, device, dtype, emulate=wanted == "on")
    if reason is not None and wanted == "on":
        raise ValueError(f'lora.float8_matmuls = "on", but {reason}. Use "auto".')
    for layer in layers:
        layer.in_float8 = reason is None
    return reason


def _obstacle(layers: list[QuantizedLinear], device: torch.device, dtype: torch.dtype, *, emulate: bool) -> str | None:
    """Reason why layers cannot multiply in float8, or None."""
    if not layers:
        return f'no layer has a base in "float8" with widths that are multiples of {FLOAT8_MULTIPLE}'
    if dtype != torch.bfloat16:
        return "float8 matmuls write bfloat16, and training.dtype is another"
    if device.type != "cuda":
        return None if emulate else f"a {device.type.upper()} has no float8 matmuls"
    capability = torch.cuda.get_device_capability(device)
    if capability < _FLOAT8_CAPABILITY:
        found, needed = (".".join(map(str, c)) for c in (capability, _FLOAT8_CAPABILITY))
        return f"float8 matmuls need compute capability {needed}, found {found}"
    if find_spec("triton") is None:
        return "Triton is not installed"
    return matmul_refusal(device)


def quantize_rows(weight: Tensor, form: BaseDtype) -> tuple[Tensor, Tensor]:
    """Quantizes whole rows; a row's result depends on that row alone, so each rank can quantize its own.

    Args:
        weight: [rows, in].
        form: "int8", "int4", "float8" or "nvfp4".

    Returns:
        `qdata` [rows, packed width] and `scale` [rows, groups], as `QuantizedLinear` stores them.
    """
    if form == "nvfp4":
        return _quantize_nvfp4(weight)
    # Here, not above: importing torchao takes seconds, and most jobs do not quantize.
    from torchao.quantization.quant_primitives import (
        MappingType,
        _choose_scale_float8,
        _quantize_affine_float8,
        choose_qparams_affine,
        quantize_affine,
    )

    groups = _groups(weight.shape[1], form)
    block = (1, weight.shape[1] // groups)
    weight = weight.float()
    if form == "float8":
        # Rows of zeros have scale 0: the smallest normal number avoids 0 / 0.
        scale = _choose_scale_float8(weight, block).clamp(min=torch.finfo(torch.float32).tiny).to(_SCALE_DTYPE)
        # Rounding the scale down can push the largest value past the format's range: saturate instead of overflow.
        return _as_parameter(_quantize_affine_float8(weight, scale.float())), scale
    # int8 without -128, symmetric around zero; int4 has too few values to give one up.
    low, high = (-127, 127) if form == "int8" else (-8, 7)
    scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, torch.int8, low, high)
    # Rounded before quantizing, so that the values are chosen for the scale that dequantization uses.
    scale = scale.view(-1, groups).to(_SCALE_DTYPE)
    values = quantize_affine(weight, block, scale.float(), zero.view(-1, groups), torch.int8, low, high)
    if form == "int8":
        return _as_parameter(values), scale
    # Offset binary: unsigned nibbles unpack with a mask and need no sign extension.
    return _pack_nibbles((values + 8).to(torch.uint8)), scale


def keep_fp8_rows(data: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Converts rows of a float8 weight [rows, in] with one scale to the "float8" form, bits unchanged."""
    return _as_parameter(data), torch.full((data.shape[0], 1), scale, dtype=_SCALE_DTYPE, device=data.device)


def keep_nvfp4_rows(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Converts 4-bit codes [rows, in], uint8, and scales [rows, in / 16] to the "nvfp4" form, codes unchanged."""
    return _pack_nibbles(codes), scales.to(_SCALE_DTYPE)


def _quantize_nvfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = weight.float().unflatten(1, (_groups(weight.shape[1], "nvfp4"), -1))
    smallest = torch.finfo(torch.float32).tiny
    scale = (blocks.abs().amax(dim=2) / _E2M1_LARGEST).clamp(min=smallest).to(_SCALE_DTYPE)
    values = (blocks / scale.float()[:, :, None]).flatten(1)
    # Round to nearest on the non-uniform grid: the number of midpoints below a value is its code; bit 3 is the sign.
    codes = torch.bucketize(values.abs(), torch.tensor(_E2M1_BOUNDS, device=values.device)).to(torch.uint8)
    return _pack_nibbles(codes | (values < 0).to(torch.uint8) << 3), scale


def dequantize(
    qdata: Tensor, scale: Tensor, form: BaseDtype, dtype: torch.dtype, *, is_second_use: bool = False
) -> Tensor:
    """Dequantizes rows of a weight to [rows, in], computed in float32 and rounded to `dtype`.

    Args:
        qdata, scale: from `quantize_rows`, or gathered in float32.
        form: "int8", "int4", "float8" or "nvfp4".
        dtype: of the result.
        is_second_use: set in the backward pass, where torch.compile sees both passes as one graph. If it recognized
            the same computation, it would run it once and save the result in between: for 22B parameters 38 GB of
            bfloat16 weights, or 19 GB of unpacked bytes.
    """
    words = _as_words(qdata)
    if is_second_use:
        # Changes no bit, but makes the expression different from the forward's.
        words = words ^ 0
    columns = words.shape[1] * (4 if form in _FOUR_BITS else 2)
    rows = max(1, _WEIGHTS_AT_A_TIME // columns)
    if torch.compiler.is_compiling() or rows >= words.shape[0]:
        return _dequantize_rows(words, scale, form, dtype)
    weight = torch.empty(words.shape[0], columns, dtype=dtype, device=words.device)
    for part, w, s in zip(weight.split(rows), words.split(rows), scale.split(rows), strict=True):
        part.copy_(_dequantize_rows(w, s, form, dtype))
    return weight


def _dequantize_rows(words: Tensor, scale: Tensor, form: BaseDtype, dtype: torch.dtype) -> Tensor:
    # Unpacked by arithmetic on 16-bit words: a view as bytes is opaque to Inductor, whose kernel then loads single
    # unaligned bytes and takes 1.6 times as long.
    match form:
        case "int8":
            # int16 shifts are arithmetic, so both bytes are sign-extended.
            values = torch.stack(((words << 8) >> 8, words >> 8), dim=-1).float()
        case "float8":
            pairs = torch.stack((words & 255, words >> 8 & 255), dim=-1).to(torch.uint8)
            values = pairs.view(torch.float8_e4m3fn).float()
        case "int4":
            values = _nibbles(words).float() - 8
        case _:
            values = _e2m1(_nibbles(words))
    grouped = values.flatten(1).unflatten(1, (scale.shape[1], -1)) * scale.float()[:, :, None]
    return grouped.flatten(1).to(dtype)


def packed_width(columns: int, form: BaseDtype) -> int:
    """Width of `qdata` for `columns` columns of the weight."""
    return columns // (4 if form in _FOUR_BITS else 2)


def _as_parameter(data: Tensor) -> Tensor:
    return data.contiguous().view(_BYTES_DTYPE)


def _pack_nibbles(codes: Tensor) -> Tensor:
    return _as_parameter(codes[:, 0::2] | codes[:, 1::2] << 4)


def _nibbles(words: Tensor) -> Tensor:
    return torch.stack([words >> shift & 15 for shift in (0, 4, 8, 12)], dim=-1)


def _e2m1(codes: Tensor) -> Tensor:
    """Values of 4-bit floats, by arithmetic: a lookup table would be a gather per weight."""
    magnitude = codes & 7
    # Twice the value is an integer: 0 and 1 are subnormal, above them (2 + mantissa) << (exponent - 1).
    doubled = torch.where(magnitude < 2, magnitude, (2 + (magnitude & 1)) << ((magnitude >> 1) - 1).clamp(min=0))
    return doubled.float() * torch.where(codes < 8, 0.5, -0.5)


def _as_words(qdata: Tensor) -> Tensor:
    """The bits as int16, whether FSDP2 gathered the parameter in bfloat16 or in float32."""
    if qdata.dtype == torch.float32:
        # bfloat16 is the upper half of float32, so the gather's cast moved the bits by 16.
        return (qdata.view(torch.int32) >> 16).to(torch.int16)
    return qdata.view(torch.int16)


def _groups(in_features: int, form: BaseDtype) -> int:
    """Scales per row. The group size divides the row, so that no group is split between shards of columns."""
    if form == "nvfp4":
        if in_features % _NVFP4_GROUP:
            raise ValueError(
                f'lora.base_dtype = "nvfp4": expected input widths that are multiples of {_NVFP4_GROUP}, found '
                f'{in_features}; use "int8" or "bfloat16".'
            )
        return in_features // _NVFP4_GROUP
    if form != "int4":
        if in_features % 2:
            raise ValueError(
                f'lora.base_dtype = "{form}": expected even input widths, found {in_features}; use "bfloat16".'
            )
        return 1
    # The largest power of two up to 128 that divides the row.
    width = math.gcd(in_features, _INT4_GROUP)
    if width < _INT4_SMALLEST_GROUP:
        raise ValueError(
            f'lora.base_dtype = "int4": expected input widths that are multiples of {_INT4_SMALLEST_GROUP}, found '
            f'{in_features}; use "int8" or "bfloat16".'
        )
    return in_features // width


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
