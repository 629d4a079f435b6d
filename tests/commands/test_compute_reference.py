import csv
import json
import os
import shutil
from fractions import Fraction

import pytest
import torch
from PIL import Image

from ltx_titan.cli import main
from ltx_titan.commands.compute_reference import ReferenceOptions, compute_references
from ltx_titan.media import iter_frames, probe_video, read_image, write_video
from tests.commands.caption_models import write_depth_model

FPS = Fraction(30000, 1001)


def write_square(path, frames=12, height=64, width=96, square=32):
    """A red square on blue that moves to the right, two pixels a frame."""
    clip = torch.tensor((20, 30, 160), dtype=torch.uint8).repeat(frames, height, width, 1)
    for index in range(frames):
        clip[index, 16 : 16 + square, 8 + 2 * index : 8 + 2 * index + square] = torch.tensor((220, 40, 30))
    write_video(path, clip, FPS)
    return path


def frames_of(path):
    return torch.stack([torch.from_numpy(frame.copy()) for frame in iter_frames(path)]).float()


@pytest.fixture
def clips(tmp_path):
    """A table with other columns, in which one video is broken and one row names none."""
    write_square(tmp_path / "a.mp4")
    (tmp_path / "sub").mkdir()
    write_square(tmp_path / "sub" / "mönö ☃.mp4", frames=5)
    Image.new("RGB", (90, 50), "orange").save(tmp_path / "still.png")
    (tmp_path / "zero.mp4").touch()
    table = tmp_path / "dataset.csv"
    rows = [["a.mp4", "one", "x"], ["sub/mönö ☃.mp4", "two, three", "y"], ["still.png", "four", ""]]
    rows += [["zero.mp4", "five", ""], ["", "six", ""]]
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["video", "caption", "reference_path"], *rows])
    return tmp_path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_edges_are_written_next_to_clips_and_into_the_table(clips, console):
    report = compute_references(ReferenceOptions(clips / "dataset.csv"), console)
    assert [(row["video"], row["caption"], row["reference_video"]) for row in rows_of(clips / "dataset.csv")] == [
        ("a.mp4", "one", "a_edges.mp4"),
        ("sub/mönö ☃.mp4", "two, three", "sub/mönö ☃_edges.mp4"),
        ("still.png", "four", "still_edges.png"),
        ("zero.mp4", "five", ""),
        ("", "six", ""),
    ]
    assert "reference_path" not in rows_of(clips / "dataset.csv")[0]
    assert report.counts["edges"] == {"done": 3, "failed": 2}
    assert {reason.split(" (")[0] for _, _, reason in report.failures} == {"is empty", "names no video"}
    info = probe_video(clips / "a_edges.mp4")
    assert (info.frames, info.width, info.height, info.fps, info.has_audio) == (12, 96, 64, FPS, False)
    edges = frames_of(clips / "a_edges.mp4")
    for index in (0, 11):
        # White at the left side of the square in this frame, black inside of it.
        side = 8 + 2 * index
        assert edges[index, 20:44, side - 2 : side + 2].amax(1).mean() > 150
        assert edges[index, 24:40, side + 8 : side + 24].mean() < 20

    written = {path: path.stat().st_mtime_ns for path in clips.rglob("*_edges.*")}
    table = (clips / "dataset.csv").read_bytes()
    report = compute_references(ReferenceOptions(clips / "dataset.csv"), console)
    assert report.counts["edges"] == {"skipped": 3, "failed": 2}
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert (clips / "dataset.csv").read_bytes() == table


def test_replaced_clip_is_filtered_again(tmp_path, console):
    for name, square in (("a", 32), ("b", 16)):
        write_square(tmp_path / f"{name}.mp4", frames=3, square=square)
    (tmp_path / "d.jsonl").write_text('{"video": "a.mp4"}\n{"video": "b.mp4"}\n')
    options = ReferenceOptions(tmp_path / "d.jsonl", kind="gray")
    compute_references(options, console)
    a, b = (tmp_path / f"{name}_grey.mp4" for name in ("a", "b"))
    assert not torch.equal(frames_of(a), frames_of(b))
    shutil.copy(tmp_path / "b.mp4", tmp_path / "a.mp4")
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    report = compute_references(options, console)
    assert report.counts["gray"] == {"done": 1, "skipped": 1}
    assert report.notes == {"clip changed since, computed again": 1}
    assert report.named == {"clip changed since, computed again": ["a.mp4"]}
    assert torch.equal(frames_of(a), frames_of(b))


def test_other_options_for_existing_references_are_refused(tmp_path, console):
    write_square(tmp_path / "a.mp4", frames=3)
    (tmp_path / "d.jsonl").write_text('{"video": "a.mp4"}\n')
    compute_references(ReferenceOptions(tmp_path / "d.jsonl", kind="blur"), console)
    with pytest.raises(ValueError, match=r"was computed with blur_strength = 0.01, now it is 0.02; --overwrite"):
        compute_references(ReferenceOptions(tmp_path / "d.jsonl", kind="blur", blur_strength=0.02), console)


def test_gray_and_blur_of_a_folder(clips, console):
    folder = clips / "sub"
    compute_references(ReferenceOptions(folder, kind="gray"), console)
    assert json.loads((folder / "dataset.jsonl").read_text()) == {
        "video": "mönö ☃.mp4",
        "reference_video": "mönö ☃_grey.mp4",
    }
    gray, clip = frames_of(folder / "mönö ☃_grey.mp4"), frames_of(folder / "mönö ☃.mp4")
    assert gray.std(-1).max() < 6
    luma = clip @ torch.tensor((0.299, 0.587, 0.114))
    assert (gray.mean(-1) - luma).abs().mean() < 6

    # References are not clips: a second kind is computed from the clip alone.
    options = ReferenceOptions(folder, folder / "blur.json", kind="blur", blur_strength=0.1)
    assert compute_references(options, console).counts["blur"] == {"done": 1}
    blurred = frames_of(folder / "mönö ☃_blur.mp4")
    assert blurred.shape == clip.shape
    steps = [frames.diff(dim=2).abs().amax() for frames in (clip, blurred)]
    assert steps[1] < steps[0] / 4


def test_depth_is_scaled_over_the_whole_clip(clips, tmp_path, console):
    torch.manual_seed(0)
    model = write_depth_model(tmp_path / "depth")
    options = ReferenceOptions(clips / "sub", kind="depth", depth_model=model, batch_size=2)
    assert compute_references(options, console).counts["depth"] == {"done": 1}
    depth = frames_of(clips / "sub" / "mönö ☃_depth.mp4")
    assert depth.shape == (5, 64, 96, 3)
    assert depth.std(-1).max() < 6
    assert depth.max() > 230
    assert depth.min() < 25


def test_a_table_in_another_folder_and_a_dry_run(clips, console):
    out = clips / "elsewhere" / "new.jsonl"
    compute_references(ReferenceOptions(clips / "dataset.csv", out, dry_run=True), console)
    assert "a_edges.mp4" in console.file.getvalue()
    assert not list(clips.rglob("*_edges*"))
    before = (clips / "dataset.csv").read_bytes()
    compute_references(ReferenceOptions(clips / "dataset.csv", out), console)
    assert (clips / "dataset.csv").read_bytes() == before
    row = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    assert row["video"] == str(clips / "a.mp4")
    assert row["reference_video"] == str(clips / "a_edges.mp4")


@pytest.mark.parametrize("kind", ["gray", "grey"])
def test_odd_sizes_and_stills_under_either_spelling(tmp_path, console, kind):
    Image.new("RGB", (33, 21), "orange").save(tmp_path / "still.png")
    (tmp_path / "t.json").write_text(json.dumps([{"media_path": "still.png"}]))
    compute_references(ReferenceOptions(tmp_path / "t.json", kind=kind), console)
    assert read_image(tmp_path / "still_grey.png").shape == (1, 21, 33, 3)
    assert json.loads((tmp_path / "t.json").read_text()) == [
        {"media_path": "still.png", "reference_video": "still_grey.png"}
    ]


def test_invalid_options_are_refused(clips, capsys):
    assert main(["compute-reference", str(clips / "dataset.csv"), "--kind", "depth"]) == 1
    assert "--depth-model" in capsys.readouterr().err
    (clips / "dataset.jsonl").write_text('{"video": "a.mp4", "caption": "one"}\n')
    assert main(["compute-reference", str(clips)]) == 1
    assert "its columns would be lost" in capsys.readouterr().err
