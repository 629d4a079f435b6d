import json
import logging

import pytest
import torch

from ltx_titan.data import PrecomputedDataset, read_sample, token_counts, write_sample
from ltx_titan.data import cache as cache_module
from tests.data.files import AV_SOURCES, audio, features, video, write_dataset


def names(data):
    return [data.name(i) for i in range(len(data))]


def test_samples_are_matched_by_relative_path_and_sorted(tmp_path):
    write_dataset(tmp_path, ["b", "sub/a", "a"])
    data = PrecomputedDataset(tmp_path, AV_SOURCES)
    assert names(data) == ["a.pt", "b.pt", "sub/a.pt"]
    sample = data.load(1)
    assert sorted(sample) == ["audio_latents", "conditions", "video_latents"]
    assert torch.equal(sample["video_latents"]["latents"], read_sample(tmp_path / "latents/b.pt")["latents"])


def test_precomputed_child_is_the_root(tmp_path):
    write_dataset(tmp_path / ".precomputed", ["a"])
    assert names(PrecomputedDataset(tmp_path, AV_SOURCES)) == ["a.pt"]
    assert names(PrecomputedDataset(tmp_path / ".precomputed", AV_SOURCES)) == ["a.pt"]


def test_samples_missing_in_a_folder_are_skipped_and_reported(tmp_path, caplog):
    write_dataset(tmp_path, ["a", "b", "c"])
    (tmp_path / "audio_latents" / "b.pt").unlink()
    (tmp_path / "latents" / "half.pt.tmp.12").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert names(PrecomputedDataset(tmp_path, AV_SOURCES)) == ["a.pt", "c.pt"]
    assert "1 of 3 samples lack a file in audio_latents and are skipped: b.pt" in caplog.text


def test_older_flat_names_are_paired_at_the_top_only(tmp_path):
    sources = {"conditions": "conditions", "latents": "video_latents"}
    for name in ("1", "2"):
        write_sample(tmp_path / f"latents/latent_{name}.pt", video())
        write_sample(tmp_path / f"conditions/condition_{name}.pt", features(seed=int(name)))
    write_sample(tmp_path / "latents/sub/latent_3.pt", video())
    write_sample(tmp_path / "conditions/sub/condition_3.pt", features())
    data = PrecomputedDataset(tmp_path, sources)
    assert names(data) == ["latent_1.pt", "latent_2.pt"]
    expected = read_sample(tmp_path / "conditions/condition_2.pt")["video_prompt_embeds"]
    assert torch.equal(data.load(1)["conditions"]["video_prompt_embeds"], expected)


def test_audio_job_needs_no_video_folder(tmp_path):
    write_dataset(tmp_path, ["a"], folders=("conditions", "audio_latents"))
    data = PrecomputedDataset(tmp_path, {"conditions": "conditions", "audio_latents": "audio_latents"})
    assert names(data) == ["a.pt"]


def test_extra_folders_keep_their_names(tmp_path):
    write_dataset(tmp_path, ["a"])
    write_sample(tmp_path / "video_masks/a.pt", {"mask": torch.ones(2, 3, 4)})
    write_sample(tmp_path / "reference_latents/a.pt", video(frames=1))
    extra = {name: name for name in ("video_masks", "reference_latents")}
    data = PrecomputedDataset(tmp_path, AV_SOURCES | extra)
    assert data.load(0)["video_masks"]["mask"].shape == (2, 3, 4)
    assert token_counts(data.shape_key(0)) == {"video_latents": 24, "audio_latents": 5, "reference_latents": 12}


def test_mask_of_another_size_is_refused_with_its_file(tmp_path):
    write_dataset(tmp_path, ["a"])
    write_sample(tmp_path / "video_masks/a.pt", {"mask": torch.ones(2, 3, 5)})
    data = PrecomputedDataset(tmp_path, AV_SOURCES | {"video_masks": "video_masks"})
    with pytest.raises(ValueError, match=r"video_masks/a\.pt: mask: expected one element per token .*found 30"):
        data.load(0)


def test_samples_share_a_key_if_all_shapes_agree(tmp_path):
    write_dataset(tmp_path, ["a", "b", "c", "d"], frames=lambda i: 1 + i % 2)
    write_sample(tmp_path / "audio_latents/d.pt", audio(steps=6))
    data = PrecomputedDataset(tmp_path, AV_SOURCES)
    keys = [data.shape_key(i) for i in range(4)]
    assert keys[0] == keys[2]
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: (root / "latents").rename(root / "latent"), ["the folder 'latents'", "'latent'"]),
        (lambda root: (root / "audio_latents/a.pt").unlink(), ["audio_latents", "found none"]),
        (lambda root: (root / "latents/a.pt").rename(root / "latents/b.pt"), ["same relative path", "latents/b.pt"]),
        (lambda root: write_sample(root / "latents/a.pt", audio()), ["latents/a.pt", "expected video, found audio"]),
        (lambda root: (root / "latents/a.pt").write_bytes(b""), ["latents/a.pt", "0 bytes"]),
    ],
)
def test_unusable_data_root_is_explained(tmp_path, change, words):
    write_dataset(tmp_path, ["a"])
    change(tmp_path)
    with pytest.raises(ValueError) as caught:
        PrecomputedDataset(tmp_path, AV_SOURCES)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_absent_root_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.root = .*nowhere"):
        PrecomputedDataset(tmp_path / "nowhere", AV_SOURCES)


def test_only_new_and_changed_files_are_opened_for_shapes(tmp_path, monkeypatch):
    write_dataset(tmp_path, ["a", "b"])
    first = PrecomputedDataset(tmp_path, AV_SOURCES)
    opened = []

    def counting(path, kind, read=cache_module.read_shapes):
        opened.append(path.relative_to(tmp_path).as_posix())
        return read(path, kind)

    monkeypatch.setattr(cache_module, "read_shapes", counting)
    again = PrecomputedDataset(tmp_path, AV_SOURCES)
    assert opened == []
    assert [again.shape_key(i) for i in range(2)] == [first.shape_key(i) for i in range(2)]

    write_sample(tmp_path / "latents/b.pt", video(frames=3))
    changed = PrecomputedDataset(tmp_path, AV_SOURCES)
    assert opened == ["latents/b.pt"]
    assert token_counts(changed.shape_key(1))["video_latents"] == 36


@pytest.mark.parametrize("content", ["", "{", json.dumps({"a": 1}), json.dumps([[1, 2]])])
def test_foreign_index_file_is_ignored(tmp_path, content):
    write_dataset(tmp_path, ["a"])
    (tmp_path / cache_module.INDEX_NAME).write_text(content)
    assert token_counts(PrecomputedDataset(tmp_path, AV_SOURCES).shape_key(0))["video_latents"] == 24


def test_data_is_read_without_an_index_if_none_can_be_written(tmp_path):
    write_dataset(tmp_path, ["a"])
    # A folder cannot be replaced by a file: as on a read-only disk, writing fails. Tests may run as root, whom
    # permissions do not stop.
    (tmp_path / cache_module.INDEX_NAME).mkdir()
    assert len(PrecomputedDataset(tmp_path, AV_SOURCES)) == 1
    assert not list(tmp_path.glob(f"{cache_module.INDEX_NAME}.*"))


def test_fingerprint_depends_on_the_samples_and_not_on_the_path(tmp_path):
    prints = []
    for root, members in (("x", ["a", "b"]), ("y", ["a", "b"]), ("z", ["a", "c"]), ("w", ["a"])):
        prints.append(PrecomputedDataset(write_dataset(tmp_path / root, members), AV_SOURCES).fingerprint)
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_file_that_breaks_or_changes_later_is_named_when_read(tmp_path):
    write_dataset(tmp_path, ["a", "b"])
    data = PrecomputedDataset(tmp_path, AV_SOURCES)
    (tmp_path / "conditions/a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"conditions/a\.pt.*0 bytes"):
        data.load(0)
    write_sample(tmp_path / "latents/b.pt", video(frames=3))
    with pytest.raises(ValueError, match=r"b\.pt: expected the shapes of when the run started.*video_latents"):
        data.load(1)
