import math

import pytest
import torch
from pydantic import ValidationError

from ltx_titan.config import OptimizerSection
from ltx_titan.optim import build_optimizers
from ltx_titan.optim.build import is_matrix
from ltx_titan.optim.muon import Muon
from ltx_titan.parallel.grad_norm import clip_factor, grad_norms, scale_grads_
from tests.optim.toy import loss_of, toy

# Adafactor's step is relative to the size of a weight, here about 0.05.
RATES = {
    "adamw": 3e-3,
    "adamw8bit": 3e-3,
    "adamw4bit": 3e-3,
    "adamw_schedulefree": 1e-2,
    "muon": 1e-2,
    "adafactor": 0.1,
}


def train(model, steps=12, lr=3e-3, **fields):
    optimizers = build_optimizers(model.named_parameters(), OptimizerSection(lr=lr, **fields))
    losses = []
    for step in range(steps):
        optimizers.set_lr(lr * (1 - step / steps))
        loss = loss_of(model)
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses, optimizers


@pytest.mark.parametrize(("name", "lr"), RATES.items())
def test_each_optimizer_trains(name, lr):
    losses, _ = train(toy(), name=name, lr=lr)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "bytes_per_weight"),
    [
        ("adamw", 8),
        ("adamw8bit", 2.3),
        ("adamw4bit", 1.4),
        ("adamw_schedulefree", 8),
        ("prodigy", 16),
        ("muon", 4.2),
        ("adafactor", 0.3),
    ],
)
def test_state_takes_the_memory_that_the_settings_say(name, bytes_per_weight):
    model = toy()
    _, optimizers = train(model, steps=1, name=name, lr=1.0 if name == "prodigy" else 3e-3)
    state = sum(t.nbytes for part in optimizers.parts for values in part.state.values() for t in values.values())
    assert state <= bytes_per_weight * sum(p.numel() for p in model.parameters()) + 1000


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit"])
def test_a_clip_factor_in_the_update_is_that_of_scaled_gradients(name):
    one, two = toy(), toy()
    settings = OptimizerSection(name=name, lr=3e-3)
    scaling, plain = (build_optimizers(model.named_parameters(), settings) for model in (one, two))
    for step in range(4):
        for model in (one, two):
            (10**step * loss_of(model)).backward()
        factor = clip_factor(grad_norms(one.named_parameters())[0], 5.0)
        assert bool(factor < 1) == (step > 0)
        scaling.step(factor)
        scale_grads_(two.parameters(), factor)
        assert float(grad_norms(two.named_parameters())[0]) <= 5.0 * (1 + 1e-6)
        plain.step()
        for optimizers in (scaling, plain):
            optimizers.zero_grad()
        # A gradient is divided by a rounded reciprocal in one and multiplied in the other, after which a moment's code
        # may be the next one; steps are 3e-3.
        atol = 1e-6 if name == "adamw" else 3e-4
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit"])
def test_an_update_that_is_skipped_changes_nothing(name):
    model = toy()
    _, optimizers = train(model, steps=1, name=name)
    tensors = [p.detach() for p in model.parameters()]
    tensors += [t for part in optimizers.parts for values in part.state.values() for t in values.values()]
    before = [tensor.clone() for tensor in tensors]
    (math.inf * loss_of(model)).backward()
    optimizers.step(skip=torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_only_optimizers_that_take_a_factor_are_given_one():
    for fields in ({"name": "muon"}, {"name": "adafactor"}, {"in_backward": True}):
        optimizers = build_optimizers(toy().named_parameters(), OptimizerSection(**fields))
        assert not optimizers.can_skip
        assert not optimizers.can_scale


def test_muon_takes_the_matrices_of_the_blocks():
    model = toy()
    muon, adamw = build_optimizers(model.named_parameters(), OptimizerSection(name="muon")).parts
    assert isinstance(muon, Muon)
    names = {parameter: name for name, parameter in model.named_parameters()}
    taken = {names[p] for p in muon.param_groups[0]["params"]}
    assert taken == {f"transformer_blocks.{i}.{layer}.weight" for i in range(2) for layer in ("up", "down")}
    assert taken | {names[p] for p in adamw.param_groups[0]["params"]} == set(names.values())
    assert is_matrix("transformer_blocks.0.attn1.to_q.lora_A.weight", torch.nn.Parameter(torch.zeros(2, 4)))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw_schedulefree"])
def test_an_update_in_the_backward_pass_is_the_same_update(name):
    after, before = toy(), toy()
    expected, _ = train(after, steps=3, name=name)
    found, optimizers = train(before, steps=3, name=name, in_backward=True)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(after.parameters(), before.parameters(), strict=True))
    loss_of(before).backward()
    assert all(parameter.grad is None for parameter in before.transformer_blocks.parameters())
    optimizers.step()  # the rest: outside the blocks gradients come at both ends of the pass
    assert all(parameter.grad is None for parameter in before.parameters())
    assert len(optimizers.parts) == 3  # one a block, and one for everything else


@pytest.mark.parametrize("name", ["adamw", "adamw4bit", "adamw_schedulefree", "muon"])
def test_offloaded_state_gives_the_same_update(name):
    here, there = toy(), toy()
    expected, _ = train(here, steps=3, name=name)
    found, optimizers = train(there, steps=3, name=name, offload_state=True)
    assert found == expected
    assert len(optimizers.parts) == (5 if name == "muon" else 3)


def test_stochastic_rounding_keeps_updates_that_rounding_would_lose():
    def moved(**fields):
        model = toy().bfloat16()
        start = [p.detach().clone() for p in model.parameters()]
        train(model, steps=4, lr=2e-6, weight_decay=0.0, **fields)
        return sum((p != s).sum().item() for p, s in zip(model.parameters(), start, strict=True))

    assert moved(name="adamw8bit", stochastic_rounding=True) > 3 * moved(name="adamw8bit")
    assert moved(stochastic_rounding=True) == moved(stochastic_rounding=True)


def test_frozen_weights_are_skipped_and_a_model_without_trained_weights_is_refused():
    model = toy().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no weight requires a gradient.*lora\.targets"):
        build_optimizers(model.named_parameters(), OptimizerSection())
    model.patchify_proj.requires_grad_(True)
    (part,) = build_optimizers(model.named_parameters(), OptimizerSection()).parts
    assert len(part.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"name": "muon", "in_backward": True}, "in_backward = true: expected name"),
        ({"in_backward": True, "offload_state": True}, "at most one"),
        ({"name": "muon", "stochastic_rounding": True}, "stochastic_rounding = true"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"name": "sgd"}, "name"),
        ({"name": "schedulefree"}, 'expected "adamw_schedulefree"'),
        ({"name": "adamw_schedulefree", "ema_decay": 0.9}, "averages the weights itself"),
        ({"name": "adamw_schedulefree", "betas": [0.0, 0.99]}, "first value above 0"),
        ({"name": "adamw_schedulefree", "stochastic_rounding": True}, "stochastic_rounding = true"),
        ({"name": "prodigy", "lr": 1e-4}, "expected about 1.*d_coef"),
        ({"name": "prodigy", "in_backward": True}, "in_backward = true: expected name"),
        ({"name": "prodigy", "offload_state": True}, "estimated from all weights"),
        ({"name": "prodigy", "groups": [{"name": "a", "match": ["ff"], "lr_factor": 2.0}]}, "another one in a"),
        ({"groups": [{"name": "a"}]}, "match or blocks, found neither"),
        ({"groups": [{"name": "video", "match": ["video"]}]}, "choose another name"),
        ({"groups": [{"name": "a", "match": ["ff"]}, {"name": "a", "match": ["up"]}]}, "a twice"),
        ({"groups": [{"name": "a", "match": ["ff"], "freeze": True, "lr_factor": 2.0}]}, "freeze = true"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, names):
    with pytest.raises(ValidationError, match=names):
        OptimizerSection(**fields)
