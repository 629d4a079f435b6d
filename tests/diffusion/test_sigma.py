import math

import pytest
import torch

from ltx_titan.config import SigmaSection
from ltx_titan.diffusion import (
    ShiftedLogitNormal,
    StreamPlan,
    UniformSigma,
    distilled_schedule,
    draw_step,
    sigma_sampler,
)
from ltx_titan.diffusion.sigma import TruncatedSigma
from tests.golden_cases import load_case

CASE = load_case("timestep_sampler")
SHIFTED = {e["name"]: e for e in CASE.entry["samplers"] if e["type"] == "shifted_logit_normal"}
LENGTHS = [(name, length) for name, entry in SHIFTED.items() for length in entry["seq_lengths"]]


def tolerance(kind):
    return {"rtol": 0.0, "atol": 0.0, **CASE.entry["tolerance"][kind]}


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_map_equals_the_reference(name, length):
    sampler = ShiftedLogitNormal(**SHIFTED[name]["params"])
    t = CASE.tensors
    sigma = sampler.map(t["input.z"], t["input.u"], t["input.p"], length)
    torch.testing.assert_close(sigma, t[f"output.{name}.mapped.{length}"], **tolerance("mapped"))


@pytest.mark.parametrize("name", SHIFTED)
def test_mu_equals_the_reference(name):
    found = torch.tensor([ShiftedLogitNormal().mu(n) for n in SHIFTED[name]["seq_lengths"]], dtype=torch.float64)
    torch.testing.assert_close(found, CASE.tensors[f"output.{name}.mu"], **tolerance("mu"))


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_samples_are_distributed_as_the_reference(name, length):
    generator = torch.Generator().manual_seed(7)
    sigma = ShiftedLogitNormal(**SHIFTED[name]["params"]).sample((200_000,), length, generator)
    levels = torch.arange(1, 100) / 100
    expected = CASE.tensors[f"output.{name}.quantiles.{length}"]
    torch.testing.assert_close(sigma.quantile(levels), expected, **tolerance("quantiles"))
    expected = CASE.tensors[f"output.{name}.mean_std.{length}"]
    torch.testing.assert_close(torch.stack([sigma.mean(), sigma.std()]), expected, **tolerance("mean_std"))


def test_no_sample_falls_below_eps_or_above_one():
    sampler = ShiftedLogitNormal(std=2.0, eps=0.05, uniform_prob=0.0)
    sigma = sampler.sample((50_000,), 40, torch.Generator().manual_seed(1))
    assert sigma.dtype == torch.float32
    assert sigma.min() >= 0.05 * (1 - 1e-6)
    assert sigma.max() <= 1


def test_uniform_equals_the_reference_and_ignores_the_length():
    sampler = UniformSigma(min_value=0.2, max_value=0.9)
    torch.testing.assert_close(
        sampler.map(CASE.tensors["input.u"]), CASE.tensors["output.uniform.mapped"], **tolerance("mapped")
    )
    one, other = (sampler.sample((2, 3), n, torch.Generator().manual_seed(5)) for n in (10, 9000))
    assert torch.equal(one, other)
    assert one.shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ShiftedLogitNormal(std=0.0), "sigma.std is 0.0"),
        (lambda: ShiftedLogitNormal(std=float("nan")), "sigma.std is nan"),
        (lambda: ShiftedLogitNormal(eps=-0.1), "sigma.eps is -0.1"),
        (lambda: ShiftedLogitNormal(uniform_prob=1.5), "sigma.uniform_prob is 1.5"),
        (lambda: UniformSigma(min_value=0.8, max_value=0.2), "sigma.min_value is 0.8"),
        (lambda: UniformSigma(max_value=1.2), "sigma.max_value is 1.2"),
    ],
)
def test_a_bad_parameter_is_named(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_a_range_cuts_the_distribution_off_and_keeps_its_shape():
    whole, low, high = ShiftedLogitNormal(), 0.7, 0.95
    inside = whole.sample((200_000,), 1024, torch.Generator().manual_seed(1))
    inside = inside[(inside >= low) & (inside <= high)]
    found = TruncatedSigma(whole, low, high).sample((50_000,), 1024, torch.Generator().manual_seed(2))
    assert found.min() >= low
    assert found.max() <= high
    levels = torch.arange(1, 20) / 20
    torch.testing.assert_close(found.quantile(levels), inside.quantile(levels), rtol=0, atol=5e-3)


def test_a_range_that_the_distribution_never_reaches_is_drawn_uniformly():
    never = ShiftedLogitNormal(uniform_prob=0.0, eps=0.1)
    found = TruncatedSigma(never, 0.01, 0.05).sample((2000,), 40, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        found.quantile(torch.tensor([0.25, 0.75])), torch.tensor([0.02, 0.04]), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("tokens", [1024, 40_000])
def test_a_shift_is_the_factor_on_the_odds_of_the_median(tokens):
    sigma = ShiftedLogitNormal(shift=4.0, uniform_prob=0.0).map(torch.zeros(1), torch.zeros(1), torch.ones(1), tokens)
    low, high = (4 * math.exp(q) / (1 + 4 * math.exp(q)) for q in (-2.5758, 3.0902))
    assert sigma.item() == pytest.approx((0.8 - low) / (high - low), rel=1e-5)


def test_streams_draw_from_their_own_ranges_and_the_default_is_the_reference_trainers():
    sigma = SigmaSection(video_min=0.8, audio_max=0.3)
    plan = StreamPlan(num_tokens=12, channels=2, is_generated=True)

    def draws(settings):
        samplers = (sigma_sampler(settings, stream) for stream in ("video", "audio"))
        video, audio = samplers
        return draw_step(plan, plan, sampler=video, audio_sampler=audio, seed=1, step=1, indices=range(50))

    found = draws(sigma)
    assert found.video_sigma.min() >= 0.8
    assert found.audio_sigma.max() <= 0.3
    expected = draw_step(plan, plan, sampler=ShiftedLogitNormal(), seed=1, step=1, indices=range(50))
    assert torch.equal(draws(SigmaSection()).video_sigma, expected.video_sigma)
    assert torch.equal(draws(SigmaSection()).audio_sigma, expected.audio_sigma)
    # Noise and conditions do not move with the range.
    assert torch.equal(found.video_noise, expected.video_noise)


def test_a_distilled_checkpoint_is_trained_on_the_sigmas_of_its_schedule():
    sampler = sigma_sampler(SigmaSection(name="distilled"), "video")
    found = sampler.sample((4000,), 12, torch.Generator().manual_seed(1))
    values, counts = found.unique(return_counts=True)
    assert torch.equal(values, distilled_schedule()[:-1].flip(0))
    assert counts.min() > 400
    with pytest.raises(ValueError, match=r"sigma\.video_min = 0\.8.*widen the range"):
        sigma_sampler(SigmaSection(name="distilled", video_min=0.8, video_max=0.9), "video")
