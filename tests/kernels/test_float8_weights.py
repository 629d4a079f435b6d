import pytest
import torch

from ltx_titan_kernels.float8_weights import quantize_transposed
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


@pytest.mark.parametrize(("rows", "columns"), [(16, 48), (144, 80), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_quantized_by_rows_and_transposed(rows, columns, dtype):
    # Numbers that the format holds, because the interpreter rounds others in its own way.
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)
    scale = 2.0 ** (torch.arange(rows, device=DEVICE) % 9 - 4)
    # A view of more columns, as tensor parallelism may leave one.
    wide = torch.zeros(rows, columns + 16, dtype=dtype, device=DEVICE)
    wide[:, :columns] = q.float() * scale[:, None]
    found, factors = quantize_transposed([wide[:, :columns]], scale, torch.tensor([3.0], device=DEVICE))
    assert found.is_contiguous()
    assert torch.equal(found.float(), q.float().T)
    assert torch.equal(factors, torch.full((1, columns), 3.0, device=DEVICE))


def test_rows_in_float8_get_another_scale():
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(32, 48, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)
    factor = 2.0 ** (torch.arange(32, device=DEVICE) % 4)
    found, _ = quantize_transposed([q], factor, factor[:1])
    assert torch.equal(found.float(), (q.float() / factor[:, None]).T)


def test_a_weight_may_have_one_scale():
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(32, 48, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)
    scale = torch.tensor([0.25], device=DEVICE)
    found, factors = quantize_transposed([(q.float() * scale).bfloat16()], scale, scale)
    assert torch.equal(found.float(), q.float().T)
    assert torch.equal(factors, scale.expand(1, 48))


def test_rows_of_several_weights_are_joined():
    generator = torch.Generator().manual_seed(0)
    q = (torch.randn(176, 48, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn).to(DEVICE)
    one = torch.ones(1, device=DEVICE)
    found, _ = quantize_transposed(q.bfloat16().split((16, 128, 32)), one, one)
    assert torch.equal(found.float(), q.float().T)


# The interpreter's cast makes a number of it.
@pytest.mark.runs_on("gpu")
def test_a_number_that_is_not_finite_is_kept():
    weight = torch.ones(16, 32, device=DEVICE, dtype=torch.bfloat16)
    weight[3, 5] = float("nan")
    ones = torch.ones(16, device=DEVICE)
    found, _ = quantize_transposed([weight], ones, ones[:1])
    assert found.float().isnan().nonzero().tolist() == [[5, 3]]
