import os

import pytest
import torch

from ltx_titan.data import PrecomputedDataset, read_sample, write_sample
from ltx_titan.data.layout import load_fields
from ltx_titan.data.shards import list_shards, read_shard, read_shard_sample, shard_path, shard_shapes, write_shard
from tests.data.files import AV_SOURCES, audio, features, video, write_dataset
from tests.data.test_layout import CONTEXTS, assert_equal_fields


def pack(root, size):
    """Puts the files of every folder into shards of `size` samples, in the order of their paths."""
    for folder in AV_SOURCES:
        files = sorted((root / folder).rglob("*.pt"))
        for start in range(0, len(files), size):
            part = files[start : start + size]
            fields = {path.relative_to(root / folder).as_posix(): load_fields(path) for path in part}
            write_shard(shard_path(root / folder, start // size), fields)
        for path in files:
            path.unlink()


@pytest.mark.parametrize("fields", [video(), audio(present=False), features(), CONTEXTS, {"mask": torch.ones(2, 3)}])
def test_sample_of_a_shard_equals_that_of_a_file(tmp_path, fields):
    path = shard_path(tmp_path, 3)
    write_shard(path, {"a.pt": fields, "sub/b/c.pt": fields})
    assert list(read_shard(path)) == ["a.pt", "sub/b/c.pt"]
    write_sample(tmp_path / "alone.pt", fields)
    alone = read_sample(tmp_path / "alone.pt")
    assert_equal_fields(read_shard_sample(path, "sub/b/c.pt"), alone)
    shapes = shard_shapes(path)["a.pt"]
    assert shapes == {k: tuple(v.shape) if isinstance(v, torch.Tensor) else () for k, v in alone.items()}


def test_sharding_does_not_change_the_dataset(tmp_path):
    names = ["b", "sub/ä", "a", "sub/c", "d"]
    files = PrecomputedDataset(write_dataset(tmp_path / "x", names, frames=lambda i: 1 + i % 2), AV_SOURCES)
    pack(write_dataset(tmp_path / "y", names, frames=lambda i: 1 + i % 2), 2)
    shards = PrecomputedDataset(tmp_path / "y", AV_SOURCES)
    assert len(list_shards(tmp_path / "y" / "latents")) == 3
    assert [shards.name(i) for i in range(5)] == [files.name(i) for i in range(5)]
    assert [shards.shape_key(i) for i in range(5)] == [files.shape_key(i) for i in range(5)]
    assert shards.fingerprint == files.fingerprint, "it decides the order of batches"
    for i in range(5):
        for source, fields in files.load(i).items():
            assert_equal_fields(shards.load(i)[source], fields)


def test_file_overrides_the_sample_of_a_shard(tmp_path):
    pack(write_dataset(tmp_path, ["a", "b"]), 2)
    write_sample(tmp_path / "latents" / "b.pt", video(frames=3))
    data = PrecomputedDataset(tmp_path, AV_SOURCES)
    assert [data.load(i)["video_latents"]["num_frames"] for i in range(2)] == [2, 3]


def test_same_samples_give_same_bytes(tmp_path):
    for name in ("x", "y"):
        write_shard(shard_path(tmp_path / name, 0), {"b.pt": video(seed=1), "a.pt": video(seed=2)})
    first, second = (shard_path(tmp_path / name, 0).read_bytes() for name in ("x", "y"))
    assert first == second
    assert os.listdir(tmp_path / "x") == ["shard-00000.safetensors"]


def test_damaged_shard_is_named(tmp_path):
    pack(write_dataset(tmp_path, ["a", "b"]), 2)
    path = shard_path(tmp_path / "conditions", 0)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"conditions/shard-00000\.safetensors: expected a complete shard"):
        PrecomputedDataset(tmp_path, AV_SOURCES)
    path.write_bytes(whole)
    data = PrecomputedDataset(tmp_path, AV_SOURCES)
    write_shard(path, {"a.pt": features()})
    with pytest.raises(ValueError, match=r"expected the sample 'b\.pt', found it removed"):
        data.load(1)


def test_shard_of_another_kind_is_refused_with_its_sample(tmp_path):
    pack(write_dataset(tmp_path, ["a"]), 1)
    write_shard(shard_path(tmp_path / "latents", 0), {"a.pt": audio()})
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors/a\.pt: expected video, found audio"):
        PrecomputedDataset(tmp_path, AV_SOURCES)
