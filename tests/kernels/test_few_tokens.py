"""A few tokens times a weight that is dequantized in registers, against the same product of plain tensors."""

import pytest
import torch

from ltx_titan_kernels.few_tokens import multiply_few_tokens
from tests.kernels.comparison import DEVICE, bound

pytestmark = pytest.mark.runs_on("gpu", "interpreter")
# The interpreter multiplies the bits of bfloat16 numbers.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def operands(tokens, rows, columns, transposed):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = (torch.rand(rows, 1, generator=generator) + 0.5).bfloat16()
    x = torch.randn(tokens, rows if transposed else columns, generator=generator).to(DTYPE)
    return x.to(DEVICE), weight.to(DEVICE), scale.to(DEVICE)


# More tokens than one program takes, widths that its tiles do not divide, and those of audio.
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(5, 48, 144), (70, 80, 272), (51, 128, 256)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias", "adds"])
def test_it_multiplies_by_the_dequantized_weight(tokens, rows, columns, transposed, kind):
    x, weight, scale = operands(tokens, rows, columns, transposed)
    dequantized = (weight.float() * scale.float()).to(DTYPE).double()
    expected = x.double() @ (dequantized if transposed else dequantized.T)
    generator = torch.Generator().manual_seed(1)
    bias = out = None
    if kind == "bias":
        bias = (torch.randn(expected.shape[1], generator=generator) * 100).to(DEVICE, DTYPE)
        expected += bias
    if kind == "adds":
        out = (torch.randn(expected.shape, generator=generator) * 1000).to(DEVICE, DTYPE)
        expected += out
    found = multiply_few_tokens(x, weight, scale, bias=bias, out=out, transposed=transposed)
    assert found.dtype == DTYPE
    assert out is None or found is out
    limit = bound(DTYPE, 2) * expected.abs().max()
    assert (found.double() - expected).abs().max() <= limit


def test_tokens_may_be_some_columns_of_a_tensor():
    x, weight, scale = operands(9, 32, 64, False)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(multiply_few_tokens(wide[:, 64:], weight, scale), multiply_few_tokens(x, weight, scale))
