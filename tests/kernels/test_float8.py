"""Quantization and transposition of float8 operands, against their formulas.

`pytest -m gpu -s tests/kernels/test_float8.py -k table` prints the bandwidth of joined quantization.
"""

import pytest
import torch

from ltx_titan.benchmarks.measure import copy_bandwidth, time_ms
from ltx_titan_kernels import formulas
from ltx_titan_kernels.float8 import launch_quantize, quantize_joined, quantize_tokens, transpose_bytes
from ltx_titan_kernels.launches import Launch
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


@pytest.mark.parametrize("widths", [(48,), (16, 48), (64, 16, 32), (256, 128, 64, 16)])
def test_channels_in_several_tensors_are_quantized_as_one(widths):
    q = on_the_grid(6, sum(widths))
    scale = 2.0 ** torch.arange(-3, 3, device=DEVICE)[:, None]
    factor = (2.0 ** (torch.arange(sum(widths), device=DEVICE) % 5)).bfloat16()
    x = (q.float() * scale / factor.float()).bfloat16()
    xs = list(x.split(widths, dim=1))
    xs[0] = xs[0].contiguous()  # one with its own stride, the others with that of the whole
    found, found_scale = quantize_joined(xs, factor.split(widths))
    assert torch.equal(found.float(), q.float())
    assert torch.equal(found_scale, scale)


def test_the_largest_number_of_a_token_may_be_in_any_of_the_tensors():
    xs = [torch.ones(4, 16, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    for token, x in enumerate(xs):
        x[token, 3] = -448
    found, scale = quantize_joined(xs, [torch.ones(16, device=DEVICE) for _ in xs])
    assert torch.equal(found.float(), torch.cat(xs, dim=1).float())
    assert torch.equal(scale, torch.ones(4, 1, device=DEVICE))


@pytest.mark.runs_on("gpu")
def test_table_of_joined_quantization(capsys):
    shapes = [(16, 2, 1), (8, 2, 1), (8, 8, 1), (4, 4, 1), (4, 8, 1), (4, 16, 1)]
    launches = [Launch(*shape) for shape in shapes]
    columns = ["default", *(f"{launch.warps}w {launch.programs}p {launch.stages}s" for launch in launches)]
    with capsys.disabled():
        print(f"\ncopy {copy_bandwidth(DEVICE) / 1e12:.2f} TB/s; 6,160 tokens, us (TB/s)")
        print(f"{'channels':20} {'one tensor':>14} " + " ".join(f"{c:>14}" for c in columns))
    for widths in [(4096, 4096, 4096, 128), (4096, 4096, 4096), (4096, 128), (2048, 2048, 128), (4096, 64, 64)]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        joined = torch.randn(6160, sum(widths), generator=generator, device=DEVICE, dtype=torch.bfloat16)
        factor = torch.rand(sum(widths), generator=generator, device=DEVICE) + 0.5
        xs, factors = [x.contiguous() for x in joined.split(widths, dim=1)], factor.split(widths)
        expected = launch_quantize(joined, factor)
        found = [quantize_joined(xs, factors, launch) for launch in [None, *launches]]
        assert all(torch.equal(q.float(), expected[0].float()) and torch.equal(s, expected[1]) for q, s in found)
        # Two sets of operands, each larger than the cache.
        pairs = [(xs, joined), ([x.clone() for x in xs], joined.clone())]
        ways = [[lambda j=j, factor=factor: launch_quantize(j, factor) for _, j in pairs]]
        ways += [[lambda p=p, f=factors, k=k: quantize_joined(p, f, k) for p, _ in pairs] for k in [None, *launches]]
        times = [time_ms(way, DEVICE) * 1e3 for way in ways]
        cells = " ".join(f"{us:7.1f} ({3 * joined.numel() / us / 1e6:4.2f})" for us in times)
        with capsys.disabled():
            print(f"{'+'.join(map(str, widths)):20} {cells}", flush=True)
    for width in (4096, 16384):
        pair = [torch.randn(6160, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
        ways = [[lambda x=x, k=launch: launch_quantize(x, None, k) for x in pair] for launch in [None, *launches]]
        times = [time_ms(way, DEVICE) * 1e3 for way in ways]
        cells = " ".join(f"{us:7.1f} ({3 * pair[0].numel() / us / 1e6:4.2f})" for us in times)
        with capsys.disabled():
            print(f"{f'{width}, no factor':35} {cells}", flush=True)


@pytest.mark.parametrize(("rows", "columns"), [((4,), 8), ((20,), 132), ((260,), 128), ((128, 16, 132), 64)])
def test_transposed_bytes(rows, columns):
    data = torch.randint(0, 256, (sum(rows), columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = data.to(DEVICE)
    found, ones = transpose_bytes(data.split(rows))
    assert torch.equal(found, data.T)
    assert torch.equal(ones, torch.ones(1, columns, device=DEVICE))


def test_registration():
    x = on_the_grid(3, 16).bfloat16()
    for factor in (None, torch.ones(16, dtype=torch.bfloat16, device=DEVICE)):
        torch.library.opcheck(torch.ops.ltx_titan.quantize_tokens.default, (x, factor))
