import pytest
import torch

from ltx_titan.diffusion import Guidance, apg_delta, cfg_delta, cfg_star_delta, guide, stg_delta
from tests.golden_cases import load_case

CASE = load_case("guiders")
TOLERANCE = CASE.entry["tolerance"]["all"]
INPUTS = CASE.under("input.")
DELTAS = {
    "cfg": (cfg_delta, "uncond"),
    "cfg_star": (cfg_star_delta, "uncond"),
    "stg": (stg_delta, "perturbed"),
    "apg": (apg_delta, "uncond"),
}


def entries(*, multimodal):
    return [pytest.param(e, id=e["name"]) for e in CASE.entry["guiders"] if (e["type"] == "multimodal") == multimodal]


@pytest.mark.parametrize("entry", entries(multimodal=False))
def test_a_delta_equals_the_reference(entry):
    function, other = DELTAS[entry["type"]]
    found = function(INPUTS["cond"], INPUTS[other], **entry["params"])
    torch.testing.assert_close(found, CASE.tensors[f"output.{entry['name']}"], **TOLERANCE)


@pytest.mark.parametrize("entry", entries(multimodal=True))
def test_a_combination_equals_the_reference(entry):
    params = entry["params"]
    guidance = Guidance(
        params["cfg_scale"], params["stg_scale"], None, params["modality_scale"], params["rescale_scale"]
    )
    used = {name: INPUTS[name] for name, use in entry["use"].items() if use}
    found = guide(guidance, INPUTS["cond"], **used)
    torch.testing.assert_close(found, CASE.tensors[f"output.{entry['name']}"], **TOLERANCE)


def test_neutral_weights_change_nothing_whatever_the_other_predictions_say():
    found = guide(Guidance(rescale=0.7), INPUTS["cond"], INPUTS["uncond"], INPUTS["perturbed"], INPUTS["isolated"])
    assert torch.equal(found, INPUTS["cond"])


def test_full_rescale_gives_the_spread_of_the_conditional_prediction():
    found = guide(Guidance(cfg_scale=7.0, rescale=1.0), INPUTS["cond"], INPUTS["uncond"])
    torch.testing.assert_close(found.std(), INPUTS["cond"].std())


def test_low_precision_predictions_are_combined_in_float32():
    cond, uncond = INPUTS["cond"].bfloat16(), INPUTS["uncond"].bfloat16()
    guidance = Guidance(cfg_scale=7.0, rescale=0.7)
    assert torch.equal(guide(guidance, cond, uncond), guide(guidance, cond.float(), uncond.float()).bfloat16())
