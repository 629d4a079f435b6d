"""Rows quantized after GELU or its gradient, against the formula in float32.

`pytest -m gpu -s tests/kernels/test_float8_rows.py` prints times at the widths of a block.
"""

import pytest
import torch
from torch.nn import functional as F

from ltx_titan.benchmarks.measure import copy_bandwidth, time_ms
from ltx_titan_kernels.float8_rows import quantize_parts, quantize_rows
from ltx_titan_kernels.float8_weights import quantize_transposed
from ltx_titan_kernels.formulas import quantize_tokens
from ltx_titan_kernels.launches import Launch
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


def draw(tokens, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 1, tokens)[:, None]
    return (torch.randn(tokens, width, generator=generator) * size).to(DEVICE, torch.bfloat16)


def normal(tokens, width):
    return torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)


def expected(x, gradient, is_gelu):
    wide = x.float()
    if gradient is not None:
        return torch.ops.aten.gelu_backward(gradient.float(), wide, approximate="tanh")
    return F.gelu(wide, approximate="tanh") if is_gelu else wide


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (7, 80), (40, 256)])
@pytest.mark.parametrize(("has_gradient", "is_gelu"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("has_sum", [False, True])
def test_rows_and_their_sum(tokens, width, has_gradient, is_gelu, has_sum):
    x, gradient = draw(tokens, width), draw(tokens, width, seed=1) if has_gradient else None
    wanted = expected(x, gradient, is_gelu)
    q, scale, sums = quantize_rows(x, gradient, is_gelu=is_gelu, has_sum=has_sum)
    assert torch.equal(scale.log2(), scale.log2().round())
    amax = wanted.abs().amax(1, keepdim=True)
    assert (amax <= 448.01 * scale).all()
    assert (amax >= 223.99 * scale).all()
    # Half a step of e4m3, and the rounding of what cancels where GELU's gradient is near 0. The interpreter rounds up
    # to the next power of two wrongly.
    error = (q.float() * scale - wanted).abs()
    rounding = 2e-6 * gradient.float().abs() if has_gradient else 0.0
    is_close = error <= (2**-4 + 1e-5) * wanted.abs() + scale * 2**-10 + rounding
    assert is_close.float().mean() >= (1 if DEVICE.type == "cuda" else 0.75)
    assert sums.shape == ((width,) if has_sum else (0,))
    if has_sum:
        torch.testing.assert_close(sums, wanted.sum(0), rtol=1e-4, atol=1e-5 * wanted.abs().sum(0).max().item())


def test_scales_are_those_of_the_formula():
    # Largest numbers around 448 times a power of two, where a scale doubles; and zeros, and the smallest numbers.
    amax = torch.tensor([448.0, 449.0, 447.0, 450.0, 1.75, 1.7578125, 0.0, 1e-32, 1e30, 3.5], device=DEVICE)
    x = torch.zeros(10, 32, device=DEVICE, dtype=torch.bfloat16)
    x[:, 3] = amax
    q, scale, _ = quantize_rows(x)
    wanted, wanted_scale = quantize_tokens(x, powers_of_two=True)
    assert torch.equal(scale, wanted_scale)
    assert torch.equal(q.float(), wanted.float())


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("has_sum", [False, True])
def test_rows_in_several_tensors_equal_joined_ones(count, has_sum):
    joined = draw(9, count * 48)
    joined[3, -1] = 100
    parts = [joined[:, :48].contiguous(), *joined[:, 48:].split(48, dim=1)]  # one with a stride of its own
    found, wanted = quantize_parts(parts, has_sum=has_sum), quantize_rows(joined, has_sum=has_sum)
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0].float(), wanted[0].float())


def test_rows_may_be_some_columns_of_a_tensor():
    wide = draw(9, 128)
    for one, two in zip(
        quantize_rows(wide[:, 64:], wide[:, :64], is_gelu=True, has_sum=True),
        quantize_rows(wide[:, 64:].contiguous(), wide[:, :64].contiguous(), is_gelu=True, has_sum=True),
        strict=True,
    ):
        assert torch.equal(one.float(), two.float())


# The interpreter's cast makes a number of it.
@pytest.mark.runs_on("gpu")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_kept(value):
    x = torch.ones(2, 32, device=DEVICE, dtype=torch.bfloat16)
    x[1, 5] = value
    q, scale, _ = quantize_rows(x)
    assert (q.float() * scale).isfinite().all(dim=1).tolist() == [True, False]


@pytest.mark.runs_on("gpu")
@pytest.mark.parametrize("tokens", [4032, 16128])
def test_table_of_times(tokens, capsys):
    with capsys.disabled():
        print(f"\ncopy {copy_bandwidth(DEVICE) / 1e12:.2f} TB/s; {tokens} tokens, us (TB/s)")
    shapes = [(16, 1, 2), (16, 2, 2), (16, 2, 1), (8, 2, 2), (8, 4, 2), (8, 6, 1)]
    launches = [None, *(Launch(*shape) for shape in shapes)]
    columns = ["default", *(f"{each.warps}w {each.programs}p {each.stages}s" for each in launches[1:])]
    with capsys.disabled():
        print(
            f"{'':28} {'compiled' if tokens == 4032 else 'eager':>14} "
            + " ".join(f"{column:>14}" for column in columns)
        )
    for width, has_gradient, is_gelu, has_sum in [
        (4096, False, False, False),
        (4096, False, False, True),
        (16384, False, True, False),
        (16384, True, True, True),
    ]:
        pairs = [(normal(tokens, width), normal(tokens, width)) for _ in range(2)]

        def formula(x, gradient, g=has_gradient, a=is_gelu, s=has_sum):
            wide = expected(x, gradient if g else None, a)
            return *quantize_tokens(wide, powers_of_two=True), wide.sum(0) if s else None

        def launched(x, gradient, launch, g=has_gradient, a=is_gelu, s=has_sum):
            return quantize_rows(x, gradient if g else None, is_gelu=a, has_sum=s, launch=launch)

        wanted, found = formula(*pairs[0]), launched(*pairs[0], None)
        # Where rounding of the last bit of GELU moves a number over the middle between two of e4m3, or a scale.
        assert ((found[0].float() * found[1]) == (wanted[0].float() * wanted[1])).float().mean() > 0.995
        # Compilation takes longer than the measurement: once for each kind.
        compiled = torch.compile(formula, dynamic=False) if tokens == 4032 else formula
        ways = [compiled, *(lambda x, g, k=launch: launched(x, g, k) for launch in launches)]
        times = [time_ms([lambda p=pair, way=way: way(*p) for pair in pairs], DEVICE) * 1e3 for way in ways]
        size = (5 if has_gradient else 3) * tokens * width
        kind = "gelu backward" if has_gradient else "gelu" if is_gelu else "plain"
        name = f"{width} {kind}{' + sum' if has_sum else ''}"
        with capsys.disabled():
            print(f"{name:28} " + " ".join(f"{us:7.1f} ({size / us / 1e6:4.2f})" for us in times), flush=True)
    for count, width in [(3, 4096), (2, 4096), (2, 2048)]:
        sets = [[normal(tokens, width) for _ in range(count)] for _ in range(2)]
        ways = [lambda parts, k=launch: quantize_parts(parts, has_sum=True, launch=k) for launch in launches]
        times = [time_ms([lambda p=parts, way=way: way(p) for parts in sets], DEVICE) * 1e3 for way in ways]
        size = 3 * tokens * count * width
        with capsys.disabled():
            name = f"{count} of {width} + sum"
            print(f"{name:28} {'':14} " + " ".join(f"{us:7.1f} ({size / us / 1e6:4.2f})" for us in times), flush=True)
    for rows, columns_, dtype in [(16384, 4096, torch.bfloat16), (tokens, 16384, torch.float8_e4m3fn)]:
        matrices = [normal(rows, columns_).to(dtype) for _ in range(2)]
        one = torch.ones(1, device=DEVICE)
        us = time_ms([lambda m=m, one=one: quantize_transposed([m], one, one) for m in matrices], DEVICE) * 1e3
        size = rows * columns_ * (matrices[0].element_size() + 1)
        with capsys.disabled():
            print(f"transposed {rows} x {columns_} {dtype}: {us:.1f} us ({size / us / 1e6:.2f} TB/s)", flush=True)
