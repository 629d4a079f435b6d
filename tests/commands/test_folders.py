"""A folder of clips with `NAME.txt` beside each in place of a table, and the exit status of data commands."""

import pytest
from PIL import Image

from ltx_titan.cli import main
from ltx_titan.commands.captioning.table import CaptionTable
from ltx_titan.commands.compute_reference import ReferenceOptions, compute_references
from ltx_titan.commands.inspection.inspect_data import InspectOptions, inspect_data
from ltx_titan.tables.samples import read_table
from tests.commands.process.helpers import load, run
from tests.media.clips import write_clip


@pytest.fixture
def folder(tmp_path):
    """Two captioned images, one of them in a subfolder, and one without a caption."""
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name, color in (("a", "red"), ("sub/b", "blue"), ("c", "green")):
        Image.new("RGB", (64, 32), color).save(folder / f"{name}.png")
    (folder / "a.txt").write_text("a red field\n", encoding="utf-8")
    (folder / "sub" / "b.txt").write_text("ein blaues Feld, größer\n", encoding="utf-8-sig")
    return folder


def test_folder_is_prepared_like_a_table(nano, folder):
    report, printed = run(nano, folder, buckets="64x32x1")
    assert report.counts["captions"]["done"] == report.counts["videos"]["done"] == 2
    tokens = load(folder, "conditions", "sub/b.pt")["prompt_attention_mask"].sum()
    # The miniature tokenizer has one token a byte, and one for the start.
    assert tokens == 1 + len("ein blaues Feld, größer".encode())
    assert load(folder, "latents", "a.pt")["latents"].shape == (128, 1, 1, 2)
    assert "c.png: has no text file c.txt beside it" in printed
    assert not (folder / ".precomputed" / "latents" / "c.pt").exists()


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--strict"], 1)])
def test_status_of_a_run_that_left_a_file_out(nano, folder, capsys, options, status):
    paths = ["--model-path", str(nano), "--text-encoder-path", str(nano.parent / "text_encoder")]
    command = ["process-dataset", str(folder), "--resolution-buckets", "64x32x1", "--dry-run", *paths, *options]
    assert main(command) == status
    (folder / "c.txt").write_text("a green field")
    assert main(command) == 0
    assert "3 x 64x32x1" in capsys.readouterr().out


def test_inspect_reads_captions_of_a_folder(folder, console):
    (folder / "notes.txt").write_text("x")
    report = inspect_data(InspectOptions(folder, no_sheet=True), console)
    assert report.counts["files"]["done"] == 3
    assert report.notes["clips without a caption"] == 1
    assert [(item, reason[:24]) for _, item, reason in report.failures] == [
        (str(folder / "notes.txt"), "has no media file beside")
    ]
    assert (report.status(strict=False), report.status(strict=True)) == (0, 1)


def test_references_of_a_folder_keep_its_captions(folder, console):
    for name in ("a.mp4", "c.mp4"):
        write_clip(folder / name, frames=2, channels=0)
    compute_references(ReferenceOptions(dataset=folder, kind="gray"), console)
    assert read_table(folder / "dataset.jsonl") == [
        {"video": "a.mp4", "caption": "a red field", "reference_video": "a_grey.mp4"},
        {"video": "c.mp4", "reference_video": "c_grey.mp4"},
    ]


def test_captioning_a_folder_starts_from_its_captions(folder):
    table = CaptionTable(folder, None, frozenset({".png"}), recursive=True)
    assert [table.has(folder / f"{name}.png") for name in ("a", "sub/b", "c")] == [True, True, False]
    table.add(folder / "c.png", "a green field")
    table.save()
    captions = {row["video"]: row["caption"] for row in read_table(folder / "dataset.jsonl")}
    assert captions == {"a.png": "a red field", "sub/b.png": "ein blaues Feld, größer", "c.png": "a green field"}
