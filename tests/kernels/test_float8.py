import pytest
import torch

from ltx_titan_kernels import formulas
from ltx_titan_kernels.float8 import quantize_tokens, transpose_bytes
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

CASES = [(1, 16), (5, 48), (7, 4096)]


def on_the_grid(tokens, width, seed=0):
    """Numbers that e4m3 holds, the largest of each row among them: the interpreter rounds others in its own way."""
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(tokens, width, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    q[:, 0] = 448
    return q.to(DEVICE)


@pytest.mark.parametrize(("tokens", "width"), CASES)
@pytest.mark.parametrize("has_factor", [False, True])
def test_numbers_that_the_format_holds_come_back_exactly(tokens, width, has_factor):
    q = on_the_grid(tokens, width)
    scale = 2.0 ** torch.arange(-20, tokens - 20, device=DEVICE)[:, None]
    factor = 2.0 ** (torch.arange(width, device=DEVICE) % 5) if has_factor else None
    x = q.float() * scale if factor is None else q.float() * scale / factor
    found, found_scale = quantize_tokens(x.bfloat16(), None if factor is None else factor.bfloat16())
    assert torch.equal(found.float(), q.float())
    assert torch.equal(found_scale, scale)


def test_other_numbers_are_rounded_to_within_half_a_step_of_the_formula():
    # A native kernel rounds as the formula does, except where a product of two roundings lies between.
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)
    found, scale = quantize_tokens(x)
    expected, expected_scale = formulas.quantize_tokens(x)
    torch.testing.assert_close(scale, expected_scale)
    is_equal = found.float() == expected.float()
    # The interpreter rounds ties away from zero, and up to the next power of two wrongly.
    assert is_equal.float().mean() > (0.999 if DEVICE.type == "cuda" else 0.8)


def test_a_row_of_zeros_stays_zero():
    x = torch.ones(3, 32, device=DEVICE, dtype=torch.bfloat16)
    x[1] = 0
    found, scale = quantize_tokens(x)
    assert torch.equal(found.float() * scale, x.float())


# The interpreter's cast makes a number of it.
@pytest.mark.runs_on("gpu")
def test_a_number_that_is_not_finite_is_kept():
    x = torch.ones(2, 32, device=DEVICE, dtype=torch.bfloat16)
    x[1, 5] = float("nan")
    found, _ = quantize_tokens(x)
    assert found.float().isnan().any(dim=1).tolist() == [False, True]


@pytest.mark.parametrize(("rows", "columns"), [(4, 8), (20, 132), (260, 128)])
def test_transposed_bytes(rows, columns):
    data = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = data.to(DEVICE)
    found, ones = transpose_bytes(data)
    assert torch.equal(found, data.T)
    assert torch.equal(ones, torch.ones(1, columns, device=DEVICE))


def test_registration():
    x = on_the_grid(3, 16).bfloat16()
    for factor in (None, torch.ones(16, dtype=torch.bfloat16, device=DEVICE)):
        torch.library.opcheck(torch.ops.ltx_titan.quantize_tokens.default, (x, factor))
