import pytest
import torch

from ltx_titan.config import ValidationSection
from ltx_titan.model import Modality
from ltx_titan.validation import evaluating, guidance_of, placeholder_inputs, sample_all, schedule_of
from tests.golden_cases import assert_close_to_max
from tests.model.golden_transformer import build_transformer
from tests.processes import run_ranks
from tests.validation import sharded


@pytest.fixture(scope="module")
def model():
    return build_transformer(sharded.CASE)


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(sharded.work, 2)


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", ["fsdp2", "tp2", "cp2"])
def test_the_golden_run_holds_on_a_mesh(two_ranks, mesh):
    for rank in two_ranks:
        for name, found in zip(("video", "audio"), rank["golden"][mesh], strict=True):
            assert_close_to_max(found, sharded.CASE.tensors[f"output.final.{name}"], 1e-5, f"{mesh} {name}")


@pytest.mark.distributed
@pytest.mark.parametrize("weights", ["own", "other"])
def test_samples_divided_over_ranks_equal_those_of_one_process(two_ranks, model, weights):
    """Weights that were swapped in are used in full, and so are the model's own after they are back."""
    expected = sharded.sample_tokens(model) if weights == "own" else sharded.with_other_weights(model)
    key = "samples" if weights == "own" else "other"
    assert [sorted(rank[key]) for rank in two_ranks] == [[0, 2], [1]]
    for rank in two_ranks:
        for index, latents in rank[key].items():
            for found, wanted in zip(latents, expected[index], strict=True):
                assert (found is None) == (wanted is None)
                if wanted is not None:
                    assert_close_to_max(found, wanted, 1e-5, f"sample {index}")


@pytest.mark.distributed
def test_rank_zero_hears_of_all_samples_in_their_order(two_ranks):
    assert [rank["files"] for rank in two_ranks] == [[0, 1, 2], [1]]


@pytest.mark.distributed
def test_sampling_leaves_the_model_sharded_and_in_training_mode(two_ranks):
    assert all(rank["is_training"] for rank in two_ranks)
    assert sum(rank["local_numel"] for rank in two_ranks) == two_ranks[0]["numel"]


@pytest.mark.distributed
def test_no_rank_ever_holds_more_than_two_of_six_blocks(two_ranks):
    """The one that is computed, and the last one, which FSDP2 keeps from forward to forward."""
    assert all(1 <= rank["held"] <= 2 for rank in two_ranks)


@pytest.mark.distributed
def test_held_out_losses_do_not_depend_on_the_number_of_ranks(two_ranks, model):
    expected = sharded.held_out(model)
    for rank in two_ranks:
        assert rank["held_out"] == pytest.approx(expected, rel=1e-5)


def test_what_is_given_survives_and_seeds_decide_the_rest(model):
    samples = sharded.prepared_samples()
    found = sample_all(model, samples, sharded.SECTION, "cpu")
    assert torch.equal(found[0].video[:, :, :1].flatten(2).mT, samples[0].video.target.tokens[:, :4])
    assert torch.equal(found[1].audio.transpose(1, 2).flatten(2), samples[1].audio.target.tokens)
    again = sample_all(model, samples, sharded.SECTION, "cpu")
    assert all(torch.equal(found[index].video, again[index].video) for index in found)
    assert not torch.isclose(found[1].video, found[2].video).all()


def test_modes_of_submodules_come_back_as_they_were(model):
    model.train()
    model.transformer_blocks[0].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert model.training
    assert not model.transformer_blocks[0].training
    model.train()


@pytest.mark.parametrize(("budget", "forwards"), [(1, 8), (36, 4), (53, 4), (54, 4), (72, 2), (1000, 2)])
def test_guided_passes_run_together_as_far_as_tokens_fit(model, budget, forwards):
    calls = []
    handle = model.register_forward_hook(lambda *call: calls.append(call))
    section = sharded.SECTION.model_copy(update={"tokens_at_once": budget})
    # 12 video and 6 audio tokens, four passes, two steps.
    sample_all(model, sharded.prepared_samples()[:1], section, "cpu")
    handle.remove()
    assert len(calls) == forwards


def test_placeholder_inputs_suit_the_model(model):
    video, audio = placeholder_inputs(model, "cpu")
    assert isinstance(video, Modality)
    with torch.no_grad():
        outputs = model(video, audio, None)
    assert all(torch.isfinite(output).all() for output in outputs)


def test_the_schedule_does_not_depend_on_the_clip():
    section = ValidationSection(inference_steps=8)
    torch.testing.assert_close(schedule_of(section)[1], torch.tensor(0.9657117))
    assert len(schedule_of(ValidationSection(schedule="distilled"))) == 9


def test_guidance_is_each_streams_own():
    video, audio = guidance_of(ValidationSection(video_cfg_scale=2.0, audio_stg_scale=0.0, stg_blocks="all"))
    assert (video.cfg_scale, audio.cfg_scale) == (2.0, 7.0)
    assert (video.stg_scale, audio.stg_scale) == (1.0, 0.0)
    assert video.stg_blocks is None
