import pytest
import torch
from torch.nn import functional as F

from ltx_titan.diffusion import Objective, add_noise, velocity_target

SIGMAS = torch.linspace(0.01, 0.99, 99)


def test_huber_is_twice_torchs_and_equals_the_square_up_to_delta():
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 1000, generator=generator)
    found = Objective(error="huber", huber_delta=0.7).errors(prediction, target)
    torch.testing.assert_close(found, 2 * F.huber_loss(prediction, target, reduction="none", delta=0.7))
    assert torch.equal(
        Objective(error="huber", huber_delta=100.0).errors(prediction, target), (prediction - target) ** 2
    )


def test_an_outlier_has_a_bounded_gradient_with_huber_only():
    for error, gradient in (("mse", 200.0), ("huber", 2.0)):
        prediction = torch.tensor([100.0], requires_grad=True)
        Objective(error=error).errors(prediction, torch.zeros(1)).sum().backward()
        assert prediction.grad.item() == pytest.approx(gradient)


def test_min_snr_weighs_the_error_of_the_clean_sample():
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 99, 1, 4, generator=generator)
    noised = add_noise(clean, noise, SIGMAS)
    velocity = velocity_target(clean, noise) + wrong
    predicted = noised - SIGMAS[:, None, None] * velocity
    snr = ((1 - SIGMAS) / SIGMAS) ** 2
    expected = snr.clamp(max=5.0) * (predicted - clean).square().mean(dim=(1, 2))
    objective = Objective(weighting="min_snr")
    found = objective.weights(SIGMAS) * objective.errors(velocity, velocity_target(clean, noise)).mean(dim=(1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_cosmap_favors_medium_sigmas_and_has_mean_one():
    weights = Objective(weighting="cosmap").weights(torch.linspace(0, 1, 10_001))
    assert weights.mean() == pytest.approx(1.0, abs=1e-3)
    assert weights.argmax().item() == pytest.approx(5000, abs=50)  # flat around 0.5
    assert Objective(weighting="sigma_sqrt").weights(torch.tensor([0.5])) == pytest.approx(4.0)
    assert Objective().weights(SIGMAS) is None
