import math

import pytest
import torch

from ltx_titan.data import read_sample, read_shapes, write_sample
from tests.data.files import audio, features, video, without

CONTEXTS = {"video_context": torch.ones(8, 6), "audio_context": torch.ones(8, 4)}


def assert_equal_fields(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert actual[key].dtype == value.dtype, key
            assert torch.equal(actual[key], value), key
        else:
            assert actual[key] == value, key


def save(path, data):
    torch.save(data, path)
    return path


@pytest.mark.parametrize("fields", [video(), audio(), features(), video(present=False), {"mask": torch.ones(5)}])
def test_fields_round_trip(tmp_path, fields):
    path = tmp_path / "deep" / "er" / "clip.pt"
    write_sample(path, fields)
    assert_equal_fields(read_sample(path), fields)
    assert [file.name for file in path.parent.iterdir()] == ["clip.pt"], "no temporary file is left"


def test_contexts_are_read_without_a_mask(tmp_path):
    write_sample(tmp_path / "clip.pt", CONTEXTS)
    fields = read_sample(tmp_path / "clip.pt", "text")
    assert sorted(fields) == ["audio_prompt_embeds", "video_prompt_embeds"]
    assert torch.equal(fields["audio_prompt_embeds"], CONTEXTS["audio_context"])


def test_view_is_written_without_its_whole_storage(tmp_path):
    latents = torch.randn(100, 8, 5, 16)[3]
    write_sample(tmp_path / "clip.pt", audio(latents=latents))
    assert (tmp_path / "clip.pt").stat().st_size < 8 * 5 * 16 * 4 + 4096


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.pt"
    write_sample(path, video(seed=1))
    with pytest.raises(ValueError, match=r"clip\.pt: latents: expected finite values"):
        write_sample(path, video(latents=torch.full((128, 2, 3, 4), math.nan)))
    assert_equal_fields(read_sample(path), video(seed=1))


def test_legacy_patchified_video_becomes_a_grid(tmp_path):
    expected = video()
    tokens = expected["latents"].flatten(1).T
    path = save(tmp_path / "clip.pt", expected | {"latents": tokens})
    assert_equal_fields(read_sample(path, "video"), expected)
    assert read_shapes(path)["latents"] == (128, 2, 3, 4)


def test_legacy_patchified_audio_is_channel_major(tmp_path):
    expected = audio()
    tokens = expected["latents"].permute(1, 0, 2).flatten(1)
    assert_equal_fields(read_sample(save(tmp_path / "clip.pt", expected | {"latents": tokens}), "audio"), expected)


def test_legacy_prompt_embeds_serve_as_video_features(tmp_path):
    text = features()
    legacy = {"prompt_embeds": text["video_prompt_embeds"], "prompt_attention_mask": text["prompt_attention_mask"]}
    expected = without(text, "audio_prompt_embeds")
    assert_equal_fields(read_sample(save(tmp_path / "clip.pt", legacy), "text"), expected)


def test_missing_fields_of_older_files_get_defaults(tmp_path):
    old = {"latents": video()["latents"]}
    assert_equal_fields(read_sample(save(tmp_path / "old.pt", old)), video(fps=24.0))
    bare = {"latents": audio()["latents"]}
    assert_equal_fields(read_sample(save(tmp_path / "audio.pt", bare)), audio(duration=5 / 25))


def test_boolean_prompt_mask_becomes_integers(tmp_path):
    text = features()
    path = save(tmp_path / "clip.pt", text | {"prompt_attention_mask": text["prompt_attention_mask"].bool()})
    assert_equal_fields(read_sample(path), text)


def test_files_older_than_zip_archives_are_read(tmp_path):
    torch.save(video(), tmp_path / "clip.pt", _use_new_zipfile_serialization=False)
    assert_equal_fields(read_sample(tmp_path / "clip.pt"), video())
    assert read_shapes(tmp_path / "clip.pt")["latents"] == (128, 2, 3, 4)


def test_shapes_equal_those_of_the_sample(tmp_path):
    path = save(tmp_path / "clip.pt", video(frames=3))
    assert read_shapes(path) == {"latents": (128, 3, 3, 4), "num_frames": (), "height": (), "width": (), "fps": ()}


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        (without(video(), "latents"), "video", ["latents, video_prompt_embeds", "found ['fps', 'height'"]),
        (video(), "audio", ["expected audio, found video", "check the folder"]),
        (audio(), "video", ["expected video, found audio"]),
        (features(), "latents", ["expected latents, found text"]),
        (video(latents=torch.zeros(64, 2, 3, 4)), None, ["latents: expected [128, F', H', W']", "[64, 2, 3, 4]"]),
        (video(latents=torch.zeros(1, 128, 2, 3, 4)), None, ["latents", "[1, 128, 2, 3, 4]"]),
        (video(latents=torch.zeros(128, 2, 3, 4, dtype=torch.int32)), None, ["latents", "floating", "torch.int32"]),
        (video(latents=[1.0]), None, ["latents: expected a tensor, found list"]),
        (video(num_frames=7), None, ["num_frames: expected the latents' own size 2", "found 7"]),
        (video(latents=torch.zeros(25, 128)), None, ["latents: expected tokens [24, 128]", "found [25, 128]"]),
        (without(video(latents=torch.zeros(24, 128)), "height"), None, ["height: expected an integer", "None"]),
        (video(fps=0.0), None, ["fps: expected a positive number", "0.0"]),
        (video(fps="24"), None, ["fps: expected a number"]),
        (video(present=1), None, ["present: expected true or false"]),
        (video(latents=torch.full((128, 2, 3, 4), math.inf)), None, ["latents: expected finite", "3072 of 3072"]),
        (audio(latents=torch.zeros(8, 5, 64)), None, ["latents: expected [8, T, 16]", "[8, 5, 64]"]),
        (audio(num_time_steps=6), None, ["num_time_steps: expected the latents' own size 5"]),
        (without(features(), "prompt_attention_mask"), None, ["prompt_attention_mask: expected a tensor", "only ["]),
        (features(prompt_attention_mask=torch.ones(5).long()), None, ["prompt_attention_mask", "[8]", "[5]"]),
        (features(prompt_attention_mask=torch.full((8,), 2)), None, ["prompt_attention_mask: expected 0 or 1"]),
        (features(prompt_attention_mask=torch.ones(8)), None, ["prompt_attention_mask: expected whole numbers"]),
        (features(video_prompt_embeds=torch.zeros(1, 8, 6)), None, ["video_prompt_embeds: expected [tokens, width]"]),
        (features(audio_prompt_embeds=torch.zeros(7, 4)), None, ["audio_prompt_embeds: expected", "[7, 4]"]),
        ({"mask": torch.zeros(0)}, None, ["mask: expected one element per token"]),
    ],
)
def test_unusable_field_is_named_with_what_was_expected(tmp_path, fields, kind, words):
    path = save(tmp_path / "clip.pt", fields)
    with pytest.raises(ValueError) as caught:
        read_sample(path, kind)
    assert all(word in str(caught.value) for word in ["clip.pt", *words]), str(caught.value)


def cut(path):
    path.write_bytes(path.read_bytes()[:1000])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-200:] = b"\0" * 200
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a tensor file"),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"latents": video}, path),
        lambda path: path.unlink(),
    ],
)
@pytest.mark.parametrize("read", [read_sample, read_shapes])
def test_broken_file_is_named_with_the_remedy(tmp_path, damage, read):
    path = tmp_path / "clip.pt"
    write_sample(path, video())
    damage(path)
    with pytest.raises(ValueError, match=r"clip\.pt.*(expected|found).*run the preprocessing again"):
        read(path)
