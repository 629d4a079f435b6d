import dataclasses

import pytest
import torch

from ltx_titan.diffusion import ConditionPlan, ShiftedLogitNormal, StreamPlan, UniformSigma, draw_step

SOMETIMES, REFERENCE = ConditionPlan(0.5), ConditionPlan(0.5, is_reference=True)
VIDEO = StreamPlan(24, 4, True, (SOMETIMES, REFERENCE, ConditionPlan(0.5, random_starts=2)))
AUDIO = StreamPlan(num_tokens=7, channels=6, is_generated=True, conditions=(SOMETIMES,))
SAMPLER = ShiftedLogitNormal()


def draw(indices, video=VIDEO, audio=AUDIO, seed=3, step=5, sampler=SAMPLER):
    return draw_step(video, audio, sampler=sampler, seed=seed, step=step, indices=indices)


def fields_of(draws, stream):
    """Every tensor of one stream under a name of its own."""
    found = {kind: getattr(draws, f"{stream}_{kind}") for kind in ("sigma", "noise")}
    starts = {f"start {i}": start for i, start in enumerate(getattr(draws, f"{stream}_starts")) if start is not None}
    return found | starts | {f"use {place}": use for place, use in enumerate(getattr(draws, f"{stream}_uses"))}


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]], [[3, 2, 1, 0]]])
def test_a_sample_draws_the_same_in_any_micro_batch(split):
    whole = draw(range(4))
    for indices in split:
        part = draw(indices)
        for stream in ("video", "audio"):
            for name, tensor in fields_of(part, stream).items():
                expected = fields_of(whole, stream)[name]
                assert torch.equal(tensor, expected[indices] if expected.ndim else expected), f"{stream} {name}"


@pytest.mark.parametrize("change", [{"seed": 4}, {"step": 6}, {"indices": [1, 0]}, {"indices": [2, 3]}])
def test_another_seed_step_or_index_draws_otherwise(change):
    one, other = draw([0, 1]), draw(**({"indices": [0, 1]} | change))
    for stream in ("video", "audio"):
        for kind in ("sigma", "noise", "start 2") if stream == "video" else ("sigma", "noise"):
            a, b = fields_of(one, stream)[kind], fields_of(other, stream)[kind]
            assert not (a == b).flatten(1).all(1).any() if a.ndim > 1 else not (a == b).any(), f"{stream} {kind}"


def test_neighbouring_keys_are_uncorrelated():
    plan = StreamPlan(num_tokens=500, channels=2, is_generated=True)
    noises = [draw(range(4), plan, plan, seed, step) for seed in (0, 1) for step in (0, 1)]
    rows = torch.cat([torch.cat([d.video_noise, d.audio_noise]).flatten(1) for d in noises])
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    # 32 rows of 1000 numbers: 496 correlations with standard deviation 0.032.
    assert correlations.abs().max() < 0.16


def test_a_stream_does_not_depend_on_the_other():
    both = draw([0, 3])
    for video in (None, StreamPlan(1000, 4, True), dataclasses.replace(VIDEO, is_generated=False)):
        assert torch.equal(draw([0, 3], video=video).audio_noise, both.audio_noise)
        assert torch.equal(draw([0, 3], video=video).audio_sigma, both.audio_sigma)
    assert torch.equal(draw([0, 3], audio=None).video_noise, both.video_noise)
    assert torch.equal(draw([0, 3], audio=None).video_uses[0], both.video_uses[0])
    assert both.video_sigma.ne(both.audio_sigma).all()


def test_a_further_condition_moves_no_other_draw():
    longer = dataclasses.replace(VIDEO, conditions=(*VIDEO.conditions, SOMETIMES))
    one, other = draw(range(4)), draw(range(4), video=longer)
    assert torch.equal(one.video_noise, other.video_noise)
    assert torch.equal(one.video_sigma, other.video_sigma)
    for a, b in zip(one.video_uses, other.video_uses, strict=False):
        assert torch.equal(a, b)


def test_a_reference_is_decided_once_for_the_global_batch():
    fired = []
    for step in range(40):
        micro_batches = [draw(indices, step=step).video_uses[1] for indices in ([0], [1, 2], [3])]
        assert all(use.shape == () and use.dtype == torch.bool for use in micro_batches)
        assert len({bool(use) for use in micro_batches}) == 1
        fired.append(bool(micro_batches[0]))
    assert 8 < sum(fired) < 32


def test_probabilities_are_kept_and_certain_ones_are_exact():
    plan = StreamPlan(1, 1, True, (ConditionPlan(0.3), ConditionPlan(0.0), ConditionPlan(1.0)))
    sometimes, never, always = draw(range(2000), video=plan, audio=None).video_uses
    assert sometimes.shape == (2000,)
    assert abs(sometimes.float().mean() - 0.3) < 0.05
    assert not never.any()
    assert always.all()


def test_absent_and_frozen_streams_draw_nothing_but_references():
    frozen = dataclasses.replace(VIDEO, is_generated=False)
    draws = draw([0, 1], video=frozen, audio=None)
    assert draws.video_sigma is None
    assert draws.video_noise is None
    assert [use is None for use in draws.video_uses] == [True, False, True]
    assert draws.audio_sigma is draws.audio_noise is draws.audio_uses is None
    assert torch.equal(draws.video_uses[1], draw([0, 1]).video_uses[1])


def test_noise_is_standard_normal_and_sigma_follows_the_sampler():
    plan = StreamPlan(num_tokens=1000, channels=10, is_generated=True)
    draws = draw(range(20), video=plan, audio=None, sampler=UniformSigma(0.4, 0.6))
    assert draws.video_noise.shape == (20, 1000, 10)
    assert draws.video_noise.dtype == draws.video_sigma.dtype == torch.float32
    assert abs(draws.video_noise.mean()) < 0.01
    assert abs(draws.video_noise.std() - 1) < 0.01
    assert draws.video_sigma.min() >= 0.4
    assert draws.video_sigma.max() <= 0.6
