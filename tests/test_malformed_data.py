"""Malformed prepared data: samples, shards and folders; what a file of a dataset can do at worst."""

import json
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ltx_titan.data import read_sample
from ltx_titan.data.shards import read_shard, read_shard_sample, shard_path, write_shard
from tests.jobs import write_dataset, write_job
from tests.malformed import Accepted, check, rows

Change = Callable[[Path], object]
FOLDERS = ("latents", "audio_latents", "conditions")


@pytest.fixture
def read_only(monkeypatch):
    """Instead of training, reads every sample; a job whose samples can all be read was accepted."""

    def read(plan):
        for index in range(len(plan.dataset)):
            plan.dataset.load(index)
        raise Accepted(f"accepted {len(plan.dataset)} samples")

    monkeypatch.setattr("ltx_titan.train.entry.Trainer", read)


@pytest.fixture(scope="module")
def two_samples(tmp_path_factory, nano_path):
    """A valid dataset of two samples."""
    return write_dataset(tmp_path_factory.mktemp("two"), nano_path, clips=2)


def fields(folder: str, **changes: Any) -> Change:
    """Changes fields of the first sample in one folder; None removes one."""

    def change(root: Path) -> None:
        path = root / folder / "clip_0.pt"
        found = torch.load(path) | changes
        torch.save({key: value for key, value in found.items() if value is not None}, path)

    return change


def whole(folder: str, value: Any) -> Change:
    """Replaces the content of the first sample's file: bytes, or an object to save."""

    def change(root: Path) -> None:
        path = root / folder / "clip_0.pt"
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)

    return change


def cut(folder: str, keep: float) -> Change:
    """Cuts the first sample's file."""

    def change(root: Path) -> None:
        path = root / folder / "clip_0.pt"
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * keep)])

    return change


def rotten(folder: str) -> Change:
    """Inverts bytes in the data of the first sample's largest tensor."""

    def change(root: Path) -> None:
        path = root / folder / "clip_0.pt"
        with zipfile.ZipFile(path) as archive:
            member = max(archive.infolist(), key=lambda info: info.file_size)
        content = bytearray(path.read_bytes())
        middle = member.header_offset + member.file_size // 2
        content[middle : middle + 4] = bytes(byte ^ 255 for byte in content[middle : middle + 4])
        path.write_bytes(content)

    return change


class Touch:
    """A pickle that makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def latents(*shape: int, value: float = 0.0) -> torch.Tensor:
    """Latents with one value in front."""
    tensor = torch.zeros(*shape)
    tensor.view(-1)[0] = value
    return tensor


NAN, INF = float("nan"), float("inf")
MASK = torch.ones(128, dtype=torch.int64)
SAMPLES = rows(
    ("empty file", whole("latents", b""), ("clip_0.pt", "0 bytes", "run the preprocessing again")),
    ("text", whole("latents", b"hello"), ("clip_0.pt", "complete PyTorch file", "delete the file")),
    ("zeros", whole("latents", bytes(5000)), ("clip_0.pt", "complete PyTorch file")),
    ("zip magic alone", whole("conditions", b"PK\x03\x04" + bytes(60)), ("clip_0.pt", "complete PyTorch file")),
    ("half", cut("latents", 0.5), ("clip_0.pt", "complete PyTorch file")),
    ("last bytes missing", cut("conditions", 0.99), ("clip_0.pt", "complete PyTorch file")),
    ("rotten video", rotten("latents"), ("latents/clip_0.pt", "checksum", "run the preprocessing again")),
    ("rotten audio", rotten("audio_latents"), ("audio_latents/clip_0.pt", "checksum")),
    ("rotten text", rotten("conditions"), ("conditions/clip_0.pt", "checksum")),
    ("a tensor", whole("latents", torch.zeros(3)), ("clip_0.pt", "a table of fields", "Tensor")),
    ("a list", whole("latents", [1, 2]), ("clip_0.pt", "a table of fields", "list")),
    ("an empty table", whole("latents", {}), ("clip_0.pt", "a sample's main field")),
    ("other fields", whole("latents", {"pixels": torch.zeros(3)}), ("clip_0.pt", "a sample's main field", "pixels")),
    ("a pickle that runs code", whole("latents", Touch()), ("clip_0.pt", "complete PyTorch file")),
    (
        "a pickle that runs code as a field",
        whole("latents", {"latents": Touch()}),
        ("clip_0.pt", "complete PyTorch file"),
    ),
    ("keys are numbers", whole("latents", {1: torch.zeros(3)}), ("clip_0.pt", "a sample's main field")),
    ("latents are a list", fields("latents", latents=[1.0]), ("clip_0.pt", "latents", "a tensor", "list")),
    ("latents are None", whole("latents", {"latents": None}), ("clip_0.pt", "latents", "a tensor")),
    (
        "latents are integers",
        fields("latents", latents=torch.zeros(128, 3, 2, 3, dtype=torch.int64)),
        ("latents", "floating-point"),
    ),
    (
        "latents are complex",
        fields("latents", latents=torch.zeros(128, 3, 2, 3, dtype=torch.complex64)),
        ("latents", "floating-point"),
    ),
    (
        "latents of 64 channels",
        fields("latents", latents=torch.zeros(64, 3, 2, 3)),
        ("latents", "[128, F', H', W']", "64"),
    ),
    (
        "latents of five dimensions",
        fields("latents", latents=torch.zeros(1, 128, 3, 2, 3)),
        ("latents", "for video", "[1, 128"),
    ),
    ("latents of one dimension", fields("latents", latents=torch.zeros(128)), ("latents", "for video")),
    (
        "latents empty",
        fields("latents", latents=torch.zeros(128, 0, 2, 3), num_frames=0),
        ("latents", "[128, 0, 2, 3]"),
    ),
    (
        "latents NaN",
        fields("latents", latents=latents(128, 3, 2, 3, value=NAN)),
        ("clip_0.pt", "latents", "finite values"),
    ),
    (
        "latents infinite",
        fields("latents", latents=latents(128, 3, 2, 3, value=INF)),
        ("clip_0.pt", "latents", "finite values"),
    ),
    ("num_frames wrong", fields("latents", num_frames=9), ("num_frames", "own size 3", "9")),
    ("height wrong", fields("latents", height=5), ("height", "own size 2", "5")),
    ("height text", fields("latents", height="2"), ("height", "an integer", "2")),
    ("width float", fields("latents", width=3.0), ("width", "an integer", "3.0")),
    ("num_frames bool", fields("latents", num_frames=True), ("num_frames", "an integer", "True")),
    ("fps 0", fields("latents", fps=0.0), ("fps", "a positive number", "0.0")),
    ("fps negative", fields("latents", fps=-24.0), ("fps", "a positive number", "-24.0")),
    ("fps NaN", fields("latents", fps=NAN), ("fps", "a positive number", "nan")),
    ("fps tiny", fields("latents", fps=1e-30), ("fps", "a positive number", "1e-30")),
    ("fps huge", fields("latents", fps=1e30), ("fps", "a positive number", "1e+30")),
    ("fps text", fields("latents", fps="24"), ("fps", "a number", "24")),
    ("present is a number", fields("latents", present=1), ("present", "true or false")),
    (
        "audio in the video folder",
        lambda root: shutil.copy(root / "audio_latents/clip_0.pt", root / "latents/clip_0.pt"),
        ("expected video, found audio", "folder's name"),
    ),
    (
        "text in the video folder",
        lambda root: shutil.copy(root / "conditions/clip_0.pt", root / "latents/clip_0.pt"),
        ("expected video, found text", "folder's name"),
    ),
    (
        "video in the text folder",
        lambda root: shutil.copy(root / "latents/clip_0.pt", root / "conditions/clip_0.pt"),
        ("expected text, found video", "folder's name"),
    ),
    ("audio of 4 channels", fields("audio_latents", latents=torch.zeros(4, 9, 16)), ("latents", "[8, T, 16]", "4")),
    ("audio of 8 bins", fields("audio_latents", latents=torch.zeros(8, 9, 8)), ("latents", "[8, T, 16]")),
    ("audio without steps", fields("audio_latents", latents=torch.zeros(8, 0, 16)), ("latents", "[8, T, 16]")),
    (
        "audio NaN",
        fields("audio_latents", latents=latents(8, 9, 16, value=NAN)),
        ("audio_latents/clip_0.pt", "finite values"),
    ),
    ("time steps wrong", fields("audio_latents", num_time_steps=99), ("num_time_steps", "own size 9")),
    ("duration NaN", fields("audio_latents", duration=NAN), ("duration", "a positive number", "nan")),
    ("duration negative", fields("audio_latents", duration=-1.0), ("duration", "a positive number", "-1.0")),
    ("duration 0", fields("audio_latents", duration=0), ("duration", "a positive number")),
    ("duration text", fields("audio_latents", duration="1 s"), ("duration", "a number", "1 s")),
    (
        "text features of another width",
        fields("conditions", video_prompt_embeds=torch.zeros(128, 77)),
        ("clip_0.pt", "expected width", "found 77", "process-captions"),
    ),
    (
        "audio features of another width",
        fields("conditions", audio_prompt_embeds=torch.zeros(128, 77)),
        ("clip_0.pt", "audio_prompt_embeds", "found 77"),
    ),
    (
        "text features of another length",
        fields(
            "conditions",
            video_prompt_embeds=torch.zeros(100, 128),
            audio_prompt_embeds=torch.zeros(100, 64),
            prompt_attention_mask=torch.ones(100, dtype=torch.int64),
        ),
        ("clip_0.pt", "100", "registers"),
    ),
    (
        "lengths of the streams differ",
        fields("conditions", audio_prompt_embeds=torch.zeros(64, 64)),
        ("audio_prompt_embeds", "as many tokens"),
    ),
    ("no mask", fields("conditions", prompt_attention_mask=None), ("prompt_attention_mask", "a tensor")),
    (
        "mask of another length",
        fields("conditions", prompt_attention_mask=torch.ones(5, dtype=torch.int64)),
        ("prompt_attention_mask", "one element per token"),
    ),
    (
        "mask of floats",
        fields("conditions", prompt_attention_mask=torch.ones(128)),
        ("prompt_attention_mask", "whole numbers"),
    ),
    ("mask of 2", fields("conditions", prompt_attention_mask=2 * MASK), ("prompt_attention_mask", "0 or 1")),
    (
        "features NaN",
        fields("conditions", video_prompt_embeds=latents(128, 128, value=NAN)),
        ("conditions/clip_0.pt", "finite values"),
    ),
    (
        "features of one dimension",
        fields("conditions", video_prompt_embeds=torch.zeros(128)),
        ("video_prompt_embeds", "[tokens, width]"),
    ),
    (
        "contexts of another width",
        whole("conditions", {"video_context": torch.zeros(128, 77), "audio_context": torch.zeros(128, 64)}),
        ("clip_0.pt", "expected width", "found 77"),
    ),
    ("no text anywhere", lambda root: shutil.rmtree(root / "conditions"), ("'conditions'", "found only")),
    (
        "empty folder",
        lambda root: [path.unlink() for path in (root / "latents").iterdir()],
        ("latents", "expected .pt files or shards"),
    ),
    (
        "no common names",
        lambda root: [path.rename(path.with_name("x" + path.name)) for path in list((root / "conditions").iterdir())],
        ("same relative path", "found none"),
    ),
    (
        "a folder called like a sample",
        lambda root: [
            (root / "latents/clip_0.pt").unlink(),
            (root / "latents/clip_0.pt").mkdir(),
            [p.unlink() for p in root.glob("*/clip_1.pt")],
        ],
        ("expected .pt files or shards",),
    ),
    (
        "a broken link",
        lambda root: [(root / "latents/clip_0.pt").unlink(), (root / "latents/clip_0.pt").symlink_to("/nope")],
        ("clip_0.pt", "link"),
    ),
    (
        "root is empty",
        lambda root: [shutil.rmtree(root / folder) for folder in FOLDERS],
        ("expected the folder", "found only []"),
    ),
)


@pytest.mark.parametrize("row", SAMPLES)
def test_a_malformed_sample_is_named_with_its_field(
    row, tmp_path, nano_path, two_samples, runner, read_only, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data"
    shutil.copytree(two_samples, root, ignore=shutil.ignore_patterns(".shapes.json"))
    row.change(root)
    check(runner.train(write_job(tmp_path, nano_path, root)), row)
    assert not (tmp_path / "owned").exists()


def in_shards(root: Path) -> Path:
    """Packs the latents of a dataset into one shard; returns its path."""
    path = shard_path(root / "latents", 0)
    files = sorted((root / "latents").glob("*.pt"))
    write_shard(path, {file.name: torch.load(file) for file in files})
    for file in files:
        file.unlink()
    return path


def shard_header(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the header of a shard."""

    def apply(path: Path) -> None:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return apply


def shard_numbers(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the metadata entry `samples` of a shard."""

    def apply(header: dict[str, Any]) -> None:
        numbers = json.loads(header["__metadata__"]["samples"])
        numbers = change(numbers) or numbers
        header["__metadata__"]["samples"] = json.dumps(numbers)

    return shard_header(apply)


def renamed(name: str) -> Change:
    """Renames the first sample of a shard, in its numbers and its tensors."""

    def change(header: dict[str, Any]) -> None:
        numbers = json.loads(header["__metadata__"]["samples"])
        numbers[name] = numbers.pop("clip_0.pt")
        header["__metadata__"]["samples"] = json.dumps(numbers)
        for key in [key for key in header if key.startswith("clip_0.pt/")]:
            header[key.replace("clip_0.pt", name)] = header.pop(key)

    return shard_header(change)


def flip_data(path: Path) -> None:
    """Inverts a byte of a shard's data."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 16
    path.write_bytes(content)


SHARD = "shard-00000.safetensors"
SHARDS = rows(
    ("empty", lambda path: path.write_bytes(b""), (SHARD, "expected a complete shard")),
    ("cut", lambda path: path.write_bytes(path.read_bytes()[:-4]), (SHARD, "expected a complete shard")),
    ("zeros", lambda path: path.write_bytes(bytes(1000)), (SHARD, "expected a complete shard")),
    ("rotten", flip_data, (SHARD, "checksum")),
    ("no metadata", lambda path: save_file(load_file(path), path), (SHARD, "samples")),
    (
        "samples are no JSON",
        shard_header(lambda h: h["__metadata__"].update(samples="{")),
        (SHARD, "expected a complete shard"),
    ),
    ("samples are a list", shard_numbers(lambda n: ["clip_0.pt"]), (SHARD, "expected a complete shard")),
    ("samples are numbers", shard_numbers(lambda n: {"clip_0.pt": 5}), (SHARD, "expected a complete shard")),
    ("sample without numbers", shard_numbers(lambda n: n.pop("clip_0.pt") and None), (SHARD, "clip_0.pt")),
    ("fps is text", shard_numbers(lambda n: n["clip_0.pt"].update(fps="24")), (SHARD, "fps", "a number")),
    ("fps changed", shard_numbers(lambda n: n["clip_0.pt"].update(fps=25.0)), (SHARD, "checksum")),
    ("name leads outside", renamed("../../../x.pt"), (SHARD, "below the folder", "../../../x.pt")),
    ("name absolute", renamed("/abs/x.pt"), (SHARD, "below the folder", "/abs/x.pt")),
    ("name with dots in the middle", renamed("a/../../x.pt"), (SHARD, "below the folder")),
    ("name empty", renamed(""), (SHARD, "below the folder")),
    (
        "dtype of a tensor",
        shard_header(lambda h: h["clip_0.pt/latents"].update(dtype="F32")),
        (SHARD, "expected a complete shard"),
    ),
)


@pytest.mark.parametrize("row", SHARDS)
def test_a_malformed_shard_is_named(row, tmp_path, nano_path, two_samples, runner, read_only):
    root = tmp_path / "data"
    shutil.copytree(two_samples, root, ignore=shutil.ignore_patterns(".shapes.json"))
    row.change(in_shards(root))
    check(runner.train(write_job(tmp_path, nano_path, root)), row)


@pytest.mark.parametrize("name", ["../../../x.pt", "/tmp/x.pt"])
def test_decode_latents_writes_nothing_outside_its_folder(name, tmp_path, nano_path, two_samples, runner):
    root = tmp_path / "a/b/data"
    shutil.copytree(two_samples, root, ignore=shutil.ignore_patterns(".shapes.json"))
    renamed(name)(in_shards(root))
    before = sorted(tmp_path.rglob("*"))
    outcome = runner.command("decode-latents", root, tmp_path / "a/b/out", "--model-path", nano_path, "--device", "cpu")
    assert outcome.code == 1
    assert "below the folder" in outcome.text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["pt", "shard"])
def test_every_flipped_bit_of_a_sample_is_found_or_changes_nothing(tmp_path, two_samples, kind):
    source = two_samples / "latents/clip_0.pt"
    path = tmp_path / "clip_0.pt"
    shutil.copy(source, path)
    if kind == "shard":
        path = shard_path(tmp_path, 0)
        write_shard(path, {"clip_0.pt": torch.load(source)})

    def read() -> dict[str, Any]:
        return read_sample(path, "video") if kind == "pt" else read_shard_sample(path, "clip_0.pt", "video")

    expected, content, rng, found = read(), path.read_bytes(), random.Random(3), 0
    for _ in range(100):
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            sample = read()
        except ValueError:
            found += 1
            continue
        assert sample.keys() == expected.keys()
        assert all(torch.equal(torch.as_tensor(sample[key]), torch.as_tensor(expected[key])) for key in expected)
    assert found > 70


def test_shards_without_checksums_still_read(tmp_path, two_samples):
    path = shard_path(tmp_path, 0)
    sample = torch.load(two_samples / "latents/clip_0.pt")
    write_shard(path, {"clip_0.pt": sample})
    shard_numbers(lambda numbers: numbers["clip_0.pt"].pop("crc32") and None)(path)
    assert torch.equal(read_shard(path)["clip_0.pt"]["latents"], sample["latents"])
