"""Decisions that preparation takes for the user are counted in its report, with the names of the first clips."""

import json
from fractions import Fraction

import pytest
from PIL import Image

from ltx_titan.commands.inspection.inspect_data import InspectOptions, inspect_data
from ltx_titan.encode.buckets import Bucket
from tests.commands.process.helpers import run, write_rows
from tests.media.clips import write_clip

BUCKETS = "64x32x17;64x32x9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notes")
    write_clip(folder / "fits.mp4", frames=17, height=32, width=64, rate=16000)
    write_clip(folder / "small.mp4", frames=17, height=16, width=32, channels=0)
    write_clip(folder / "tall.mp4", frames=17, height=128, width=64, channels=0)
    write_clip(folder / "long.mp4", frames=34, height=32, width=64, rate=8000)
    write_clip(folder / "film.mp4", frames=17, fps=Fraction(12), height=32, width=64, channels=0)
    frames = [Image.new("RGB", (64, 32), (8 * i, 0, 0)) for i in range(17)]
    frames[0].save(folder / "loop.gif", save_all=True, append_images=frames[1:], duration=40)
    captions = {"fits": "a tone", "small": "", "tall": "word " * 1500, "long": "  ", "film": "x", "loop": "y"}
    files = {"loop": "loop.gif"}
    rows = [{"video": files.get(name, f"{name}.mp4"), "caption": text} for name, text in captions.items()]
    write_rows(folder, rows)
    return folder


def named(report, start):
    """Count and names of the one note that starts so."""
    [note] = [note for note in report.notes if note.startswith(start)]
    return report.notes[note], [name.rsplit("/", 1)[-1].rstrip(")") for name in report.named[note]]


def test_the_report_of_a_run_counts_and_names_its_decisions(folder, nano, tmp_path):
    report, printed = run(nano, folder / "dataset.jsonl", BUCKETS, fps="25", output_dir=tmp_path)
    assert report.counts["videos"] == {"done": 6}
    assert named(report, "clips enlarged more than 1.5 times") == (1, ["small.mp4"])
    assert named(report, "clips of whose area cropping removes more than a third") == (1, ["tall.mp4"])
    # 34 frames of which 17 are used, and 36 of the 12 frames per second that are resampled.
    assert named(report, "videos of which more than a third") == (2, ["long.mp4", "film.mp4"])
    assert named(report, "videos of another frame rate, resampled") == (1, ["film.mp4"])
    assert named(report, "animated images") == (1, ["loop.gif"])
    assert named(report, "audio of less than 16 kHz") == (1, ["long.mp4"])
    assert named(report, "empty captions") == (2, ["small.mp4", "long.mp4"])
    assert named(report, "captions longer than 1024 tokens, cut") == (1, ["tall.mp4"])
    assert named(report, "videos and images without audio")[0] == 4
    [line] = [line for line in printed.splitlines() if line.startswith("videos and images without audio")]
    assert line.endswith("film.mp4, ...)")


def test_a_dry_run_tells_what_headers_tell(folder, nano, tmp_path):
    report, _ = run(nano, folder / "dataset.jsonl", BUCKETS, dry_run=True, output_dir=tmp_path)
    assert named(report, "clips enlarged") == (1, ["small.mp4"])
    assert named(report, "empty captions") == (2, ["small.mp4", "long.mp4"])


def test_proposed_buckets_are_explained_and_the_same_as_when_they_are_passed(folder, nano, tmp_path, capsys):
    options = {"dry_run": True, "captions": False, "output_dir": tmp_path}
    proposed, _ = run(nano, folder / "dataset.jsonl", "auto", **options)
    printed = capsys.readouterr().out
    assert " near " in printed
    buckets = printed.partition('--resolution-buckets "')[2].partition('"')[0]
    passed, _ = run(nano, folder / "dataset.jsonl", buckets, **options)
    assert proposed.plans == passed.plans
    assert proposed.plans


def test_limits_reject_the_clips_that_are_only_reported_otherwise(folder, nano, tmp_path):
    options = {"max_enlargement": 1.5, "max_crop": 0.3, "dry_run": True, "captions": False, "output_dir": tmp_path}
    report, _ = run(nano, folder / "dataset.jsonl", BUCKETS, **options)
    reasons = {item.rsplit("/", 1)[-1]: reason for _, item, reason in report.failures}
    assert set(reasons) == {"small.mp4", "tall.mp4"}
    assert "is 32x16, which the bucket 64x32x17 would enlarge 2.00 times; the limit is 1.5" in reasons["small.mp4"]
    assert "crop by 75% of its area; the limit is 30%" in reasons["tall.mp4"]
    for name, value in (("max_crop", 33.0), ("max_enlargement", 0.0)):
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            run(nano, folder / "dataset.jsonl", BUCKETS, **{name: value}, output_dir=tmp_path)


def test_inspect_counts_and_names_the_same(folder, tmp_path, console):
    table, findings = folder / "dataset.jsonl", tmp_path / "findings.json"
    options = InspectOptions(table, no_sheet=True, json=findings, resolution_buckets=BUCKETS)
    report = inspect_data(options, console)
    assert named(report, "clips enlarged") == (1, ["small.mp4"])
    assert named(report, "clips of whose area") == (1, ["tall.mp4"])
    assert named(report, "videos of which more than a third") == (1, ["long.mp4"])
    assert named(report, "animated images") == (1, ["loop.gif"])
    assert named(report, "clips without a caption") == (2, ["small.mp4", "long.mp4"])
    # 17 of 34 frames of one of five clips of 17 frames and more, all but one at 25 frames per second.
    seconds = {record["path"]: record["duration_s"] for record in json.loads(findings.read_text())}
    unused = 17 / 25 / sum(seconds.values())
    assert f"unused: {unused:.0%} of all video" in console.file.getvalue()


@pytest.mark.parametrize(
    ("size", "enlargement", "cropped"),
    [((64, 32), 1, 0), ((128, 64), 0.5, 0), ((32, 32), 2, 0.5), ((64, 48), 1, 1 / 3), ((32, 16), 2, 0)],
)
def test_enlargement_and_cropping_follow_from_the_sizes(size, enlargement, cropped):
    bucket = Bucket(64, 32, 9)
    assert bucket.enlargement(*size) == pytest.approx(enlargement)
    assert bucket.cropped(*size) == pytest.approx(cropped)
    # A third itself is let through.
    assert len(bucket.notes(*size, 13)) == (enlargement > 1.5) + (cropped > 1 / 3 + 1e-9)
