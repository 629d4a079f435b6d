"""Every file name that the file system allows works, and one that cannot work concerns its own row alone."""

import json
import os
import shutil
import unicodedata

import pytest
import torch

from ltx_titan.commands.inspection.inspect_data import InspectOptions, inspect_data
from ltx_titan.common.files import atomic_write
from ltx_titan.data import PrecomputedDataset, read_sample
from tests.commands.process.helpers import run
from tests.media.clips import write_clip

USABLE = [
    "new\nline.mp4",
    "-dash.mp4",
    "take:1.mp4",
    "50% #1 %03d [a]*?.mp4",
    " both ends .mp4 ",
    "dot..mp4",
    "no suffix",
    unicodedata.normalize("NFC", "ä.mp4"),
    unicodedata.normalize("NFD", "ä.mp4"),
    "Twin.mp4",
    "twin.mp4",
    os.fsdecode(b"byte\xff.mp4"),
    "x" * 251 + ".mp4",
    "ü" * 125 + "y.mp4",
    "a.mp4",
    ".hidden.mp4",
]
# Same output, below another output, longer than a name with ".pt", no name, no name of any file.
UNUSABLE = ["a.mov", "a.pt/inside.mp4", "z" * 255, ".", "zero\0.mp4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("names")
    clip = write_clip(tmp_path_factory.mktemp("clip") / "c.mp4", frames=9, height=32, width=32, channels=0)
    (folder / "a.pt").mkdir()
    for name in [*USABLE, *UNUSABLE[:3]]:
        shutil.copy(clip, folder / name)
    rows = [{"video": name, "caption": "a clip"} for name in [*USABLE, *UNUSABLE]]
    (folder / "dataset.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def keys(names):
    return {os.path.splitext(name)[0] + ".pt" for name in names}


@pytest.mark.parametrize("shard_size", [None, 4])
def test_names_are_prepared_read_and_inspected(folder, nano, tmp_path, monkeypatch, console, shard_size):
    # Relative, so that names stand alone on the way to FFmpeg.
    monkeypatch.chdir(folder)
    options = {"captions": False, "output_dir": tmp_path, "shard_size": shard_size, "num_workers": 0}
    report, _ = run(nano, folder.joinpath("dataset.jsonl").relative_to(folder), "32x32x9", **options)
    assert report.counts["videos"]["done"] == len(USABLE)
    assert len(report.failures) == len(UNUSABLE)

    data = PrecomputedDataset(tmp_path, {"latents": "video_latents", "audio_latents": "audio_latents"})
    assert {data.name(index) for index in range(len(data))} == keys(USABLE)
    first = data.load(0)["video_latents"]["latents"]
    assert all(torch.equal(data.load(index)["video_latents"]["latents"], first) for index in range(len(data)))
    assert len(data.fingerprint) == 32

    found = inspect_data(InspectOptions(tmp_path, tmp_path / "sheet.png", json=tmp_path / "found.json"), console)
    assert found.counts["samples"]["done"] == len(USABLE)
    assert {record["name"] for record in json.loads((tmp_path / "found.json").read_text())} == keys(USABLE)


def test_rejected_names_state_why(folder, nano, tmp_path):
    options = {"captions": False, "output_dir": tmp_path, "dry_run": True, "num_workers": 0}
    report, printed = run(nano, folder / "dataset.jsonl", "32x32x9", **options)
    reasons = " ".join(f"{item}: {reason}" for _, item, reason in report.failures)
    assert "has the same output a.pt as row 15; rename one" in reasons
    assert "has 258 bytes, file systems allow 255" in reasons
    assert f"row {len(USABLE) + 4} (" in reasons
    assert "its output a.pt/inside.pt and another row's would be a file and a folder of one name; rename one" in reasons
    # One line for each, whatever the name.
    assert sum(line.startswith("failed ") for line in printed.splitlines()) == len(report.failures)


def test_clips_are_inspected_under_any_name(folder, tmp_path, console):
    report = inspect_data(
        InspectOptions(folder / "dataset.jsonl", tmp_path / "s.png", json=tmp_path / "f.json"), console
    )
    assert report.counts["files"]["done"] == len(USABLE) + 3


@pytest.mark.parametrize("name", ["n" * 252 + ".pt", "ü" * 127, "." + "x" * 254, os.fsdecode(b"\xff" * 250) + ".json"])
def test_names_of_255_bytes_are_written_atomically(tmp_path, name):
    with atomic_write(tmp_path / name) as temporary:
        temporary.write_text("new")
        assert temporary.name != name
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_sample_of_another_name_is_still_checked(tmp_path):
    path = tmp_path / os.fsdecode(b"broken\xff.pt")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="expected a complete PyTorch file"):
        read_sample(path)
