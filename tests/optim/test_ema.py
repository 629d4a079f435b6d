import pytest
import torch

from ltx_titan.optim import EMA
from tests.optim.toy import toy


def move(model, step):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)


def test_the_formula():
    model = toy()
    start = [p.detach().clone() for p in model.parameters()]
    ema = EMA(model.parameters(), 0.5)
    expected = start
    for step in range(1, 12):
        move(model, step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * step for e in expected]
    for parameter, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ema.state[parameter]["ema"], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_and_out_changes_nothing_in_the_end(dtype):
    model = toy().to(dtype)
    model.patchify_proj.requires_grad_(False)
    frozen = model.patchify_proj.weight.clone()
    ema = EMA(model.parameters(), 0.9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1 / 3)
    ema.update(1)
    weights = [p.detach().clone() for p in model.parameters()]
    averages = [values["ema"].clone() for values in ema.state.values()]
    with ema.swapped_in(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(p, a.to(dtype)) for p, a in zip(trained, averages, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(v["ema"], a) for v, a in zip(ema.state.values(), averages, strict=True))
    assert not torch.equal(model.patchify_proj.weight, frozen)
