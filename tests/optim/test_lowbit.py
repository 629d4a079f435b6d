import pytest
import torch
from torchao.optim import AdamW4bit, AdamW8bit

from ltx_titan.optim.lowbit import LowBitAdamW

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (40, 8), (5000,))]


def steps(parameters, optimizer, count=3):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("bits", [8, 4])
def test_the_numbers_are_torchaos(bits, monkeypatch):
    theirs, ours = weights()[:1], weights()[:1]
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    kind = AdamW8bit if bits == 8 else AdamW4bit
    expected = steps(theirs, kind(theirs, block_size=128, **OPTIONS))
    found = steps(ours, LowBitAdamW(ours, bits=bits, **OPTIONS))
    assert torch.equal(found[0], expected[0])


def test_small_and_narrow_weights_get_exact_adamw():
    exact, ours = weights(), weights()
    steps(exact, torch.optim.AdamW(exact, **OPTIONS))
    optimizer = LowBitAdamW(ours, bits=8, **OPTIONS)
    steps(ours, optimizer)
    for one, two in zip(exact[1:], ours[1:], strict=True):
        torch.testing.assert_close(two, one)
    assert set(optimizer.state[ours[0]]) == {
        "step", "exp_avg.codes", "exp_avg.scale", "exp_avg_sq.codes", "exp_avg_sq.scale"}  # fmt: skip
    assert set(optimizer.state[ours[2]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_thirty_two_bits_are_adamw():
    exact, ours = weights(), weights()
    steps(exact, torch.optim.AdamW(exact, **OPTIONS))
    steps(ours, LowBitAdamW(ours, bits=32, **OPTIONS))
    for one, two in zip(exact, ours, strict=True):
        torch.testing.assert_close(two, one)


def test_rounding_at_random_leaves_other_random_numbers_alone_and_repeats():
    def rounded(seed):
        parameters = [torch.nn.Parameter(weights()[0].detach().bfloat16())]
        optimizer = LowBitAdamW(parameters, bits=32, stochastic_rounding=True, seed=seed, **(OPTIONS | {"lr": 1e-4}))
        parameters[0].grad = torch.ones_like(parameters[0])
        optimizer.step()
        return parameters[0]

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one = rounded(0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, rounded(0))
    assert not torch.equal(one, rounded(1))
    exact = weights()[0].detach().bfloat16().float() * (1 - 1e-5) - 1e-4
    # 8,192 roundings, each off by less than one step of at most 2^-7 of a weight around 1.
    assert abs((one.float() - exact).mean()) < 2e-4
