import tomllib

import pytest
import tomli_w
from pydantic import ValidationError

from ltx_titan.config import ValidationSection
from ltx_titan.validation.check import check_validation, with_schedule, with_stg_blocks

SHAPES = {"has_video": True, "has_audio": True, "num_blocks": 48, "scale_factors": (8, 32, 32)}


def section(*conditions, **fields):
    sample = {"prompt": "a river", "conditions": list(conditions)}
    return ValidationSection.model_validate({"samples": [sample], **fields})


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.touch()
    return str(path)


def problems(made, **shapes):
    with pytest.raises(ValueError) as error:
        check_validation(made, **(SHAPES | shapes))
    return str(error.value)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"type": "prefix"}, "exactly one of video and audio, found neither"),
        ({"type": "mask", "video": "a", "audio": "b", "mask": "m"}, "found both"),
        ({"type": "prefix", "video": "a", "duration": 1.0}, "expected num_frames, not duration"),
        ({"type": "suffix", "audio": "a", "num_frames": 8}, "expected duration, not num_frames"),
        ({"type": "reference", "audio": "a", "downscale_factor": 2}, "belongs to a video reference"),
        ({"type": "spatial_crop", "video": "a", "spatial_region": [9, 0, 8, 8]}, "0 <= top < bottom"),
        ({"type": "first_frame", "video": "a"}, "image_or_video"),
        ({"type": "keyframe", "image_or_video": "a", "at": "random"}, '"first", "middle", "last", found \'random\''),
        ({"type": "no_such_thing"}, "no_such_thing"),
    ],
)
def test_a_contradictory_condition_is_refused(condition, message):
    with pytest.raises(ValidationError, match=message):
        section(condition)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (
            [{"type": "video_to_audio", "video": "a"}, {"type": "audio_to_video", "audio": "a"}],
            "a whole stream 2 times",
        ),
        (
            [{"type": "video_to_audio", "video": "a"}, {"type": "first_frame", "image_or_video": "a"}],
            "first_frame covers part of the video",
        ),
        (
            [{"type": "audio_to_video", "audio": "a"}, {"type": "prefix", "audio": "a"}],
            "prefix covers part of the audio",
        ),
    ],
)
def test_a_stream_conditioned_as_a_whole_takes_no_further_condition(conditions, message):
    with pytest.raises(ValidationError, match=message):
        section(*conditions)


def test_a_section_without_anything_to_do_is_refused():
    with pytest.raises(ValidationError, match="nothing to do"):
        ValidationSection(interval=10)
    with pytest.raises(ValidationError, match="are both false"):
        section(generate_video=False, generate_audio=False)


def test_a_section_as_resolved_reads_back_as_itself():
    """Jobs are written out with all defaults, and read again when they are resumed."""
    conditions = [
        {"type": "spatial_crop", "video": "a", "spatial_region": [0, 0, 32, 32]},
        {"type": "reference", "audio": "a"},
        {"type": "suffix", "video": "a", "num_frames": 8},
    ]
    made = section(*conditions, schedule="distilled", stg_blocks=[1], interval=3)
    read = ValidationSection.model_validate(tomllib.loads(tomli_w.dumps(made.model_dump(exclude_none=True))))
    assert read == made
    for one in (made, read):
        assert "steps" not in problems(one)


def test_a_seed_of_zero_is_a_seed():
    made = ValidationSection(seed=5, samples=[{"prompt": "a", "seed": 0}, {"prompt": "b"}])
    assert [made.seed_of(sample) for sample in made.samples] == [0, 5]


@pytest.mark.parametrize(
    ("fields", "shapes", "message"),
    [
        ({"video_dims": [960, 540, 89]}, {}, r"samples\[0\]\.video_dims: .*960x540"),
        ({"video_dims": [960, 544, 88]}, {}, "88 frames"),
        ({"stg_blocks": [28, 4]}, {"num_blocks": 4}, r"\[28, 4\], but the model's blocks are 0 to 3"),
        ({"generate_audio": True}, {"has_audio": False}, "built without audio"),
        ({"schedule": "distilled", "inference_steps": 30}, {}, "distilled schedule has 8"),
        ({"held_out_root": "/nowhere/at/all"}, {}, "not a folder"),
    ],
)
def test_a_section_that_does_not_fit_the_model_is_refused(fields, shapes, message):
    with pytest.raises(ValueError, match=message):
        check_validation(section(**fields), **(SHAPES | shapes))


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"type": "prefix", "num_frames": 56}, "expected 1 . a multiple of 8, at most 89, for a prefix"),
        ({"type": "prefix", "num_frames": 97}, "at most 89"),
        ({"type": "suffix", "num_frames": 57}, "expected a multiple of 8, at most 89, for a suffix"),
        ({"type": "reference", "downscale_factor": 3}, "downscale_factor 3 reduces 960x544 pixels to 320x181"),
        ({"type": "reference", "temporal_scale_factor": 3}, "temporal_scale_factor 3 reduces 89 frames to"),
    ],
)
def test_sizes_that_the_codec_cannot_encode_are_named_before_training(condition, message, clip):
    with pytest.raises(ValueError, match=message):
        check_validation(section(condition | {"video": clip}), **SHAPES)


def test_a_keyframe_beyond_the_clip_is_named_before_training(clip):
    keyframe = {"type": "keyframe", "image_or_video": clip, "length": 2}
    check_validation(section(*({**keyframe, "at": at} for at in ("last", -2, 10))), **SHAPES)
    for at, covered in ((11, "11 to 12"), (-13, "-1 to 0")):
        with pytest.raises(ValueError, match=f"covers latent frames {covered}; expected frames within 0 to 11"):
            check_validation(section({**keyframe, "at": at}), **SHAPES)


def test_every_problem_is_named_at_once(clip):
    made = section(
        {"type": "first_frame", "image_or_video": "missing.png"},
        {"type": "prefix", "audio": clip},
        video_dims=[960, 544, 89],
        generate_audio=False,
        stg_blocks=[99],
    )
    lines = problems(made).splitlines()
    assert len(lines) == 3
    assert "stg_blocks" in lines[0]
    assert "conditions[0] (first_frame): 'missing.png' is not a file" in lines[1]
    assert "conditions[1] (prefix) conditions the audio, which is not generated" in lines[2]


def test_a_model_of_one_stream_samples_that_stream_by_default(clip):
    check_validation(section(stg_blocks=[0]), **(SHAPES | {"has_audio": False}))
    found = problems(section({"type": "audio_to_video", "audio": clip}), has_audio=False)
    assert "conditions the audio, but the model is built without it" in found


@pytest.mark.parametrize(("num_blocks", "blocks"), [(48, (28,)), (4, (3,))])
def test_guidance_skips_a_block_that_the_model_has(num_blocks, blocks):
    unset = section()
    assert with_stg_blocks(unset, num_blocks).stg_blocks == blocks
    assert with_stg_blocks(section(stg_blocks=[2]), num_blocks).stg_blocks == (2,)


def test_a_distilled_checkpoint_is_sampled_as_one_unless_the_job_says_otherwise():
    made = section(video_cfg_scale=2.0)
    found = with_schedule(made, "packs/ltx-2.3-22b-distilled-1.1.safetensors", "2.3.0")
    assert (found.schedule, found.stepper) == ("distilled", "euler")
    assert (found.video_cfg_scale, found.audio_cfg_scale, found.video_stg_scale) == (2.0, 1.0, 0.0)
    newer = with_schedule(made, "ltx-2.5-22b-distilled-transformer-bf16.safetensors", "2.5.0")
    assert newer.stepper == "euler_ancestral"
    # The folder's name says nothing about the file.
    for path in ("distilled/ltx-2.3-22b-dev.safetensors", None):
        other = with_schedule(made, path, "2.3.0")
        assert other == made.model_copy(update={"schedule": "standard"})
    chosen = section(schedule="standard")
    assert with_schedule(chosen, "ltx-2.3-22b-distilled-1.1.safetensors", "2.3.0") == chosen


def test_prompts_of_a_file_follow_the_samples_and_are_kept_in_the_resolved_section(tmp_path):
    path = tmp_path / "prompts.txt"
    # The line separator is no end of a line.
    path.write_text("# subjects\na rabbit\r\n\n  a hill,\u2028at night  \n", encoding="utf-8")
    made = section(prompts_file=str(path))
    assert [sample.prompt for sample in made.samples] == ["a river", "a rabbit", "a hill,\u2028at night"]
    path.unlink()
    again = ValidationSection.model_validate(tomllib.loads(tomli_w.dumps(made.model_dump(exclude_none=True))))
    assert again == made
    with pytest.raises(ValidationError, match=r"prompts_file = .*correct the path"):
        section(prompts_file=str(path))
    path.write_text("# nothing\n")
    with pytest.raises(ValidationError, match="expected a prompt in a line"):
        section(prompts_file=str(path))
