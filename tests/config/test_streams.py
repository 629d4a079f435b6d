import pytest

from ltx_titan.config import AudioSection, VideoSection

ALL = [
    {"type": "first_frame"},
    {"type": "prefix", "temporal_boundary": 2},
    {"type": "suffix", "temporal_boundary": 1},
    {"type": "keyframe", "at": [0, "random", -1], "length": 2},
    {"type": "spatial_crop", "spatial_region": [0, 32, 64, 96]},
    {"type": "mask", "mask_dir": "video_masks"},
    {"type": "reference", "latents_dir": "reference_latents"},
]


def video(*conditions, **fields):
    return VideoSection.model_validate(
        {"is_generated": True, "latents_dir": "latents", "conditions": conditions} | fields
    )


def audio(*conditions):
    return AudioSection.model_validate({"is_generated": True, "latents_dir": "audio_latents", "conditions": conditions})


def test_all_conditions_are_read_and_survive_being_written():
    block = video(*ALL)
    assert [c.type for c in block.conditions] == [c["type"] for c in ALL]
    assert all(c.probability == 1.0 for c in block.conditions)
    assert VideoSection.model_validate(block.model_dump(mode="json")) == block


VIDEO_ONLY = ("first_frame", "keyframe", "spatial_crop")


@pytest.mark.parametrize("condition", [c for c in ALL if c["type"] in VIDEO_ONLY])
def test_audio_refuses_conditions_on_frames_and_lists_what_it_supports(condition):
    with pytest.raises(ValueError, match=f"'{condition['type']}' .* 'prefix', 'suffix', 'mask', 'reference'"):
        audio(condition)


def test_audio_takes_every_other_condition():
    taken = [c for c in ALL if c["type"] not in VIDEO_ONLY]
    assert len(audio(*taken).conditions) == len(taken)


@pytest.mark.parametrize(
    ("condition", "names"),
    [
        ({"type": "prefix"}, "temporal_boundary"),
        ({"type": "suffix", "temporal_boundary": 0}, "temporal_boundary"),
        ({"type": "mask"}, "mask_dir"),
        ({"type": "reference"}, "latents_dir"),
        ({"type": "first_frame", "probability": 1.2}, "probability"),
        ({"type": "first_frame", "probability": "1"}, "probability"),
        ({"type": "first_frame", "strength": 0.5}, "strength"),
        ({"type": "last_frame"}, "last_frame"),
        ({"type": "keyframe"}, "at"),
        ({"type": "keyframe", "at": []}, "at least 1 item"),
        ({"type": "keyframe", "at": [0, "end"]}, '"first", "middle", "last", "random", found \'end\''),
        ({"type": "keyframe", "at": [1.5]}, "a latent frame .* found 1.5"),
        ({"type": "keyframe", "at": [0], "length": 0}, "length"),
        ({"type": "spatial_crop", "spatial_region": [0, 0, 64]}, "spatial_region"),
        (
            {"type": "spatial_crop", "spatial_region": [64, 0, 32, 64]},
            r"\[top, left, bottom, right\]",
        ),
        ({"type": "spatial_crop", "spatial_region": [-1, 0, 32, 64]}, "spatial_region"),
        ({"type": "spatial_crop", "spatial_region": [0.0, 0, 32, 64]}, "spatial_region"),
    ],
)
def test_a_bad_condition_is_named(condition, names):
    with pytest.raises(ValueError, match=names):
        video(condition)


def test_a_stream_needs_its_fields_and_no_others():
    with pytest.raises(ValueError, match="is_generated"):
        VideoSection.model_validate({"latents_dir": "latents"})
    with pytest.raises(ValueError, match="latents_dir"):
        VideoSection.model_validate({"is_generated": True})
    with pytest.raises(ValueError, match="weight"):
        video(weight=2)


def test_only_references_apply_to_a_frozen_stream():
    assert video(*ALL, is_generated=False).applied == (False, False, False, False, False, False, True)
    assert all(video(*ALL).applied)
