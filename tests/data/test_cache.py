import torch

from ltx_titan.data import write_sample
from ltx_titan.data.cache import SampleCache


def test_full_cache_removes_the_least_recently_used(tmp_path):
    fields = {"mask": torch.zeros(4096)}
    probe = tmp_path / "probe.pt"
    write_sample(probe, fields)
    size = probe.stat().st_size
    cache = SampleCache(tmp_path / "cache", 3.5 * size)
    for key in ("aa1", "bb2", "cc3"):
        cache.put(key, fields)
    assert cache.get("aa1", "mask") is not None
    cache.put("dd4", fields)
    assert cache.get("bb2", "mask") is None
    assert all(cache.get(key, "mask") is not None for key in ("aa1", "cc3", "dd4"))
    # Another process counts the entries of this one.
    SampleCache(tmp_path / "cache", 2.5 * size).put("ee5", fields)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*/*.pt")) <= 2.5 * size


def test_damaged_entry_is_a_miss(tmp_path):
    cache = SampleCache(tmp_path, 1e9)
    cache.put("aa1", {"mask": torch.zeros(4)})
    (tmp_path / "aa" / "aa1.pt").write_bytes(b"half")
    assert cache.get("aa1", "mask") is None
    assert cache.get("bb2", "mask") is None
