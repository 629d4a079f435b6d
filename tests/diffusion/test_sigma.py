import pytest
import torch

from ltx_titan.diffusion import ShiftedLogitNormal, UniformSigma
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
