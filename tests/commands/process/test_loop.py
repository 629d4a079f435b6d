"""Any number of processes and interruptions give the same bytes."""

import multiprocessing
import os
import signal
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image

from ltx_titan.data import PrecomputedDataset
from ltx_titan.data.shards import list_shards, shard_path
from tests.commands.process.helpers import contents, run, write_rows
from tests.data.test_layout import assert_equal_fields
from tests.media.clips import write_clip
from tests.processes import run_ranks

FORMS = {"files": {}, "shards": {"shard_size": 3}}
SOURCES = {"latents": "video_latents", "audio_latents": "audio_latents", "conditions": "conditions"}


def prepare(nano, path, out, form):
    # Proposed buckets, so that their agreement between processes is part of it.
    return run(nano, path, buckets="auto", output_dir=out, **FORMS[form])


def prepare_until_killed(nano, path, out, form):
    """Prepares in a separate process, which is killed as soon as its second file of latents is complete."""
    # As many threads as in the other process, so that sums are formed in the same order.
    torch.set_num_threads(1)
    replace, complete = Path.replace, []

    def replace_and_count(self, target):
        replaced = replace(self, target)
        if (out / "latents") in Path(target).parents:
            complete.append(target)
        if len(complete) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return replaced

    Path.replace = replace_and_count
    prepare(nano, path, out, form)


def assert_equal_sets(first, second):
    assert first.fingerprint == second.fingerprint
    for i in range(len(first)):
        one, other = first.load(i), second.load(i)
        assert one.keys() == other.keys()
        for source in one:
            assert_equal_fields(one[source], other[source])


def prepare_both(nano, path, out):
    """Prepares files and shards on one rank, and checks its report."""
    for form in FORMS:
        report, printed = prepare(nano, path, out / form, form)
        assert report.counts["videos"] == {"done": 7, "failed": 1}
        assert report.counts["captions"] == {"done": 7}
        assert sum("bad.mp4" in reason or "bad.mp4" in item for _, item, reason in report.failures) == 1


@pytest.fixture(scope="module")
def unbroken(nano, tmp_path_factory):
    """A table of eight files, one of them corrupt, and a prepared root for each form."""
    folder = tmp_path_factory.mktemp("clips")
    names = [f"clip_{i}.mp4" for i in range(5)]
    for i, name in enumerate(names):
        write_clip(folder / name, frames=9 + i, fps=Fraction(25 - i), channels=i % 3)
    (folder / "bad.mp4").write_bytes(b"no video")
    Image.new("RGB", (90, 50), "orange").save(folder / "still.png")
    (folder / "sub").mkdir()
    write_clip(folder / "sub" / "ünter.mp4", frames=9)
    names = ["sub/ünter.mp4", *names[:3], "bad.mp4", *names[3:], "still.png"]
    path = write_rows(folder, [{"video": name, "caption": f"about {name}"} for name in names])
    roots = tmp_path_factory.mktemp("unbroken")
    prepare_both(nano, path, roots)
    return path, roots


def test_both_forms_are_the_same_dataset(unbroken):
    files, shards = (PrecomputedDataset(unbroken[1] / form, SOURCES) for form in FORMS)
    assert len(list_shards(unbroken[1] / "shards" / "latents")) == 3
    assert not list((unbroken[1] / "shards").rglob("*.pt"))
    assert len(files) == len(shards) == 7
    assert_equal_sets(files, shards)


def test_two_ranks_write_the_same_bytes_as_one(unbroken, nano, tmp_path):
    path, roots = unbroken
    run_ranks(prepare_both, 2, nano, path, tmp_path)
    for form in FORMS:
        assert contents(tmp_path / form) == contents(roots / form)


@pytest.mark.parametrize("form", FORMS)
def test_killed_run_resumes_to_the_same_bytes(unbroken, nano, tmp_path, form):
    path, roots = unbroken
    arguments = (nano, path, tmp_path, form)
    process = multiprocessing.get_context("forkserver").Process(target=prepare_until_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # An unfinished file, as a kill during a write leaves it.
    (tmp_path / "latents" / "clip_9.pt.tmp.123").write_bytes(b"half")
    report, _ = prepare(nano, path, tmp_path, form)
    assert report.counts["videos"]["skipped"] >= 1
    assert report.counts["videos"]["done"] + report.counts["videos"]["skipped"] == 7
    assert contents(tmp_path) == contents(roots / form)


def test_damaged_shard_is_made_again(unbroken, nano, tmp_path):
    path, roots = unbroken
    for name, content in contents(roots / "shards").items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    damaged = shard_path(tmp_path / "latents", 1)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    report, printed = prepare(nano, path, tmp_path, "shards")
    assert report.counts["videos"] == {"done": 2, "skipped": 5, "failed": 1}
    assert "damaged shard, made again" in printed
    assert contents(tmp_path) == contents(roots / "shards")


def test_new_rows_are_added_to_stored_shards(unbroken, nano, tmp_path):
    """A sample stays in its shard, even if rows are inserted before it."""
    path, roots = unbroken
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    (path.parent / "part.jsonl").write_text("".join(rows[2:]), encoding="utf-8")
    prepare(nano, path.parent / "part.jsonl", tmp_path, "shards")
    report, _ = prepare(nano, path, tmp_path, "shards")
    assert report.counts["captions"] == {"done": 2, "skipped": 5}
    whole, grown = (PrecomputedDataset(root, SOURCES) for root in (roots / "shards", tmp_path))
    assert_equal_sets(whole, grown)
