import pytest
import torch

from ltx_titan.diffusion import beta_schedule, distilled_schedule
from tests.golden_cases import load_case

CASE = load_case("scheduler_and_steps")


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


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match="0 sampling steps"):
        beta_schedule(0)
