import pytest
import torch

from ltx_titan.model import Modality

SIGMA = torch.tensor([0.25, 0.75])
REST = {"positions": torch.zeros(2, 1, 3, 2), "context": torch.zeros(2, 4, 5)}
LATENT = torch.zeros(2, 3, 6)


def check(modality):
    """The compact timesteps are the timesteps."""
    assert torch.equal(modality.timestep_values.gather(1, modality.timestep_index), modality.timesteps)
    assert modality.timesteps.dtype == torch.float32


def test_clean_tokens_have_timestep_zero_and_the_others_their_samples_sigma():
    mask = torch.tensor([[True, False, False], [False, False, True]])
    modality = Modality.from_sigma(LATENT, SIGMA, mask, **REST)
    check(modality)
    assert modality.timesteps.tolist() == [[0, 0.25, 0.25], [0.75, 0.75, 0]]
    assert torch.equal(modality.sigma, SIGMA)


def test_the_number_of_distinct_timesteps_depends_on_the_presence_of_a_mask_alone():
    # Otherwise a step in which no condition fires would recompile the blocks.
    empty = Modality.from_sigma(LATENT, SIGMA, torch.zeros(2, 3, dtype=torch.bool), **REST)
    without = Modality.from_sigma(LATENT, SIGMA, **REST)
    check(empty)
    check(without)
    assert empty.timestep_values.shape == (2, 2)
    assert without.timestep_values.shape == (2, 1)
    assert torch.equal(empty.timesteps, without.timesteps)


def test_partly_noised_tokens_have_a_fraction_of_sigma():
    index = torch.tensor([[0, 1, 2], [2, 2, 1]])
    modality = Modality.from_fractions(LATENT, SIGMA, torch.tensor([0.0, 0.5, 1.0]), index, **REST)
    check(modality)
    assert modality.timesteps.tolist() == [[0, 0.125, 0.25], [0.75, 0.75, 0.375]]


def test_fields_that_contradict_each_other_are_refused():
    with pytest.raises(AssertionError, match=r"sigma \[3\] of 2 samples"):
        Modality.from_sigma(LATENT, torch.ones(3), **REST)
    with pytest.raises(AssertionError, match=r"index \[2, 4\] of latent \[2, 3, 6\]"):
        Modality.from_sigma(LATENT, SIGMA, torch.zeros(2, 4, dtype=torch.bool), **REST)
    with pytest.raises(AssertionError, match=r"sigma torch\.bfloat16"):
        Modality.from_sigma(LATENT, SIGMA.bfloat16(), **REST)
