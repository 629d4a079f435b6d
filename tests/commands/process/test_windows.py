"""Several windows of a long clip become samples, each as if the clip had been cut to it."""

import logging
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch

from ltx_titan.commands.inspection.inspect_data import InspectOptions, inspect_data
from ltx_titan.commands.process import stages
from ltx_titan.commands.process.windows import with_windows
from ltx_titan.data import PrecomputedDataset
from ltx_titan.data.layout import read_sample
from ltx_titan.data.shards import list_shards
from ltx_titan.encode.buckets import Bucket
from ltx_titan.encode.captions import encode_caption
from ltx_titan.encode.clips import ClipRules
from ltx_titan.encode.windows import FIRST_WINDOW, frames_used, parse_windows
from ltx_titan.media import Audio, write_wav
from ltx_titan.tables.samples import read_sample_table
from tests.commands.process.helpers import run, write_rows
from tests.data.test_layout import assert_equal_fields

BUCKETS, LENGTH, FPS, RATE = "64x32x17", 17, 25, 16000
# 56 frames hold three windows of 17, and 5 frames more.
KEYS = {0: "long.pt", 17: "long.w000017.pt", 34: "long.w000034.pt"}
SOURCES = {"latents": "video_latents", "audio_latents": "audio_latents", "conditions": "conditions"}


def write_lossless(path, frames, audio=None):
    """Writes frames [F, H, W, 3] and mono audio [N] without loss, so that a cut file equals a part of the whole."""
    with av.open(str(path), "w", format="matroska") as container:
        video = container.add_stream("ffv1", rate=FPS)
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono") if audio is not None else None
        for pixels in frames.numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode())
        if track is not None:
            samples = av.AudioFrame.from_ndarray(audio[None].numpy(), format="s16", layout="mono")
            samples.sample_rate, samples.time_base, samples.pts = RATE, Fraction(1, RATE), 0
            container.mux(track.encode(samples))
            container.mux(track.encode())


def write_whole_and_cuts(folder, stem, frames, audio=None):
    """Writes a video, and its windows as videos."""
    write_lossless(folder / f"{stem}.mkv", frames, audio)
    for start in KEYS:
        first = start * RATE // FPS
        cut = None if audio is None else audio[first : first + LENGTH * RATE // FPS]
        write_lossless(folder / f"{stem}_{start}.mkv", frames[start : start + LENGTH], cut)


def row(start=None, **more):
    suffix = "" if start is None else f"_{start}"
    files = {"video": "long", "reference_video": "edges", "video_mask": "mask"}
    return {column: f"{stem}{suffix}.mkv" for column, stem in files.items()} | {"caption": "a storm", **more}


@pytest.fixture(scope="module")
def once(nano, tmp_path_factory):
    """A long clip of noise with reference and mask: prepared in windows, and cut by hand in the root `cut`."""
    folder = tmp_path_factory.mktemp("windows")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 56, 32, 64, 3), generator=generator, dtype=torch.uint8)
    audio = torch.randint(-9000, 9000, (56 * RATE // FPS,), generator=generator).to(torch.int16)
    write_whole_and_cuts(folder, "long", noise[0], audio)
    write_whole_and_cuts(folder, "edges", noise[1])
    # White from the left to a column that moves on, so that each window has another mask.
    mask = (torch.arange(64) < torch.arange(56)[:, None] + 4).to(torch.uint8) * 255
    write_whole_and_cuts(folder, "mask", mask[:, None, :, None].expand(-1, 32, -1, 3).contiguous())
    write_rows(folder, [row(start) for start in KEYS]).rename(folder / "cut.jsonl")
    run(nano, folder / "cut.jsonl", BUCKETS, output_dir=folder / "cut")
    report, printed = run(nano, write_rows(folder, [row()]), BUCKETS, windows="all")
    assert report.counts["videos"] == report.counts["captions"] == {"done": 3}
    assert "samples that start later in their video (--windows): 2 (long.w000017.pt, long.w000034.pt)" in printed
    assert "more than a third is after the frames used" not in printed
    return folder


@pytest.fixture
def prepared(once, tmp_path):
    return Path(shutil.copytree(once, tmp_path / "copy"))


def stored(folder, source="latents"):
    return sorted(path.name for path in (folder / ".precomputed" / source).glob("*.pt"))


def times(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / ".precomputed").rglob("*.pt")}


def test_windows_equal_clips_cut_to_them(once):
    sources = (*SOURCES, "reference_latents", "video_masks")
    samples = {}
    for source in sources:
        assert stored(once, source) == list(KEYS.values())
        for start, key in KEYS.items():
            samples[source, start] = read_sample(once / ".precomputed" / source / key)
            assert_equal_fields(samples[source, start], read_sample(once / "cut" / source / f"long_{start}.pt"))
    for source in ("latents", "audio_latents", "reference_latents"):
        assert not torch.equal(samples[source, 0]["latents"], samples[source, 17]["latents"])
    assert not torch.equal(samples["video_masks", 0]["mask"], samples["video_masks", 34]["mask"])


def test_separate_audio_and_audio_references_take_the_window(once, nano, tmp_path):
    generator = torch.Generator().manual_seed(1)
    # The reference ends within the last window.
    waves = {"audio": torch.rand(1, 56 * RATE // FPS, generator=generator) - 0.5}
    waves["voice"] = waves["audio"].flip(1)[:, : 40 * RATE // FPS].contiguous()
    for name, wave in waves.items():
        write_wav(tmp_path / f"{name}.wav", Audio(wave, RATE))
        for start in KEYS:
            first = start * RATE // FPS
            write_wav(tmp_path / f"{name}_{start}.wav", Audio(wave[:, first : first + LENGTH * RATE // FPS], RATE))
    whole = {"video": str(once / "long.mkv"), "audio": "audio.wav", "reference_audio": "voice.wav"}
    run(nano, write_rows(tmp_path, [whole]), BUCKETS, captions=False, windows="2")
    for start in (0, 34):
        link = tmp_path / Path("long.mkv").with_stem(f"cut_{start}")
        shutil.copy(once / f"long_{start}.mkv", link)
    cuts = [{"video": f"cut_{s}.mkv", "audio": f"audio_{s}.wav", "reference_audio": f"voice_{s}.wav"} for s in (0, 34)]
    run(nano, write_rows(tmp_path, cuts), BUCKETS, captions=False, output_dir=tmp_path / "cut")
    for source in ("latents", "audio_latents", "reference_audio_latents"):
        base = (tmp_path / ".precomputed" / source) / once.relative_to("/")
        assert sorted(path.name for path in base.iterdir()) == [KEYS[0], KEYS[34]]
        for start in (0, 34):
            assert_equal_fields(
                read_sample(base / KEYS[start]), read_sample(tmp_path / "cut" / source / f"cut_{start}.pt")
            )


def test_second_run_makes_nothing_and_another_choice_makes_what_is_new(prepared, nano, caplog):
    table, before = prepared / "dataset.jsonl", times(prepared)
    report, _ = run(nano, table, BUCKETS, windows="all")
    assert report.counts["videos"] == report.counts["captions"] == {"skipped": 3}
    # The first and the last one.
    report, printed = run(nano, table, BUCKETS, windows="2")
    assert report.counts["videos"] == {"skipped": 2}
    assert "no longer in dataset.jsonl or its windows, kept out of training (--prune removes them): 1" in printed
    with caplog.at_level(logging.WARNING):
        data = PrecomputedDataset(prepared / ".precomputed", SOURCES)
    assert [data.name(i) for i in range(len(data))] == [KEYS[0], KEYS[34]]
    assert "row was removed" not in caplog.text
    assert times(prepared) == before
    report, _ = run(nano, table, BUCKETS, windows="all", window_stride="0.68s", dry_run=True)
    assert report.counts["videos"] == {"skipped": 3}
    report, _ = run(nano, table, BUCKETS, windows="all", window_stride="13", dry_run=True)
    assert report.counts["videos"] == {"skipped": 1, "done": 3}


def test_edited_caption_replaced_and_deleted_clip(prepared, nano, monkeypatch):
    encoded = []

    def encode_and_count(caption, models):
        encoded.append(caption)
        return encode_caption(caption, models)

    monkeypatch.setattr(stages, "encode_caption", encode_and_count)
    # Media are not opened: the stored windows are those that need a caption.
    report, _ = run(nano, write_rows(prepared, [row(caption="calm")]), BUCKETS, media=False)
    assert report.counts["captions"] == {"done": 3}
    assert encoded == ["calm"]
    shutil.copy(prepared / "edges.mkv", prepared / "long.mkv")
    report, printed = run(nano, prepared / "dataset.jsonl", BUCKETS, windows="all")
    assert report.counts["videos"] == report.counts["video masks"] == {"done": 3}
    assert "made again: 3 (long.mkv, long.mkv from frame 17, long.mkv from frame 34)" in printed
    assert report.counts["captions"] == {"skipped": 3}
    (prepared / "long.mkv").unlink()
    report, _ = run(nano, prepared / "dataset.jsonl", BUCKETS, windows="all")
    assert report.counts["videos"] == {"skipped": 3}
    assert not report.failures


def test_shards_hold_the_same_samples(once, nano, tmp_path):
    options = {"shard_size": 2, "output_dir": tmp_path / "shards", "captions": False}
    run(nano, once / "dataset.jsonl", BUCKETS, windows="all", **options)
    assert len(list_shards(tmp_path / "shards" / "latents")) == 2
    sources = {source: SOURCES.get(source, source) for source in ("latents", "audio_latents", "video_masks")}
    files, shards = (PrecomputedDataset(root, sources) for root in (once / ".precomputed", tmp_path / "shards"))
    assert files.fingerprint == shards.fingerprint
    for i in range(3):
        one, other = files.load(i), shards.load(i)
        for source in one:
            assert_equal_fields(one[source], other[source])


def test_two_processes_choose_the_windows_of_one(once):
    table = read_sample_table(once / "dataset.jsonl")
    table = replace(table, samples=(*table.samples, *read_sample_table(once / "cut.jsonl").samples))
    rules = ClipRules([Bucket(64, 32, 9)], (8, 32, 32), windows=parse_windows("random", None))
    shares = []

    def gather(share):
        shares.append(share)
        return shares

    # The second one has received both shares.
    *_, found = (with_windows(table, rules, once, SimpleNamespace(rank=i, world_size=2, gather=gather)) for i in (0, 1))
    assert [row.row for row in found.samples] == [1, 1, 2, 3]
    assert len({row.start for row in found.samples}) > 1
    alone = SimpleNamespace(rank=0, world_size=1, gather=lambda share: [share])
    assert found == with_windows(table, rules, once, alone)


def test_inspect_counts_windows(once, console):
    inspect_data(InspectOptions(once / ".precomputed", no_sheet=True), console)
    assert "3 complete samples of 3" in console.file.getvalue()


def test_short_clips_and_clips_named_as_a_window(once, nano, tmp_path):
    for name in ("long.mkv", "long_0.mkv"):
        shutil.copy(once / name, tmp_path / name)
    shutil.copy(once / "long_17.mkv", tmp_path / "long.w000017.mkv")
    rows = [{"video": name, "caption": ""} for name in ("long.mkv", "long.w000017.mkv", "long_0.mkv")]
    table = write_rows(tmp_path, rows)
    report, _ = run(nano, table, BUCKETS, windows="all", captions=False, dry_run=True)
    # Windows 0 and 34 of the long clip, and the two short ones; the window of that name is refused, not overwritten.
    assert report.counts["videos"] == {"done": 4}
    [(_, item, reason)] = report.failures
    assert item.endswith("long.mkv from frame 17")
    assert "long.w000017.pt has the name of another row's; rename one" in reason
    report, _ = run(nano, table, "64x32x25", windows="all", captions=False, dry_run=True)
    assert [reason for *_, reason in report.failures] == [
        "has 17 frame(s), the shortest bucket needs 25; add a shorter bucket"
    ] * 2


@pytest.mark.parametrize(
    ("windows", "stride", "message"),
    [
        ("0", None, "--windows = '0': expected all, random, or a number of 1 or more"),
        ("some", None, "--windows = 'some'"),
        ("all", "0", "--window-stride = '0': expected frames, as 48, or seconds, as 2.5s, above 0"),
        ("all", "-3", "--window-stride = '-3'"),
        ("1", "8", "--window-stride = '8': a single window from the start has none; add --windows"),
    ],
)
def test_wrong_options(windows, stride, message):
    with pytest.raises(ValueError, match=message):
        parse_windows(windows, stride)


def test_windows_need_videos_and_no_audio_masks(nano, tmp_path):
    with pytest.raises(ValueError, match=r"--windows all: .* has no column of videos"):
        run(nano, write_rows(tmp_path, [{"audio": "a.wav"}]), captions=False, windows="all")
    with pytest.raises(ValueError, match=r"--windows 2: .* has a column 'audio_mask'"):
        run(nano, write_rows(tmp_path, [{"video": "a.mp4", "audio_mask": "m.pt"}]), captions=False, windows="2")


def test_starts():
    def starts(windows, stride=None, frames=100, length=17, key="a.pt"):
        return parse_windows(windows, stride).starts(frames, length, Fraction(24000, 1001), Path(key))

    assert parse_windows("1", None) == FIRST_WINDOW
    assert starts("1") == [0]
    assert starts("all") == [0, 17, 34, 51, 68]
    assert starts("3") == [0, 34, 68]
    assert starts("9") == starts("all")
    assert starts("all", "40") == [0, 40, 80]
    assert starts("all", "1s") == [0, 24, 48, 72]
    assert starts("2", "8") == [0, 80]
    # A still image, and a clip as long as its bucket.
    assert starts("all", frames=1, length=1) == starts("random", frames=17) == [0]
    several = {starts("random", key=f"{i}.pt")[0] for i in range(40)}
    assert len(several) > 20
    assert several <= set(range(84))
    assert starts("random") == starts("random")
    assert starts("random", "83")[0] in (0, 83)
    assert frames_used([0, 17, 34], 17) == 51
    assert frames_used([0, 8, 40], 17) == 25 + 17
