"""A few tokens times a weight that is dequantized in registers, against the same product of plain tensors.

`pytest -m gpu -s tests/kernels/test_few_tokens.py` prints how long it takes for the layers of audio.
"""

import pytest
import torch

from ltx_titan.benchmarks.measure import input_sets, time_ms
from ltx_titan_kernels.few_tokens import Tiling, choose_tiling, multiply_few_tokens
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
# As chosen, and with parts that do not divide the summed dim.
@pytest.mark.parametrize("tiling", [None, Tiling(32, 32, 3)])
def test_it_multiplies_by_the_dequantized_weight(tokens, rows, columns, transposed, kind, tiling):
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
    found = multiply_few_tokens(x, weight, scale, bias=bias, out=out, transposed=transposed, tiling=tiling)
    assert found.dtype == DTYPE
    assert out is None or found is out
    limit = bound(DTYPE, 2) * expected.abs().max()
    assert (found.double() - expected).abs().max() <= limit


def test_tokens_may_be_some_columns_of_a_tensor():
    x, weight, scale = operands(9, 32, 64, False)
    wide = torch.cat((x, x), dim=1)
    assert torch.equal(multiply_few_tokens(wide[:, 64:], weight, scale), multiply_few_tokens(x, weight, scale))


@pytest.mark.parametrize("tokens", [51, 126])
@pytest.mark.parametrize(("outputs", "summed"), [(2048, 2048), (8192, 2048), (2048, 8192), (4096, 2048), (48, 128)])
def test_a_split_gives_every_program_at_least_two_iterations(tokens, outputs, summed):
    tiling = choose_tiling(tokens, outputs, summed)
    assert tiling.splits == 1 or tiling.splits * 2 * tiling.summed <= summed
    assert tiling.splits > 1 or summed < 2048


_BEFORE = Tiling(32, 128, 1, stages=4)
_OTHERS = [Tiling(64, 128, 4), Tiling(64, 64, 8), Tiling(64, 64, 16), Tiling(128, 64, 4), Tiling(128, 64, 8, warps=8)]


@pytest.mark.runs_on("gpu")
@pytest.mark.parametrize("tokens", [51, 126])
def test_layers_of_audio_equal_their_dequantized_matmul_and_repeat_their_bits(tokens, capsys):
    with capsys.disabled():
        columns = ["chosen", "before", "cast, mm", *("/".join(map(str, tiling[:3])) for tiling in _OTHERS)]
        print(f"\n{tokens} tokens, us (GB/s of weight)\n{'out x in':12} " + " ".join(f"{c:>13}" for c in columns))
    for rows, columns in [(2048, 2048), (8192, 2048), (2048, 8192), (4096, 2048), (2048, 4096)]:
        for transposed in (False, True):
            x, weight, scale = operands(tokens, rows, columns, transposed)
            dequantized = weight.to(DTYPE) * scale
            expected = x.double() @ (dequantized.double() if transposed else dequantized.double().T)
            found = [multiply_few_tokens(x, weight, scale, transposed=transposed) for _ in range(3)]
            assert (found[0].double() - expected).abs().max() <= bound(DTYPE) * expected.abs().max()
            assert all(torch.equal(found[0], again) for again in found[1:])
            # Several copies, so that none is in the cache.
            weights = [weight.clone() for _ in range(8 * input_sets(weight.numel(), DEVICE))]

            def launch(w, tiling, x=x, scale=scale, transposed=transposed):
                return multiply_few_tokens(x, w, scale, transposed=transposed, tiling=tiling)

            def cast(w, x=x, scale=scale, transposed=transposed):
                wide = w.to(DTYPE) * scale
                return x @ (wide if transposed else wide.T)

            ways = [lambda w, t=tiling: launch(w, t) for tiling in (None, _BEFORE)] + [cast]
            others = [tiling._replace(tokens=choose_tiling(tokens, 2048, 2048).tokens) for tiling in _OTHERS]
            ways += [lambda w, t=tiling: launch(w, t) for tiling in others]
            times = [time_ms([lambda w=w, way=way: way(w) for w in weights], DEVICE) * 1e3 for way in ways]
            cells = " ".join(f"{us:6.1f} ({weight.numel() / us / 1e3:4.0f})" for us in times)
            with capsys.disabled():
                print(f"{rows:5}x{columns:<5}{'t' if transposed else ' '} {cells}", flush=True)
