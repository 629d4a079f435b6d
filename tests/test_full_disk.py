"""A full or read-only disk: one line with path, needed and free; older checkpoints stay whole; a rerun resumes."""

import errno
import os
import resource
import shutil
import subprocess

import pytest

from ltx_titan.checkpoint import BackgroundSaver, complete_folders, latest_complete
from ltx_titan.checkpoint.digests import _Crc32Stream
from ltx_titan.metrics import MetricsLogger
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


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO])
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


def test_a_disk_that_is_full_for_the_log_does_not_end_the_save_in_progress(job, tmp_path, runner, monkeypatch):
    closed = []
    close_saver, close_log = BackgroundSaver.close, MetricsLogger.close

    def fail(self):
        close_log(self)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")

    monkeypatch.setattr(MetricsLogger, "close", fail)
    monkeypatch.setattr(BackgroundSaver, "close", lambda self: closed.append(close_saver(self)))
    outcome = runner.train(job, "--checkpoint.background=true", "--training.steps=1", "--scheduler.warmup_steps=0")
    assert outcome.code == 1
    assert "metrics.jsonl: No space left on device" in outcome.text
    assert closed == [None]
    assert latest_complete(tmp_path / "run/checkpoint").name == "step-1"


def test_a_disk_without_room_is_refused_before_the_first_step(job, tmp_path, runner, monkeypatch):
    monkeypatch.setattr("ltx_titan.train.room.free_bytes", lambda folder: 1000)
    outcome = runner.train(job)
    assert outcome.code == 1
    assert "job.dump_folder" in outcome.text
    assert "a checkpoint needs" in outcome.text
    assert "are free on its disk" in outcome.text


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        (["--checkpoint.keep_last=1"], None),
        (["--checkpoint.keep_last=2"], 3),
        (["--checkpoint.keep_last=1", "--checkpoint.keep_best.metric=loss"], 3),
        (["--checkpoint.keep_last=-1"], 5),
        (["--checkpoint.keep_last=2", "--checkpoint.interval=4"], None),
    ],
)
def test_a_disk_with_room_for_two_checkpoints_is_enough_or_warned_of(job, runner, monkeypatch, settings, most):
    monkeypatch.setattr("ltx_titan.train.room.num_bytes", lambda tensors: 2**30)
    monkeypatch.setattr("ltx_titan.train.room.free_bytes", lambda folder: int(2.5 * 2**30))
    outcome = runner.train(job, "--training.steps=5", "--data.num_workers=0", *settings)
    assert outcome.code == 0
    assert (f"up to {most} more checkpoints of 1.00 GiB" in outcome.text) == (most is not None)
    assert ("finds no room" in outcome.text) == (most is not None)


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


class SmallDisk:
    """A tmpfs with a limit; where mounting is not permitted, a limit on the size of this process's files."""

    def __init__(self, folder, **limits):
        self.folder, self.is_mounted = folder, False
        folder.mkdir()
        options = ",".join(f"{key}={value}" for key, value in limits.items())
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        self.is_mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not self.is_mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, self.limits[1]))

    def remount(self, options):
        """Changes the limits of the tmpfs."""
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True, capture_output=True)

    def grow(self):
        """Lifts the limit."""
        if self.is_mounted:
            self.remount("size=1g,nr_inodes=100000")
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)

    def close(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        if self.is_mounted:
            subprocess.run(["umount", "-l", str(self.folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """Makes a `SmallDisk`."""
    disks = []

    def make(**limits):
        disks.append(SmallDisk(tmp_path / "disk", **limits))
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()


# Two or three checkpoints, of about 70 kB and four files, and what else a run writes.
@pytest.mark.parametrize("limits", [{"size": "250k"}, {"size": "100m", "nr_inodes": 24}], ids=["bytes", "inodes"])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_the_command_resumes(job, runner, small_disk, limits):
    disk = small_disk(**limits)
    arguments = [f"--job.dump_folder={disk.folder / 'run'}", "--checkpoint.keep_last=-1", "--training.steps=6"]
    arguments += ["--scheduler.warmup_steps=0", "--checkpoint.export=false"]
    outcome = runner.train(job, *arguments)
    assert outcome.code == 1, outcome.text
    assert "Traceback" not in outcome.text
    assert "could not be written" in outcome.text
    assert "It needs" in outcome.text
    assert ("inodes" if "nr_inodes" in limits and disk.is_mounted else "GiB") + " are free on its disk" in outcome.text
    saved = list(complete_folders(disk.folder / "run" / "checkpoint"))
    disk.grow()
    assert all(path.is_dir() for path in saved)
    outcome = runner.train(job, *arguments)
    assert outcome.code == 0, outcome.text
    if saved:
        assert f"{saved[0].name}: step {saved[0].name[5:]} of 6" in outcome.text
    assert latest_complete(disk.folder / "run" / "checkpoint").name == "step-6"


def test_a_read_only_disk_is_refused_by_key(job, runner, small_disk):
    disk = small_disk(size="10m")
    if disk.is_mounted:
        disk.remount("ro")
    else:
        disk.folder.joinpath("run").write_text("in the way")
    outcome = runner.train(job, f"--job.dump_folder={disk.folder / 'run'}")
    assert outcome.code == 1
    assert "job.dump_folder" in outcome.text
    assert "Traceback" not in outcome.text
