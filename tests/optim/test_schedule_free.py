import pytest
import schedulefree
import torch

from ltx_titan.config import OptimizerSection
from ltx_titan.optim import build_optimizers
from ltx_titan.optim.schedule_free import ScheduleFreeAdamW
from tests.optim.toy import loss_of, toy


def step(model, optimizer):
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("chunk", [1 << 26, 300])
def test_weights_and_average_are_those_of_the_package(monkeypatch, chunk):
    monkeypatch.setattr("ltx_titan.optim.sharding.CHUNK", chunk)
    ours, theirs = toy(), toy()
    rules = {"lr": 1e-2, "betas": (0.8, 0.99), "weight_decay": 0.1}
    optimizer = ScheduleFreeAdamW(ours.parameters(), **rules)
    reference = schedulefree.AdamWScheduleFree(theirs.parameters(), **rules)
    reference.train()
    for rate in (5e-3, 1e-2, 1e-2):  # a warmup
        optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate
        step(ours, optimizer)
        step(theirs, reference)
    assert equal(ours, theirs)
    trained = [parameter.detach().clone() for parameter in ours.parameters()]
    reference.eval()
    with optimizer.averaged():
        assert equal(ours, theirs)
    assert all(torch.equal(p, before) for p, before in zip(ours.parameters(), trained, strict=True))


def test_using_the_average_during_training_changes_no_number():
    """The package's own swap rounds, so that a run would depend on when it validates."""
    used, plain = toy(), toy()
    settings = OptimizerSection(name="adamw_schedulefree", lr=1e-2)
    for model in (used, plain):
        optimizers = build_optimizers(model.named_parameters(), settings)
        for _ in range(3):
            step(model, optimizers)
            if model is used:
                with optimizers.averaged(model):
                    assert loss_of(model) > 0
    assert equal(used, plain)


def test_a_parameter_is_updated_as_often_as_it_has_a_gradient():
    """As with updates in the backward pass, where the parts of a group may be updated one after the other."""
    together, apart = toy(), toy()
    for model in (together, apart):
        optimizer = ScheduleFreeAdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
        for _ in range(3):
            loss_of(model).backward()
            if model is apart:
                kept, model.proj_out.weight.grad = model.proj_out.weight.grad, None
                optimizer.step()
                optimizer.zero_grad()
                model.proj_out.weight.grad = kept
            optimizer.step()
            optimizer.zero_grad()
    assert equal(together, apart)
