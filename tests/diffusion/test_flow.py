import pytest
import torch

from ltx_titan.diffusion import (
    add_noise,
    denoised_from_velocity,
    euler_ancestral_step,
    euler_step,
    initial_latent,
    restore_clean,
    velocity_from_denoised,
    velocity_target,
)
from tests.golden_cases import load_case

CASE = load_case("scheduler_and_steps")
TENSORS = CASE.tensors
TOLERANCE = CASE.entry["tolerance"]["all"]
STEPS = {entry["name"]: entry for entry in CASE.entry["steps"]}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_the_reference(name):
    entry, inputs = STEPS[name], CASE.under(f"input.{name}.")
    sigmas = TENSORS[f"output.{entry['schedule']}.sigmas"].tolist()
    sigma, next_sigma = sigmas[entry["step_index"] : entry["step_index"] + 2]
    if entry["type"] == "euler":
        found = euler_step(inputs["sample"], inputs["denoised"], sigma, next_sigma)
    else:
        found = euler_ancestral_step(
            inputs["sample"],
            inputs["denoised"],
            sigma,
            next_sigma,
            inputs["noise"],
            eta=entry["eta"],
            noise_scale=entry["s_noise"],
        )
    torch.testing.assert_close(found, TENSORS[f"output.{name}.next"], **TOLERANCE)


def test_conversions_equal_the_reference():
    inputs = CASE.under("input.convert.")
    denoised = denoised_from_velocity(inputs["sample"], inputs["velocity"], inputs["timesteps"])
    torch.testing.assert_close(denoised, TENSORS["output.convert.denoised"], **TOLERANCE)
    velocity = velocity_from_denoised(inputs["sample"], inputs["denoised"], CASE.entry["convert_sigma"])
    torch.testing.assert_close(velocity, TENSORS["output.convert.velocity_from_denoised"], **TOLERANCE)


@pytest.mark.parametrize("place", range(len(CASE.entry["noiser_scales"])))
def test_noising_with_a_mask_equals_the_reference(place):
    inputs = CASE.under("input.noiser.")
    found = initial_latent(
        inputs["latent"],
        inputs["clean_latent"],
        inputs["noise"],
        inputs["denoise_mask"],
        CASE.entry["noiser_scales"][place],
    )
    torch.testing.assert_close(found, TENSORS[f"output.noiser.latent{place}"], **TOLERANCE)


def test_a_perfect_velocity_leads_back_to_the_data():
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 2, 5, 3, generator=generator)
    sigma = torch.tensor([0.3, 0.9])
    noisy = add_noise(clean, noise, sigma)
    found = denoised_from_velocity(noisy, velocity_target(clean, noise), sigma[:, None, None])
    torch.testing.assert_close(found, clean)


def test_steps_keep_a_low_precision_sample_low_precision_but_compute_in_float32():
    generator = torch.Generator().manual_seed(0)
    sample, denoised, noise = torch.randn(3, 1, 4, 2, generator=generator).bfloat16()
    plain = euler_step(sample, denoised, 0.5, 0.25)
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, euler_step(sample.float(), denoised.float(), 0.5, 0.25).bfloat16())
    assert euler_ancestral_step(sample, denoised, 0.5, 0.25, noise).dtype == torch.bfloat16
    assert torch.equal(euler_ancestral_step(sample, denoised, 0.5, 0.0, noise), denoised)


def test_an_ancestral_step_without_eta_is_a_plain_step():
    sample, denoised, noise = torch.randn(3, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    found = euler_ancestral_step(sample, denoised, 0.5, 0.25, noise, eta=0.0)
    torch.testing.assert_close(found, euler_step(sample, denoised, 0.5, 0.25))


def test_given_content_is_put_back():
    denoised, clean = torch.randn(2, 1, 3, 2, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1.0, 0.0, 1.0])[None, :, None]
    found = restore_clean(denoised, clean, mask)
    assert torch.equal(found[:, 1], clean[:, 1])
    assert torch.equal(found[:, ::2], denoised[:, ::2])


def test_a_velocity_at_noise_level_zero_is_refused():
    with pytest.raises(ValueError, match="sigma is 0"):
        velocity_from_denoised(torch.ones(1, 1, 1), torch.ones(1, 1, 1), 0.0)
