"""Exchanged gradients are added in float32, in the order of ranks, whatever their number and alignment."""

import pytest
import torch

from ltx_titan.benchmarks.measure import time_ms
from ltx_titan_kernels.sum_parts import sum_parts, sum_parts_reference
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")


def parts(ranks, numel, dtype=torch.bfloat16):
    """All ranks' parts [ranks, numel], of sizes that a sum in bfloat16 would lose."""
    generator = torch.Generator().manual_seed(0)
    scale = 10.0 ** torch.arange(ranks)[:, None]
    return (torch.randn(ranks, numel, generator=generator) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("numel", [4096, 10_000, 4099, 1])
@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (3, 1), (8, 7)])
def test_the_sum_is_that_of_float32_in_the_order_of_ranks(ranks, rank, numel):
    rows = parts(ranks, numel)
    received = torch.cat([rows[:rank], rows[rank + 1 :]])
    out = torch.full((numel,), float("nan"), device=DEVICE)
    sum_parts(rows[rank], received, rank, out)
    assert torch.equal(out, sum_parts_reference(rows[rank], received, rank))
    if ranks == 2:
        assert torch.equal(out, torch.sum(rows, 0, dtype=torch.float32))


@pytest.mark.runs_on("gpu")
def test_a_block_of_two_ranks_is_summed_to_the_bits_of_pytorch():
    """The size of an LTX-2.3 block; prints a table of times, which depend on what else the device does."""
    numel = 193_347_680
    rows = parts(2, numel)
    received, out = rows[1:].clone(), torch.empty(numel, device=DEVICE)

    def copied():
        rows[0].copy_(received[0])
        torch.sum(rows, 0, dtype=torch.float32, out=out)

    ways = {"copy and sum": (copied, 12), "kernel": (lambda: sum_parts(rows[0], received, 0, out), 8)}
    sums = []
    for name, (call, moved) in ways.items():
        call()
        sums.append(out.clone())
        ms = time_ms([call], DEVICE)
        print(f"\n{name:14} {ms:7.3f} ms {moved * numel / ms / 1e6:6.0f} GB/s", end="")
    assert torch.equal(*sums)
