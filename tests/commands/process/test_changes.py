"""A second preparation makes again only samples whose clip, caption or settings changed."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ltx_titan.commands.process import changes as changes_module
from ltx_titan.commands.process import store as store_module
from ltx_titan.data import PrecomputedDataset
from ltx_titan.data.fingerprints import FingerprintFile
from ltx_titan.data.shards import list_shards, read_shard_sample
from ltx_titan.media import write_video
from tests.commands.process.helpers import load, run, write_rows
from tests.media.clips import tone

BUCKETS = "64x32x9"
COLORS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255))
SOURCES = {"latents": "video_latents", "conditions": "conditions"}
ROWS = {
    "a": {"caption": "a red wall", "reference_video": "edges.mp4", "video_mask": "mask.png", "audio_mask": "mask.pt"},
    "b": {"caption": "a green wall"},
    "c": {"caption": "a blue wall"},
}


def write_mask(path, color):
    image = Image.new("L", (64, 32), 255 - color)
    image.paste(color, (32, 0, 64, 32))
    image.save(path)


def table(folder, rows=ROWS, **changes):
    return write_rows(folder, [{"video": f"{name}.mp4", **row, **changes.get(name, {})} for name, row in rows.items()])


def without(name):
    return {key: row for key, row in ROWS.items() if key != name}


def names(folder):
    data = PrecomputedDataset(folder, SOURCES)
    return [data.name(i) for i in range(len(data))]


def times(folder):
    """Time of every sample file, by path below the root."""
    root = folder / ".precomputed"
    return {path.relative_to(root).as_posix(): path.stat().st_mtime_ns for path in root.rglob("*.pt")}


def made_again(folder, before):
    return {name for name, time in times(folder).items() if before.get(name) != time}


@pytest.fixture(scope="module")
def once(nano, tmp_path_factory):
    """Three clips, one of them with a reference and masks, prepared."""
    folder = tmp_path_factory.mktemp("once")
    for i, name in enumerate((*ROWS, "edges")):
        # Distinct images and tones.
        frames = torch.tensor(COLORS[i], dtype=torch.uint8).expand(9, 32, 64, 3).contiguous()
        write_video(folder / f"{name}.mp4", frames, 25, tone(9 / 25, 16000, hertz=200 * (i + 1)), 16000)
    write_mask(folder / "mask.png", 255)
    torch.save(torch.tensor([1.0, 0.0]), folder / "mask.pt")
    run(nano, table(folder), BUCKETS)
    for source, key in (("latents", "latents"), ("audio_latents", "latents"), ("conditions", "video_prompt_embeds")):
        assert not torch.equal(*(load(folder, source, name)[key] for name in ("b.pt", "c.pt")))
    return folder


@pytest.fixture
def prepared(once, tmp_path):
    """A copy with the same times."""
    return Path(shutil.copytree(once, tmp_path / "copy"))


def test_edited_caption_replaced_clip_and_removed_row(prepared, nano):
    before = times(prepared)
    shutil.copy(prepared / "c.mp4", prepared / "b.mp4")
    path = table(prepared, without("c"), a={"caption": "a green wall"})
    report, printed = run(nano, path, BUCKETS)
    assert made_again(prepared, before) == {"conditions/a.pt", "latents/b.pt", "audio_latents/b.pt"}
    text = [load(prepared, "conditions", name)["video_prompt_embeds"] for name in ("a.pt", "b.pt")]
    assert torch.equal(*text)
    for source in ("latents", "audio_latents"):
        assert torch.equal(*(load(prepared, source, name)["latents"] for name in ("b.pt", "c.pt")))
    assert report.counts["videos"] == {"skipped": 1, "done": 1}
    assert "captions: caption changed since, made again: 1 (a.mp4)" in printed
    assert "videos: video changed since, made again: 1 (b.mp4)" in printed
    assert "no longer in dataset.jsonl, kept out of training (--prune removes them): 1 (c.pt)" in printed
    assert names(prepared) == ["a.pt", "b.pt"]
    report, printed = run(nano, path, BUCKETS)
    assert all(counts["done"] == 0 for counts in report.counts.values())
    assert "made again" not in printed


def test_replaced_clip_remakes_what_belongs_to_it(prepared, nano):
    before = times(prepared)
    shutil.copy(prepared / "b.mp4", prepared / "a.mp4")
    run(nano, table(prepared), BUCKETS)
    folders = ("latents", "audio_latents", "reference_latents", "video_masks", "audio_masks")
    assert made_again(prepared, before) == {f"{folder}/a.pt" for folder in folders}
    assert torch.equal(*(load(prepared, "latents", name)["latents"] for name in ("a.pt", "b.pt")))


def test_edited_masks_and_replaced_reference(prepared, nano):
    before = times(prepared)
    old = load(prepared, "video_masks", "a.pt")["mask"]
    write_mask(prepared / "mask.png", 0)
    torch.save(torch.tensor([0.0, 1.0]), prepared / "mask.pt")
    shutil.copy(prepared / "b.mp4", prepared / "edges.mp4")
    _, printed = run(nano, table(prepared), BUCKETS)
    assert made_again(prepared, before) == {"reference_latents/a.pt", "video_masks/a.pt", "audio_masks/a.pt"}
    assert torch.equal(load(prepared, "video_masks", "a.pt")["mask"], 1 - old)
    assert load(prepared, "audio_masks", "a.pt")["mask"][0] == 0
    reference, target = load(prepared, "reference_latents", "a.pt"), load(prepared, "latents", "b.pt")
    assert torch.equal(reference["latents"], target["latents"])
    assert "audio masks: audio mask changed since, made again: 1 (a.mp4)" in printed


def test_row_that_no_longer_names_a_mask(prepared, nano):
    rows = {**ROWS, "a": {"caption": "a red wall", "reference_video": "edges.mp4", "video_mask": "mask.png"}}
    _, printed = run(nano, table(prepared, rows), BUCKETS)
    assert "audio_masks: no longer in dataset.jsonl, kept out of training (--prune removes them): 1 (a.pt)" in printed
    with pytest.raises(ValueError, match="1 that are kept out"):
        PrecomputedDataset(prepared, {**SOURCES, "audio_masks": "audio_masks"})
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]


def test_touched_files_are_compared_by_content_once(prepared, nano, monkeypatch):
    before = times(prepared)
    for path in prepared.glob("*.mp4"):
        os.utime(path, ns=(1, 1))
    _, printed = run(nano, table(prepared), BUCKETS)
    assert made_again(prepared, before) == set()
    assert "files with another time or name and the same content, kept" in printed

    def refuse(*_):
        raise AssertionError("read again, although its time is recorded")

    monkeypatch.setattr(changes_module, "digest_of", refuse)
    run(nano, table(prepared), BUCKETS)
    assert made_again(prepared, before) == set()


def test_prune_lists_then_removes_and_a_row_that_returns_is_kept(prepared, nano):
    before = times(prepared)
    run(nano, table(prepared, without("b")), BUCKETS)
    # The row returns: its samples are as good as before.
    run(nano, table(prepared), BUCKETS)
    assert made_again(prepared, before) == set()
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]
    path = table(prepared, without("c"))
    _, printed = run(nano, path, BUCKETS, prune=True, dry_run=True)
    assert printed.count("would be removed: ") == 3
    assert f"would be removed: {prepared / '.precomputed/latents/c.pt'}" in printed
    assert times(prepared) == before
    run(nano, path, BUCKETS, prune=True)
    assert before.keys() - times(prepared).keys() == {f"{s}/c.pt" for s in ("latents", "audio_latents", "conditions")}
    entries = FingerprintFile(prepared / ".precomputed" / "latents").entries
    assert sorted(entries) == ["a.pt", "b.pt"]


def test_other_buckets_are_refused_or_made_again(prepared, nano):
    before = times(prepared)
    with pytest.raises(ValueError, match=r"prepared with resolution_buckets = \['64x32x9'\].*3 of 3.*a.pt"):
        run(nano, table(prepared), "32x32x9")
    assert times(prepared) == before
    report, _ = run(nano, table(prepared), "32x32x9", overwrite_changed=True)
    assert load(prepared, "latents", "a.pt")["latents"].shape == (128, 2, 1, 1)
    assert load(prepared, "video_masks", "a.pt")["mask"].shape == (2, 1, 1)
    assert report.counts["captions"] == {"skipped": 3}


def test_killed_between_sample_and_fingerprint(prepared, nano, monkeypatch):
    shutil.copy(prepared / "c.mp4", prepared / "b.mp4")
    old = (prepared / "a.mp4").read_bytes(), (prepared / "a.mp4").stat()
    shutil.copy(prepared / "c.mp4", prepared / "a.mp4")
    write = store_module.write_sample

    def write_and_die(path, fields):
        write(path, fields)
        if Path(path).parent.name == "latents":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_sample", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(nano, table(prepared), BUCKETS)
    # Neither the sample that was written nor the one that was not reached is trained on.
    assert names(prepared) == ["c.pt"]
    # The old clip returns with its old time: the latents on disk are not its own.
    (prepared / "a.mp4").write_bytes(old[0])
    os.utime(prepared / "a.mp4", ns=(old[1].st_atime_ns, old[1].st_mtime_ns))
    report, _ = run(nano, table(prepared), BUCKETS)
    assert report.counts["videos"] == {"skipped": 1, "done": 2}
    assert not torch.equal(*(load(prepared, "latents", name)["latents"] for name in ("a.pt", "c.pt")))
    assert torch.equal(*(load(prepared, "latents", name)["latents"] for name in ("b.pt", "c.pt")))
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]


def test_clip_replaced_by_an_unreadable_file_leaves_training(prepared, nano):
    (prepared / "b.mp4").write_bytes(b"half a download")
    report, printed = run(nano, table(prepared), BUCKETS)
    assert report.counts["videos"] == {"skipped": 2, "failed": 1}
    assert names(prepared) == ["a.pt", "c.pt"]


def test_deleted_clips_keep_their_samples(prepared, nano):
    before = times(prepared)
    for path in prepared.glob("*.mp4"):
        path.unlink()
    run(nano, table(prepared), BUCKETS)
    assert times(prepared) == before
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]


def test_samples_of_earlier_versions_are_adopted(prepared, nano):
    before = times(prepared)
    for path in prepared.rglob("fingerprints.jsonl"):
        path.unlink()
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]
    _, printed = run(nano, table(prepared), BUCKETS)
    assert made_again(prepared, before) == set()
    assert "latents: made before fingerprints were recorded, kept: 3 (a.mp4, b.mp4, c.mp4)" in printed
    _, printed = run(nano, table(prepared, b={"caption": "a red wall"}), BUCKETS)
    assert made_again(prepared, before) == {"conditions/b.pt"}
    assert "before fingerprints" not in printed


def test_training_names_what_changed_since(prepared, caplog):
    shutil.copy(prepared / "c.mp4", prepared / "b.mp4")
    os.utime(prepared / "c.mp4", ns=(1, 1))
    table(prepared, without("c"), a={"caption": "other"})
    with caplog.at_level(logging.WARNING):
        assert names(prepared) == ["a.pt", "b.pt", "c.pt"]
    assert "1 samples whose row was removed from dataset.jsonl since (c.pt); run process-dataset again" in caplog.text
    assert "1 samples whose caption in dataset.jsonl changed since (a.pt)" in caplog.text
    # Touched, but the same: c is not named.
    assert "1 samples whose files changed since (b.pt)" in caplog.text


def test_two_tables_in_one_root(prepared, nano):
    path = prepared / "other.jsonl"
    table(prepared, {"a": ROWS["a"]}).rename(path)
    table(prepared, without("a"))
    run(nano, path, BUCKETS)
    run(nano, prepared / "dataset.jsonl", BUCKETS)
    assert names(prepared) == ["a.pt", "b.pt", "c.pt"]
    # Renamed: no table has the row of a any more.
    path.unlink()
    run(nano, prepared / "dataset.jsonl", BUCKETS)
    assert names(prepared) == ["b.pt", "c.pt"]


def test_shards(once, nano, tmp_path):
    folder = Path(shutil.copytree(once, tmp_path / "copy", ignore=shutil.ignore_patterns(".precomputed")))
    options = {"shard_size": 2}
    run(nano, table(folder), BUCKETS, **options)
    shutil.copy(folder / "c.mp4", folder / "a.mp4")
    path = table(folder, without("b"))
    report, _ = run(nano, path, BUCKETS, **options)
    assert report.counts["videos"] == {"skipped": 1, "done": 1}
    shards = list_shards(folder / ".precomputed" / "latents")
    new, other = read_shard_sample(shards[0], "a.pt"), read_shard_sample(shards[1], "c.pt")
    assert torch.equal(new["latents"], other["latents"])
    assert names(folder) == ["a.pt", "c.pt"]
    run(nano, path, BUCKETS, prune=True, **options)
    with pytest.raises(ValueError, match="the sample 'b\\.pt'"):
        read_shard_sample(shards[0], "b.pt")
    assert names(folder) == ["a.pt", "c.pt"]


def test_models_of_two_tables_in_one_root_must_agree(prepared, nano, tmp_path, caplog):
    other = Path(shutil.copytree(nano.parent / "text_encoder", tmp_path / "text_encoder"))
    weights = next(other.glob("*.safetensors"))
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    path = prepared / "other.jsonl"
    table(prepared, {"d": {"caption": "new"}}).rename(path)
    table(prepared)
    shutil.copy(prepared / "c.mp4", prepared / "d.mp4")
    options = {"text_encoder_path": other}
    with pytest.raises(ValueError, match=r"conditions: has 3 samples of another table .*a\.pt.* text_encoder_digest"):
        run(nano, path, BUCKETS, **options)
    run(nano, path, BUCKETS, overwrite_changed=True, **options)
    with caplog.at_level(logging.WARNING):
        assert names(prepared) == ["a.pt", "b.pt", "c.pt", "d.pt"]
    assert "1 samples of conditions made with another text encoder than most (d.pt)" in caplog.text
    caplog.clear()
    run(nano, prepared / "dataset.jsonl", BUCKETS, overwrite_changed=True, **options)
    assert names(prepared) == ["a.pt", "b.pt", "c.pt", "d.pt"]
    assert "text encoder" not in caplog.text
