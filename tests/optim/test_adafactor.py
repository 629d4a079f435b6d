import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ltx_titan.config import OptimizerSection
from ltx_titan.optim import build_optimizers
from ltx_titan.optim.adafactor import Adafactor
from tests.optim.toy import loss_of, toy


def test_it_is_torchs_adafactor():
    one, two = toy(), toy()
    theirs = torch.optim.Adafactor(one.parameters(), lr=1e-2, weight_decay=0.1)
    ours = Adafactor(two.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for model, optimizer in ((one, theirs), (two, ours)):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)


def test_small_gradients_are_normalized_and_bfloat16_weights_move_by_less_than_their_resolution():
    def trained(scale, dtype):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.ones(256, 64, dtype=dtype))
        optimizer = Adafactor([weight], lr=1e-4, stochastic_rounding=True)
        for _ in range(4):
            weight.grad = (scale * torch.randn(256, 64, generator=generator)).to(dtype)
            optimizer.step()
        return weight.detach().float() - 1

    exact = trained(1.0, torch.float32)
    # 1e-9 is the size of gradients of a model with billions of weights.
    torch.testing.assert_close(trained(1e-9, torch.float32), exact, rtol=1e-3, atol=1e-7)
    rounded = trained(1e-9, torch.bfloat16)
    assert torch.equal(rounded, trained(1e-9, torch.bfloat16))
    # Each step is a fortieth of the distance between two values; to the nearest value nothing would move.
    assert (rounded != 0).float().mean() > 0.01
    groups = [exact > 1e-4, exact < -1e-4]
    means = [(float(rounded[group].mean()), float(exact[group].mean())) for group in groups]
    assert all(abs(found - expected) < 1e-4 for found, expected in means), means


class _NeverReads(TorchDispatchMode):
    """Fails where the host would have to wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing_so_that_an_update_can_be_part_of_a_graph():
    model = toy().bfloat16()
    optimizers = build_optimizers(
        model.named_parameters(), OptimizerSection(name="adafactor", in_backward=True, stochastic_rounding=True)
    )
    rates = [group["lr"] for part in optimizers.parts for group in part.param_groups]
    with _NeverReads():
        for lr in (1e-2, 1e-3):
            optimizers.set_lr(lr)
            loss_of(model).backward()
            optimizers.step()
    assert all(
        rate is group["lr"] for rate, part in zip(rates, optimizers.parts, strict=True) for group in part.param_groups
    )
    assert [float(rate) for rate in rates] == pytest.approx([1e-3] * 3)
