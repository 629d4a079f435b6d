from contextlib import nullcontext

import pytest
import torch

from ltx_titan.conditioning import FlexibleStrategy, check_conditions, check_trainable, reference_scale
from ltx_titan.conditioning.checks import check_streams
from ltx_titan.conditioning.sources import check_trigger_word
from ltx_titan.config import DataSection, MediaSection

CROP = {"type": "spatial_crop", "spatial_region": [0, 0, 64, 64]}
REFERENCE = {"type": "reference", "latents_dir": "reference_latents"}


def strategy(video=(), audio=None, **block):
    config = {"video": {"is_generated": True, "latents_dir": "latents", "conditions": list(video)} | block}
    if audio is not None:
        config["audio"] = {"is_generated": True, "latents_dir": "audio_latents", "conditions": list(audio)}
    return FlexibleStrategy.from_config(config)


def sample(frames=4, height=2, width=3, steps=9, **sources):
    """A shape key: video and audio latents, and further sources as source=shape of latents or mask."""
    key = [("video_latents", "latents", (128, frames, height, width)), ("audio_latents", "latents", (8, steps, 16))]
    for source, shape in sources.items():
        key.append((source, "latents" if "latents" in source else "mask", shape))
    return tuple(key)


def prefix(boundary, **fields):
    return {"type": "prefix", "temporal_boundary": boundary} | fields


def keyframe(*at, **fields):
    return {"type": "keyframe", "at": list(at)} | fields


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([prefix(3)], ["video.conditions[0] (prefix, temporal_boundary = 3)", "contributes no loss", "1 of 3"]),
        ([{"type": "first_frame"}, {"type": "suffix", "temporal_boundary": 9}], ["conditions[1] (suffix", "3 of 3"]),
        ([prefix(2), {"type": "suffix", "temporal_boundary": 1}], ["conditions 0, 1 together", "1 of 3", "clip_1"]),
        ([{**CROP, "spatial_region": [0, 0, 32, 97]}], ["[0, 0, 32, 97]", "only the part inside", "3 of 3"]),
        ([{**CROP, "spatial_region": [64, 0, 96, 96]}], ["outside the frame, so it has no effect", "3 of 3"]),
        ([keyframe(0, 3)], ["(keyframe, at = [0, 3]) is outside the clip at 3", "1 of 3", "clip_1"]),
        ([prefix(1, probability=0.0)], ["conditions[0] (prefix", "never applies"]),
    ],
)
def test_a_condition_that_cannot_do_what_it_says_is_named_once(conditions, words):
    chosen = [condition | {"probability": condition.get("probability", 0.5)} for condition in conditions]
    found = check_conditions(strategy(chosen), [sample(), sample(frames=3), sample()], "clip_{}".format)
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


def test_audio_conditions_count_latent_steps():
    found = check_conditions(strategy(audio=[prefix(8)]), [sample(), sample(steps=8)])
    assert len(found) == 1
    assert "audio.conditions[0] (prefix, temporal_boundary = 8)" in found[0]
    assert "8 latent steps" in found[0]


def test_conditions_that_fit_are_not_mentioned():
    conditions = [{"type": "first_frame", "probability": 0.5}, prefix(2), CROP, REFERENCE, keyframe("random", 2)]
    assert check_conditions(strategy(conditions, audio=[prefix(4)]), [sample(), sample()]) == []


def trainable(job, *keys, samples=(), weights=(1.0, 1.0)):
    read = []

    def peek(index):
        read.append(index)
        return samples[index]

    check_trainable(job, keys, peek, dict(zip(("video", "audio"), weights, strict=True)), "clip_{}".format)
    return read


def test_a_job_with_nothing_left_to_learn_is_refused():
    halves = [prefix(2), {"type": "suffix", "temporal_boundary": 2}]
    covered = r"clip_0: the video is covered by conditions in {} of {} samples"
    with pytest.raises(ValueError, match=covered.format(2, 2)):
        trainable(strategy([prefix(4)]), sample(), sample(frames=2))
    with pytest.raises(ValueError, match=covered.format(1, 1)):
        trainable(strategy(halves), sample())
    # A stream without weight is not trained either.
    with pytest.raises(ValueError, match=covered.format(1, 1)):
        trainable(strategy([prefix(4)], audio=[]), sample(), weights=(1.0, 0.0))
    # One sample, one chance or one stream to learn from is enough, and nothing is read for it.
    assert trainable(strategy([prefix(4)]), sample(), sample(frames=5)) == []
    assert trainable(strategy([prefix(4, probability=0.9)]), sample()) == []
    assert trainable(strategy([prefix(4)], audio=[]), sample()) == []


def flagged(*present):
    """Keys and samples whose audio has a flag `present`."""
    keys = [(*sample(), ("audio_latents", "present", ())) for _ in present]
    return keys, [{"audio_latents": {"present": value}} for value in present]


def test_audio_only_jobs_need_a_clip_with_audio():
    job = strategy(is_generated=False, audio=[])
    keys, samples = flagged(False, False, False)
    with pytest.raises(ValueError, match=r"clip_0: the audio is absent in 3 of 3 samples"):
        trainable(job, *keys, samples=samples)
    keys, samples = flagged(*[False] * 40, True, False)
    assert 40 in trainable(job, *keys, samples=samples)
    # The video of a silent clip can be trained.
    assert trainable(strategy(audio=[]), *keys, samples=samples) == []
    keys, samples = flagged(True)
    assert trainable(job, *keys, samples=samples) == [0]
    with pytest.raises(ValueError, match=r"the audio is covered by conditions in 1 of 1"):
        trainable(strategy(is_generated=False, audio=[prefix(9)]), *keys, samples=samples)


@pytest.mark.parametrize(("white", "probability", "is_refused"), [(24, 1.0, True), (23, 1.0, False), (24, 0.5, False)])
def test_masks_that_cover_every_clip_are_refused(white, probability, is_refused):
    job = strategy([{"type": "mask", "mask_dir": "masks", "probability": probability}])
    samples = [{"masks": {"mask": (torch.arange(24) < white).float()}}]
    with pytest.raises(ValueError, match="no sample can train anything") if is_refused else nullcontext():
        trainable(job, sample(masks=(24,)), samples=samples)


def test_a_stream_that_no_sample_trains_or_has_is_named():
    weights = {"video": 1.0, "audio": 1.0}
    both, silent = strategy(audio=[]), flagged(False, False)
    text = "[audio] is generated, and no sample trains it: the audio is absent in 2 of 2 samples"
    assert check_streams(both, silent[0], silent[1].__getitem__, weights) == [text]
    assert check_streams(both, silent[0], silent[1].__getitem__, weights, absent=("audio",)) == []
    assert check_streams(both, silent[0], silent[1].__getitem__, {"video": 1.0, "audio": 0.0}) == []
    keys, samples = flagged(False, True)
    assert check_streams(both, keys, samples.__getitem__, weights) == []
    frozen = FlexibleStrategy.from_config(
        {
            "video": {"is_generated": True, "latents_dir": "latents"},
            "audio": {"is_generated": False, "latents_dir": "audio_latents"},
        }
    )
    [warning] = check_streams(frozen, silent[0], silent[1].__getitem__, weights)
    assert warning.startswith("[audio] conditions the other stream, and no sample has it")
    assert check_streams(frozen, keys, samples.__getitem__, weights) == []
    # Some of the samples decide.
    keys, samples = flagged(*[False] * 1000)
    read = []
    [warning] = check_streams(frozen, keys, lambda index: read.append(index) or samples[index], weights)
    assert "none of 256 samples has it" in warning
    assert len(read) == 256


def test_a_mask_of_another_size_is_named_before_training():
    video = strategy([{"type": "mask", "mask_dir": "video_masks"}])
    assert check_conditions(video, [sample(video_masks=(4, 2, 3)), sample(video_masks=(24,))]) == []
    with pytest.raises(ValueError, match=r"video_masks: clip_1: .*24 video tokens.*found \[9\]"):
        # The audio has as many tokens as this mask has elements, which makes it no mask of the video.
        check_conditions(video, [sample(video_masks=(24,)), sample(video_masks=(9,))], "clip_{}".format)


def test_references_have_one_scale_over_the_whole_job():
    job = strategy([REFERENCE])
    small, same = (128, 3, 1, 2), (128, 5, 2, 4)
    keys = [sample(5, 2, 4, reference_latents=small), sample(9, 4, 8, reference_latents=(128, 5, 2, 4))]
    assert reference_scale(job, keys) == (2, 2)
    assert reference_scale(job, [sample(5, 2, 4, reference_latents=same)]) == (1, 1)
    with pytest.raises(ValueError, match=r"clip_1 has the .* factors \(1, 1\).*clip_0 has \(2, 2\)"):
        reference_scale(job, [*keys[:1], sample(5, 2, 4, reference_latents=same)], "clip_{}".format)
    with pytest.raises(ValueError, match=r"reference_latents: clip_0: .*must be a multiple"):
        reference_scale(job, [sample(5, 2, 4, reference_latents=(128, 5, 2, 3))], "clip_{}".format)


def test_two_references_share_their_scale():
    job = strategy([REFERENCE, {**REFERENCE, "latents_dir": "depth_latents"}])
    key = sample(5, 2, 4, reference_latents=(128, 5, 1, 2), depth_latents=(128, 5, 2, 4))
    with pytest.raises(ValueError, match=r"depth_latents: 0 has .*reference_latents: 0 has"):
        reference_scale(job, [key])


def test_without_video_references_there_is_no_scale():
    assert reference_scale(strategy([prefix(1)], audio=[{**REFERENCE, "latents_dir": "reference_audio"}]), []) is None


def test_the_trigger_word_of_a_job_is_that_of_its_captions(tmp_path):
    (tmp_path / "conditions").mkdir()
    record = tmp_path / "conditions/fingerprints.jsonl"
    data = DataSection(root=str(tmp_path))
    check_trigger_word("SKSDOG", data)  # nothing is recorded
    record.write_text('{"id":"0","values":{"lora_trigger":null}}\n')
    check_trigger_word("SKSDOG", data)  # the captions may have it in their text
    record.write_text('{"id":"0","values":{"lora_trigger":"SKSDOG"}}\n')
    check_trigger_word("SKSDOG, barking", data)
    check_trigger_word(None, data)
    with pytest.raises(ValueError, match=r"job\.trigger = 'SKSCAT': expected the trigger word .* found 'SKSDOG'"):
        check_trigger_word("SKSCAT", data)
    media = DataSection(source="media", media=MediaSection(lora_trigger="SKSDOG"))
    with pytest.raises(ValueError, match=r"job\.trigger = 'SKSCAT'"):
        check_trigger_word("SKSCAT", media)
