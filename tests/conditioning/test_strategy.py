import dataclasses

import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy, stream_loss, token_weights
from ltx_titan.conditioning.loss import flow_matching_loss
from ltx_titan.diffusion import Objective, ShiftedLogitNormal, draw_step

REFERENCE = {"type": "reference", "latents_dir": "reference_latents"}
FIRST_FRAME = {"type": "first_frame"}


def block(stream, *conditions, generated=True):
    folder = "latents" if stream == "video" else "audio_latents"
    return {"is_generated": generated, "latents_dir": folder, "conditions": list(conditions)}


def strategy_of(video=None, audio=None, **options):
    return FlexibleStrategy.from_config({"name": "flexible", "video": video, "audio": audio}, **options)


def make_batch(size=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def clip(*shape):
        return torch.randn(size, *shape, generator=generator).to(dtype)

    return {
        "conditions": {"video_prompt_embeds": clip(3, 5), "audio_prompt_embeds": clip(3, 4)},
        "video_latents": {"latents": clip(4, 3, 2, 3), "fps": torch.tensor([24.0, 25.0, 30.0, 23.976][:size])},
        "audio_latents": {"latents": clip(2, 6, 3)},
        "reference_latents": {"latents": clip(4, 3, 2, 3), "fps": torch.tensor([24.0, 25.0, 30.0, 23.976][:size])},
        "other_references": {"latents": clip(4, 2, 2, 3), "fps": torch.tensor([24.0, 25.0, 30.0, 23.976][:size])},
        "video_masks": {"mask": (clip(3, 2, 3) > 0).float()},
    }


def draw(strategy, batch, step=0):
    size = batch["conditions"]["video_prompt_embeds"].shape[0]
    plans = strategy.draw_plan(batch)
    return draw_step(*plans, sampler=ShiftedLogitNormal(), seed=0, step=step, indices=range(size))


def prepare(strategy, batch, step=0):
    return strategy.prepare(batch, draw(strategy, batch, step))


def rows(tree, keep):
    """Some samples of a batch or of draws."""
    if isinstance(tree, dict):
        return {key: rows(value, keep) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rows(value, keep) for value in tree]
    return tree[keep] if isinstance(tree, torch.Tensor) and tree.ndim else tree


ALL_CONDITIONS = [
    {**FIRST_FRAME, "probability": 0.5},
    {"type": "suffix", "temporal_boundary": 1, "probability": 0.5},
    {"type": "mask", "mask_dir": "video_masks", "probability": 0.5},
    {"type": "keyframe", "at": ["random", "last"], "probability": 0.5},
    REFERENCE,
]


def test_plans_count_target_tokens_and_tell_references():
    strategy = strategy_of(block("video", *ALL_CONDITIONS), block("audio", generated=False))
    video, audio = strategy.draw_plan(make_batch())
    assert (video.num_tokens, video.channels, video.is_generated) == (18, 4, True)
    assert video.conditions == ((0.5, False, 0), (0.5, False, 0), (0.5, False, 0), (0.5, False, 1), (1.0, True, 0))
    assert (audio.num_tokens, audio.channels, audio.is_generated) == (6, 6, False)
    assert strategy_of(audio=block("audio")).draw_plan(make_batch())[0] is None


def test_preparing_is_pure_and_splits_into_samples():
    strategy = strategy_of(block("video", *ALL_CONDITIONS), block("audio", {"type": "prefix", "temporal_boundary": 2}))
    batch = make_batch(4)
    draws = draw(strategy, batch)
    whole, again = strategy.prepare(batch, draws), strategy.prepare(batch, draws)
    for sample in range(4):
        keep = slice(sample, sample + 1)
        fields = {f.name: rows(getattr(draws, f.name), keep) for f in dataclasses.fields(draws)}
        part = strategy.prepare(rows(batch, keep), dataclasses.replace(draws, **fields))
        for stream in ("video", "audio"):
            for field in ("latent", "sigma", "timesteps", "positions", "context"):
                full = getattr(getattr(whole, stream), field)
                assert torch.equal(full, getattr(getattr(again, stream), field))
                assert torch.equal(full[keep], getattr(getattr(part, stream), field)), f"{stream} {field}"
            assert torch.equal(getattr(whole, f"{stream}_loss_mask")[keep], getattr(part, f"{stream}_loss_mask"))


def test_preparing_never_waits_for_the_device():
    strategy = strategy_of(block("video", *ALL_CONDITIONS), block("audio"), keyframe_marker=True)
    batch = make_batch()
    draws = draw(strategy, batch)
    # Reading a value of a tensor without storage is an error, as any read on a device would be a wait.
    remote = {source: {name: t.to("meta") for name, t in fields.items()} for source, fields in batch.items()}
    inputs = strategy.prepare(remote, draws)
    for tensor in (inputs.video.latent, inputs.video.positions, inputs.video_loss_mask, inputs.audio.timestep_index):
        assert tensor.device.type == "meta"
    assert inputs.video.latent.shape == strategy.prepare(batch, draws).video.latent.shape


def test_clean_tokens_come_out_unchanged_and_the_rest_noised():
    strategy = strategy_of(block("video", *ALL_CONDITIONS[:3]))
    batch = make_batch(4)
    fired = set()
    for step in range(8):
        inputs = prepare(strategy, batch, step)
        clean = batch["video_latents"]["latents"].flatten(2).transpose(1, 2)
        is_clean = ~inputs.video_loss_mask
        assert torch.equal(inputs.video.latent[is_clean], clean[is_clean])
        assert not (inputs.video.latent[~is_clean] == clean[~is_clean]).all(dim=1).any()
        assert torch.equal(inputs.video.timesteps == 0, is_clean)
        assert inputs.video.sigma.gt(0).all()
        fired.update(is_clean.sum(dim=1).tolist())
    assert len(fired) > 3


def test_keyframes_are_clean_without_loss_and_unmarked_at_the_time_of_each_sample():
    keyframe = {"type": "keyframe", "at": ["random"]}
    strategy, batch = strategy_of(block("video", keyframe), keyframe_marker=True), make_batch(4)
    clean, found = batch["video_latents"]["latents"].flatten(2).transpose(1, 2), set()
    for step in range(6):
        inputs = prepare(strategy, batch, step)
        is_clean = ~inputs.video_loss_mask.view(4, 3, 6)
        # One whole latent frame of each sample, not the same in all of them.
        frames = is_clean.all(dim=2)
        assert frames.sum(dim=1).eq(1).all()
        assert is_clean.sum() == 4 * 6
        found.update(frames.int().argmax(dim=1).tolist())
        assert torch.equal(inputs.video.latent[is_clean.flatten(1)], clean[is_clean.flatten(1)])
        assert torch.equal(inputs.video.timesteps == 0, is_clean.flatten(1))
        # LTX-2.5 marks tokens of a single frame, which a keyframe after the first is not.
        assert inputs.video.keyframes_mask.view(4, 3, 6).sum(dim=(0, 2)).tolist() == [24, 0, 0]
        wrong_where_clean = inputs.video_target + 100.0 * is_clean.flatten(1)[..., None]
        assert strategy.loss(wrong_where_clean, None, inputs).total == 0
    assert found == {0, 1, 2}


def test_a_sample_given_completely_has_loss_zero_and_no_gradient():
    strategy = strategy_of(block("video", {"type": "prefix", "temporal_boundary": 50, "probability": 0.5}))
    batch = make_batch(4)
    inputs = prepare(strategy, batch, step=2)
    is_free = inputs.video_loss_mask.all(dim=1)
    assert is_free.any()
    assert not is_free.all()
    prediction = torch.randn(inputs.video_target.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = strategy.loss(prediction, None, inputs)
    loss.total.backward()
    assert torch.equal(loss.per_sample > 0, is_free)
    assert torch.equal(prediction.grad.abs().sum(dim=(1, 2)) > 0, is_free)


def test_a_later_reference_comes_first():
    later = {**REFERENCE, "latents_dir": "later_references"}
    strategy = strategy_of(block("video", REFERENCE, FIRST_FRAME, later))
    batch = make_batch()
    batch["later_references"] = {"latents": batch["reference_latents"]["latents"] + 1}
    inputs = prepare(strategy, batch)
    tokens = [batch[s]["latents"].flatten(2).transpose(1, 2) for s in ("later_references", "reference_latents")]
    assert torch.equal(inputs.video.latent[:, :36], torch.cat(tokens, dim=1))
    assert inputs.video.latent.shape[1] == 3 * 18
    assert not inputs.video_loss_mask[:, : 36 + 6].any()
    assert inputs.video_loss_mask[:, 42:].all()
    assert inputs.video_target.shape[1] == 18


def test_a_reference_of_a_frozen_stream_applies_without_loss():
    strategy = strategy_of(block("video", FIRST_FRAME, REFERENCE, generated=False), block("audio"))
    inputs = prepare(strategy, make_batch())
    assert inputs.video.latent.shape[1] == 36
    assert not inputs.video.timesteps.any()
    assert not inputs.video.sigma.any()
    assert inputs.video.timestep_values.shape == (2, 1)
    assert inputs.video_target is inputs.video_loss_mask is None
    loss = strategy.loss(torch.ones_like(inputs.video.latent), inputs.audio_target, inputs)
    assert loss.video is None
    assert loss.total == 0


def test_number_of_timesteps_does_not_depend_on_what_fires():
    strategy = strategy_of(block("video", {**REFERENCE, "probability": 0.0}, {**FIRST_FRAME, "probability": 0.0}))
    video = prepare(strategy, make_batch()).video
    assert torch.equal(video.timestep_values, torch.stack([torch.zeros(2), video.sigma], dim=1))
    assert video.timestep_index.eq(1).all()


def test_reference_scale_is_known_where_the_reference_does_not_fire():
    strategy = strategy_of(block("video", {**REFERENCE, "probability": 0.0}))
    batch = make_batch()
    batch["reference_latents"]["latents"] = torch.zeros(2, 4, 2, 2, 3)
    assert prepare(strategy, batch).reference_scale == (1, 2)
    assert prepare(strategy_of(block("video")), batch).reference_scale is None


def test_references_of_different_scale_are_refused():
    other = {**REFERENCE, "latents_dir": "other_references"}
    with pytest.raises(ValueError, match=r"reference_latents \(1, 1\), other_references \(1, 2\)"):
        prepare(strategy_of(block("video", REFERENCE, other)), make_batch())


def test_the_marker_is_on_the_targets_first_frame_only():
    marked = prepare(strategy_of(block("video", REFERENCE), keyframe_marker=True), make_batch()).video.keyframes_mask
    assert marked.shape == (2, 36, 1)
    assert marked[:, 18:24].eq(1).all()
    assert marked.sum() == 2 * 6
    assert prepare(strategy_of(block("video", REFERENCE)), make_batch()).video.keyframes_mask is None


def test_text_reaches_both_streams_as_handed_in():
    strategy = strategy_of(block("video"), block("audio"))
    batch = make_batch()
    inputs = prepare(strategy, batch)
    assert inputs.video.context is batch["conditions"]["video_prompt_embeds"]
    assert inputs.audio.context is batch["conditions"]["audio_prompt_embeds"]
    assert inputs.video.context_mask is inputs.audio.context_mask is None
    batch["conditions"]["prompt_attention_mask"] = torch.tensor([[1, 1, 0], [0, 1, 1]])
    del batch["conditions"]["audio_prompt_embeds"]
    inputs = prepare(strategy, batch)
    assert inputs.audio.context is batch["conditions"]["video_prompt_embeds"]
    assert inputs.video.context_mask is inputs.audio.context_mask is batch["conditions"]["prompt_attention_mask"]


def test_low_precision_latents_are_noised_in_float32():
    strategy = strategy_of(block("video"))
    batch = make_batch(dtype=torch.bfloat16)
    inputs, draws = prepare(strategy, batch), draw(strategy, batch)
    clean = batch["video_latents"]["latents"].flatten(2).transpose(1, 2).float()
    sigma = draws.video_sigma[:, None, None]
    assert torch.equal(inputs.video_target, draws.video_noise - clean)
    assert torch.equal(inputs.video.latent, (1 - sigma) * clean + sigma * draws.video_noise)


def test_a_missing_frame_rate_counts_as_24():
    strategy = strategy_of(block("video"))
    batch = make_batch()
    draws = draw(strategy, batch)
    batch["video_latents"]["fps"] = torch.full((2,), 24.0)
    with_rate = strategy.prepare(batch, draws).video.positions
    del batch["video_latents"]["fps"]
    assert torch.equal(strategy.prepare(batch, draws).video.positions, with_rate)


def test_a_stand_in_stream_has_no_loss():
    strategy = strategy_of(block("video"), block("audio"))
    batch = make_batch()
    batch["audio_latents"]["present"] = torch.tensor([True, False])
    inputs = prepare(strategy, batch)
    assert inputs.audio_present is batch["audio_latents"]["present"]
    assert inputs.video_present is None
    predictions = [torch.zeros_like(m.latent).requires_grad_() for m in (inputs.video, inputs.audio)]
    loss = strategy.loss(*predictions, inputs)
    assert loss.audio[0] > 0
    assert loss.audio[1] == 0
    assert loss.per_sample[1] == loss.video[1]
    loss.total.backward()
    assert not predictions[1].grad[1].any()


def test_a_sequence_in_parts_has_the_loss_of_the_whole():
    strategy = strategy_of(block("video", *ALL_CONDITIONS[:3]))
    inputs = prepare(strategy, make_batch(4), step=1)
    prediction = torch.randn(inputs.video_target.shape, generator=torch.Generator().manual_seed(1))
    weights = token_weights(inputs.video_loss_mask)
    parts = zip(prediction.split(5, 1), inputs.video_target.split(5, 1), weights.split(5, 1), strict=True)
    torch.testing.assert_close(
        torch.stack([stream_loss(*part) for part in parts]).sum(0), strategy.loss(prediction, None, inputs).per_sample
    )


def test_sources_name_every_folder_that_is_read():
    audio = block("audio", {**REFERENCE, "latents_dir": "reference_audio_latents"})
    strategy = strategy_of(block("video", *ALL_CONDITIONS), audio)
    assert strategy.sources == {
        "conditions": "conditions",
        "latents": "video_latents",
        "video_masks": "video_masks",
        "reference_latents": "reference_latents",
        "audio_latents": "audio_latents",
        "reference_audio_latents": "reference_audio_latents",
    }
    frozen = strategy_of(block("video", *ALL_CONDITIONS, generated=False), block("audio"))
    assert "video_masks" not in frozen.sources
    assert "reference_latents" in frozen.sources


@pytest.mark.parametrize(
    ("video", "audio"),
    [
        (block("video", {**REFERENCE, "latents_dir": "latents"}), None),
        (block("video", {"type": "mask", "mask_dir": "conditions"}), None),
        (block("video", {"type": "mask", "mask_dir": "video_latents"}), None),
        (block("video", REFERENCE, {"type": "mask", "mask_dir": "reference_latents"}), None),
        (block("video"), block("audio") | {"latents_dir": "latents"}),
        (block("video", REFERENCE), block("audio", REFERENCE)),
    ],
)
def test_folders_that_collide_are_refused(video, audio):
    with pytest.raises(ValueError, match="collides with folder"):
        strategy_of(video, audio)


def test_two_conditions_may_share_a_folder_of_masks():
    mask = {"type": "mask", "mask_dir": "video_masks", "probability": 0.5}
    assert strategy_of(block("video", mask, mask)).sources["video_masks"] == "video_masks"


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"video": block("video", generated=False)}, "nothing to learn"),
        ({"video": None, "audio": None}, "nothing to learn"),
        ({"name": "text_to_video", "video": block("video")}, "name"),
        ({"video": block("video"), "image": block("video")}, "image"),
        ({"video": block("video", {"type": "spatial_crop", "spatial_region": [0, 0, 31, 64]})}, "no latent cell"),
    ],
)
def test_a_strategy_that_cannot_train_is_refused(config, problem):
    with pytest.raises(ValueError, match=problem):
        FlexibleStrategy.from_config(config)


def test_what_a_batch_lacks_is_named():
    strategy = strategy_of(block("video", REFERENCE), block("audio"))
    batch = make_batch()
    draws = draw(strategy, batch)
    with pytest.raises(ValueError, match="no source 'reference_latents'"):
        strategy.prepare({k: v for k, v in batch.items() if k != "reference_latents"}, draws)
    with pytest.raises(ValueError, match="no source 'conditions'"):
        strategy.prepare({k: v for k, v in batch.items() if k != "conditions"}, draws)
    with pytest.raises(ValueError, match="'video_latents' has no field 'latents'"):
        strategy.draw_plan({**batch, "video_latents": {}})
    with pytest.raises(ValueError, match=r"audio_latents: audio latents have shape \[2, 6, 6\]; expected"):
        strategy.draw_plan({**batch, "audio_latents": {"latents": torch.zeros(2, 6, 6)}})


def test_a_loss_mask_weighs_tokens_and_leaves_the_sum_of_weights():
    weighted = block("video", FIRST_FRAME) | {"loss_mask_dir": "video_masks", "unmasked_weight": 0.25}
    plain, strategy, batch = strategy_of(block("video", FIRST_FRAME)), strategy_of(weighted), make_batch()
    assert strategy.sources["video_masks"] == "video_masks"
    inputs, expected = prepare(strategy, batch), prepare(plain, batch)
    assert torch.equal(inputs.video.latent, expected.video.latent)
    mask = batch["video_masks"]["mask"].flatten(1)
    # The first frame of two by three tokens is conditioned and has no loss, whatever its mask.
    relative = torch.where(mask > 0.5, 1.0, 0.25)
    relative[:, :6] = 0
    errors = torch.rand(2, 18, 1) * torch.ones(4)
    found = strategy.loss(inputs.video_target + errors.sqrt(), None, inputs)
    torch.testing.assert_close(found.video, (relative * errors[..., 0]).sum(1) / relative.sum(1))


def test_huber_and_weighting_act_on_each_stream_by_its_own_sigma():
    strategy, batch = strategy_of(block("video"), block("audio")), make_batch()
    inputs = prepare(strategy, batch)
    shifted = inputs.video_target + 3, inputs.audio_target - 3
    found = flow_matching_loss(*shifted, inputs, Objective(error="huber", huber_delta=1.0, weighting="cosmap"))
    for loss, stream in ((found.video, inputs.video), (found.audio, inputs.audio)):
        torch.testing.assert_close(loss, 5 * 2 / (torch.pi * (1 - 2 * stream.sigma + 2 * stream.sigma**2)))
    torch.testing.assert_close(found.total, (found.video + found.audio).mean())
    # The strategy's own loss, which held-out losses use, is a plain mean squared error.
    torch.testing.assert_close(strategy.loss(*shifted, inputs).video, torch.full((2,), 9.0))
