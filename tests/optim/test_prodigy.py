import prodigyopt
import pytest
import torch

from ltx_titan.optim.prodigy import Prodigy
from tests.optim.toy import loss_of, toy


@pytest.mark.parametrize("chunk", [1 << 26, 300])
def test_weights_and_step_size_are_those_of_the_package(monkeypatch, chunk):
    monkeypatch.setattr("ltx_titan.optim.sharding.CHUNK", chunk)
    # The first moves are below the resolution of float32 weights.
    ours, theirs = toy().double(), toy().double()
    rules = {"betas": (0.9, 0.99), "weight_decay": 0.1, "d_coef": 30.0}
    optimizer = Prodigy(ours.parameters(), **rules)
    reference = prodigyopt.Prodigy(theirs.parameters(), **rules, use_bias_correction=True, safeguard_warmup=True)
    losses = []
    for step in range(8):
        rate = min(1.0, (step + 1) / 3)
        for model, update in ((ours, optimizer), (theirs, reference)):
            update.param_groups[0]["lr"] = rate
            loss = loss_of(model)
            loss.backward()
            update.step()
            update.zero_grad()
        losses.append(loss.item())
    assert optimizer.step_size.item() == pytest.approx(reference.param_groups[0]["d"], rel=1e-6)
    assert optimizer.step_size > 1e-4
    assert losses[-1] < 0.9 * losses[0]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_step_without_gradient_changes_nothing():
    model = toy()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Prodigy(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert optimizer.step_size == 1e-6
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
