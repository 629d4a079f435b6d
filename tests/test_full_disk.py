"""A full or read-only disk: one line with path, needed and free; older checkpoints stay whole; a rerun resumes."""

import errno
import os

import pytest

from ltx_titan.checkpoint import latest_complete
from ltx_titan.checkpoint.digests import _Crc32Stream
from tests.jobs import write_job


@pytest.fixture
def job(tmp_path, nano_path, data_root):
    """A job of few weights that saves every step, in the foreground."""
    settings = {"model__mode": "lora", "lora__rank": 2, "lora__targets": ["attn1.to_q"], "checkpoint__interval": 1}
    return write_job(tmp_path, nano_path, data_root, checkpoint__background=False, **settings)


def fill(monkeypatch, number):
    """From the second save on, writing fails after a few writes, as on a disk that fills up."""
    saves = []

    def create(self, stream):
        saves.append(self)
        self._stream, self.count, self.crc, self.is_full = stream, 0, 0, len(saves) > 2

    whole = _Crc32Stream.write

    def write(self, data):
        if self.is_full:
            raise OSError(number, os.strerror(number), "shard")
        return whole(self, data)

    monkeypatch.setattr(_Crc32Stream, "__init__", create)
    monkeypatch.setattr(_Crc32Stream, "write", write)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_save_that_cannot_be_written_leaves_the_older_one_and_resumes(job, tmp_path, runner, monkeypatch, number):
    with monkeypatch.context() as patch:
        fill(patch, number)
        outcome = runner.train(job, "--training.steps=3", "--scheduler.warmup_steps=0")
    assert outcome.code == 1
    assert "Traceback" not in outcome.text
    assert "step-2 could not be written" in outcome.text
    assert "It needs" in outcome.text
    assert "are free on its disk" in outcome.text
    folder = tmp_path / "run/checkpoint"
    assert latest_complete(folder) == folder / "step-1"
    outcome = runner.train(job, "--training.steps=3", "--scheduler.warmup_steps=0")
    assert outcome.code == 0
    assert "step-1: step 1 of 3" in outcome.text
    assert latest_complete(folder) == folder / "step-3"


def test_a_disk_without_room_is_refused_before_the_first_step(job, tmp_path, runner, monkeypatch):
    monkeypatch.setattr("ltx_titan.train.room.free_bytes", lambda folder: 1000)
    outcome = runner.train(job)
    assert outcome.code == 1
    assert "job.dump_folder" in outcome.text
    assert "a checkpoint needs" in outcome.text
    assert "are free on its disk" in outcome.text


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_dump_folder_that_cannot_be_made_is_refused_by_key(job, tmp_path, runner, monkeypatch, number):
    def fail(self, *args, **options):
        raise OSError(number, os.strerror(number), str(self))

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.mkdir", fail)
        outcome = runner.train(job)
    assert outcome.code == 1
    assert "job.dump_folder" in outcome.text
    assert os.strerror(number) in outcome.text
    assert "Traceback" not in outcome.text
