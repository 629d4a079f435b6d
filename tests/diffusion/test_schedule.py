import pytest
import torch

from ltx_titan.diffusion import beta_schedule, distilled_schedule, linear_quadratic_schedule, sigma_schedule
from tests.golden_cases import load_case

CASE = load_case("scheduler_and_steps")
OPTIONS = ("max_shift", "base_shift", "stretch", "terminal")


def entries(scheduler):
    return [pytest.param(e, id=e["name"]) for e in CASE.entry["schedules"] if e["scheduler"] == scheduler]


@pytest.mark.parametrize("entry", entries("ltx2"))
def test_ltx2_schedule_equals_the_reference(entry):
    options = {key: entry[key] for key in OPTIONS if key in entry}
    sigmas = sigma_schedule(entry["tokens"], entry["steps"], **options)
    torch.testing.assert_close(sigmas, CASE.tensors[f"output.{entry['name']}.sigmas"], **CASE.entry["tolerance"]["all"])


@pytest.mark.parametrize("entry", entries("linear_quadratic"))
def test_linear_quadratic_schedule_equals_the_reference(entry):
    sigmas = linear_quadratic_schedule(entry["steps"])
    torch.testing.assert_close(sigmas, CASE.tensors[f"output.{entry['name']}.sigmas"], **CASE.entry["tolerance"]["all"])


@pytest.mark.parametrize("schedule", [lambda n: sigma_schedule(4096, n), linear_quadratic_schedule])
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_a_schedule_of_any_length_falls_from_one_to_zero(schedule, steps):
    sigmas = schedule(steps)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_beta_schedule_equals_the_reference():
    (entry,) = (e for e in CASE.entry["schedules"] if e["scheduler"] == "beta")
    found = beta_schedule(entry["steps"])
    torch.testing.assert_close(found, CASE.tensors[f"output.{entry['name']}.sigmas"], **CASE.entry["tolerance"]["all"])


@pytest.mark.parametrize("steps", [1, 2, 500, 20_000])
def test_beta_schedule_of_any_length_falls_strictly(steps):
    sigmas = beta_schedule(steps)
    assert (sigmas.diff() < 0).all()
    assert sigmas[-1] == 0
    assert len(sigmas) <= steps + 1


def test_distilled_schedules_are_those_the_models_were_made_for():
    expected = [1.0, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0.0]
    assert distilled_schedule().tolist() == torch.tensor(expected).tolist()
    assert torch.equal(distilled_schedule(refine=True), distilled_schedule()[5:])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="expected at least 1 sampling step, found 0"):
        sigma_schedule(4096, 0)
    with pytest.raises(ValueError, match="expected at least 1 sampling step, found 0"):
        beta_schedule(0)
    with pytest.raises(ValueError, match=r"terminal: .*found 1\.5"):
        sigma_schedule(4096, 8, terminal=1.5)
