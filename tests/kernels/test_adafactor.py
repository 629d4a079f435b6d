"""The kernels' update of many weights equals torch's Adafactor in float32; in bfloat16 it is rounded without bias."""

import pytest
import torch

from ltx_titan.optim.adafactor import Adafactor
from ltx_titan_kernels.adafactor import Updater
from tests.kernels.comparison import DEVICE

pytestmark = pytest.mark.runs_on("gpu", "interpreter")

# Several tiles and chunks downwards, several across, a vector, and rows that are not aligned, which PyTorch updates.
SHAPES = [(130, 16), (8, 136), (24,), (5, 3)]


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in SHAPES]


def set_gradients(parameters, step):
    """Views of one tensor, as FSDP2 makes them; one weight has no gradient in the second step."""
    sizes = [parameter.numel() for parameter in parameters]
    values = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(step)).to(DEVICE)
    for parameter, gradient in zip(parameters, values.split(sizes), strict=True):
        parameter.grad = gradient.view_as(parameter)
    if step == 1:
        parameters[1].grad = None


def test_it_is_torchs_adafactor(monkeypatch):
    updated = []
    update = Updater.__call__
    monkeypatch.setattr(Updater, "__call__", lambda self, these: (updated.append(len(these)), update(self, these)))
    one, two = weights(), weights()
    theirs = torch.optim.Adafactor(one, lr=1e-2, weight_decay=0.1)
    ours = Adafactor(two, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        for parameters, optimizer in ((one, theirs), (two, ours)):
            set_gradients(parameters, step)
            optimizer.step()
    assert updated == [3, 2, 3]
    for shape, a, b in zip(SHAPES, one, two, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=str(shape))
        for name, value in ours.state[b].items():
            expected = theirs.state[a][name].to(DEVICE)
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=f"{shape} {name}")


def test_bfloat16_weights_are_rounded_without_bias_and_the_same_in_every_run():
    def trained(dtype, seed=0):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(64, 128, dtype=dtype, device=DEVICE))
        # The distance between values is 0.0078, below 1 it is half of that; moves are about 0.004.
        optimizer = Adafactor([weight], lr=4e-3, stochastic_rounding=True, seed=seed)
        weight.grad = torch.randn(64, 128, generator=generator).to(DEVICE, torch.bfloat16).to(dtype)
        optimizer.step()
        return weight.detach().float() - 1

    exact, found = trained(torch.float32), trained(torch.bfloat16)
    assert torch.equal(found, trained(torch.bfloat16))
    assert not torch.equal(found, trained(torch.bfloat16, seed=1))
    assert (found - exact).abs().max() < 2.0**-7
    for part in (exact > 0, exact < 0):
        expected = float(exact[part].mean())
        assert float(found[part].mean()) == pytest.approx(expected, rel=0.1)
