import pytest
import torch

from ltx_titan.commands.stored import stored_samples
from ltx_titan.data.layout import write_sample
from ltx_titan.data.shards import shard_path, write_shard


def test_samples_in_shards_and_in_single_files(tmp_path):
    masks = {name: {"mask": torch.full((4,), value)} for name, value in (("a.pt", 0.0), ("sub/ä.pt", 1.0))}
    write_shard(shard_path(tmp_path, 0), masks)
    write_sample(tmp_path / "a.pt", {"mask": torch.ones(2)})
    write_sample(tmp_path / "c.pt", {"mask": torch.ones(3)})
    found = {name: stored.read("mask")["mask"].tolist() for name, stored in stored_samples(tmp_path).items()}
    assert found == {"a.pt": [1.0] * 2, "c.pt": [1.0] * 3, "sub/ä.pt": [1.0] * 4}
    shard_path(tmp_path, 1).write_bytes(b"noise")
    with pytest.raises(ValueError, match="shard-00001"):
        stored_samples(tmp_path)
