"""`data.on_bad_sample = "skip"`: damaged samples are replaced alike on every rank and after every resume."""

import json
import logging
import os

import pytest

from ltx_titan.data import PrecomputedDataset
from ltx_titan.data.bad_samples import LOG_NAME, SkippingDataset, tolerated
from ltx_titan.data.layout import UnreadableError
from tests.data.files import AV_SOURCES, write_dataset
from tests.jobs import NO_CHECKPOINTS, curve, read_run, train_rank, write_job
from tests.jobs import write_dataset as write_samples
from tests.processes import run_ranks


def dataset(root, **options):
    return PrecomputedDataset(root, AV_SOURCES, **options)


def damage(root, name):
    """Inverts bytes in the middle of a sample's latents: its shapes stay readable."""
    path = root / "latents" / f"{name}.pt"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 255 for byte in content[middle : middle + 8])
    path.write_bytes(content)


@pytest.fixture
def root(tmp_path):
    """Six samples of two shapes."""
    return write_dataset(tmp_path / "data", "abcdef", frames=lambda i: 2 + i % 2)


def test_a_damaged_sample_is_replaced_by_the_next_one_of_its_shape(root, tmp_path, caplog):
    before = dataset(root)
    damage(root, "c")
    with pytest.raises(ValueError, match=r"latents/c\.pt"):
        dataset(root).load(2)
    # Two readers, as two ranks or a resumed run.
    for _ in range(2):
        found = SkippingDataset(dataset(root, skip_damaged=True), tmp_path)
        assert found.fingerprint == before.fingerprint
        with caplog.at_level(logging.WARNING):
            sample = found.load(2)
        assert sample["video_latents"]["latents"].equal(before.load(4)["video_latents"]["latents"])
    assert "skipped c.pt, trained on e.pt instead" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / LOG_NAME).read_text().splitlines()]
    assert [(line["sample"], line["replaced_by"]) for line in lines] == [("c.pt", "e.pt")] * 2
    assert "checksum" in lines[0]["reason"]


def test_a_sample_whose_name_is_not_utf_8_is_replaced_and_logged(tmp_path, caplog):
    # Its warning has the name, and xdist cannot pass on what is not UTF-8.
    caplog.set_level(logging.ERROR, logger="ltx_titan")
    name = os.fsdecode(b"caf\xe9")
    root = write_dataset(tmp_path / "data", [name, "other"])
    dataset(root)  # its shapes are known from before
    damage(root, name)
    found = SkippingDataset(dataset(root, skip_damaged=True), tmp_path)
    index = next(i for i in range(2) if found.name(i) == f"{name}.pt")
    assert found.load(index)["video_latents"]["latents"].equal(found.load(1 - index)["video_latents"]["latents"])
    (line,) = (tmp_path / LOG_NAME).read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["sample"] == f"{name}.pt"


def test_a_file_cut_after_the_first_run_keeps_the_order(root, tmp_path):
    before = dataset(root)
    path = root / "latents" / "a.pt"
    path.write_bytes(path.read_bytes()[:100])
    found = SkippingDataset(dataset(root, skip_damaged=True), tmp_path)
    assert (len(found), found.fingerprint) == (6, before.fingerprint)
    assert found.load(0)["video_latents"]["latents"].equal(before.load(2)["video_latents"]["latents"])


def test_a_sample_of_unknown_shape_is_left_out(root, caplog):
    (root / "latents" / "a.pt").write_bytes(b"never read before")
    with pytest.raises(ValueError, match=r"latents/a\.pt"):
        dataset(root)
    with caplog.at_level(logging.WARNING):
        found = dataset(root, skip_damaged=True)
    assert (len(found), found.num_dropped) == (5, 1)
    assert "latents/a.pt" in caplog.text


def test_too_many_damaged_samples_end_the_job(root, tmp_path):
    found = SkippingDataset(dataset(root), tmp_path)
    for name in "ac":
        damage(root, name)
    found.load(4)
    with pytest.raises(ValueError, match=r'2 of 6 samples are damaged, more than data\.on_bad_sample = "skip"'):
        found.load(0)


def test_a_disk_that_cannot_be_read_is_no_damaged_sample(root, tmp_path, monkeypatch):
    found = SkippingDataset(dataset(root), tmp_path)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(UnreadableError, match="Input/output error"):
        found.load(0)
    assert not (tmp_path / LOG_NAME).exists()


def test_the_rate_is_one_percent():
    assert [tolerated(count) for count in (1, 100, 199, 1000)] == [1, 1, 1, 10]


@pytest.mark.distributed
def test_ranks_skip_the_same_sample_and_so_does_a_resumed_run(tmp_path, nano_path):
    root = write_samples(tmp_path / "data", nano_path)
    settings = {"data__on_bad_sample": "skip", "training__steps": 2}
    straight = write_job(tmp_path / "straight", nano_path, root, **settings, **NO_CHECKPOINTS)
    damage(root, "clip_1")
    run_ranks(train_rank, 2, straight)
    resumed = write_job(tmp_path / "resumed", nano_path, root, **settings, checkpoint__export=False)
    run_ranks(train_rank, 2, resumed, "--training.stop_at=1")
    run_ranks(train_rank, 2, resumed)
    assert curve(read_run(resumed)) == curve(read_run(straight))
    for job in (straight, resumed):
        log = (job.parent / "run" / LOG_NAME).read_text().splitlines()
        assert {(json.loads(line)["sample"], json.loads(line)["replaced_by"]) for line in log} == {
            ("clip_1.pt", "clip_2.pt")
        }
