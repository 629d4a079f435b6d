import json
import multiprocessing
import os
import signal
from fractions import Fraction

import numpy as np
import pytest
import torch

from ltx_titan.cli import main
from ltx_titan.commands import split_scenes as command
from ltx_titan.commands.scenes import Detection, arrange, parse_time
from ltx_titan.commands.split_scenes import SplitOptions, split_scenes
from ltx_titan.media import iter_frames, probe_video, read_audio, write_video
from tests.media.clips import tone, write_clip

FPS = Fraction(30000, 1001)
_COLORS = ((200, 40, 40), (40, 180, 60), (50, 60, 220))
_HERTZ = (440.0, 880.0, 1320.0)
_LENGTHS = (30, 45, 24)


def write_film(path, with_audio=True):
    """Three scenes of one color and one tone each, with a moving bar; the bar encodes the frame number."""
    frames = []
    for color, length in zip(_COLORS, _LENGTHS, strict=True):
        for index in range(length):
            frame = torch.tensor(color, dtype=torch.uint8).expand(48, 64, 3).clone()
            frame[:, index : index + 4] = 255
            frames.append(frame)
    parts = [tone(float(n / FPS), 48000, 2, hertz) for n, hertz in zip(_LENGTHS, _HERTZ, strict=True)]
    audio = torch.cat(parts, dim=1) if with_audio else None
    write_video(path, torch.stack(frames), FPS, audio, 48000 if with_audio else None)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    write_film(folder / "fílm ☃.mp4")
    (folder / "sub").mkdir()
    write_film(folder / "sub" / "silent.mp4", with_audio=False)
    (folder / "zero.mp4").touch()
    (folder / "text.mkv").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def cut(films, tmp_path_factory):
    """All films cut once."""
    out = tmp_path_factory.mktemp("cut")
    options = SplitOptions(films, out, recursive=True, save_images=1, stats=True)
    return out, options, split_scenes(options)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "scenes.jsonl").read_text(encoding="utf-8").splitlines()]


def hertz_of(path):
    with_audio = read_audio(path)
    middle = with_audio.waveform[0, 4800 : 4800 + 24000]
    return float(torch.fft.rfft(middle).abs().argmax()) * 2


def test_clips_are_cut_to_the_frame_with_their_audio(cut):
    out, _, report = cut
    assert [(row["video"], row["frames"]) for row in rows_of(out)] == [
        ("fílm ☃-scene-001.mp4", 30),
        ("fílm ☃-scene-002.mp4", 45),
        ("fílm ☃-scene-003.mp4", 24),
        ("sub/silent-scene-001.mp4", 30),
        ("sub/silent-scene-002.mp4", 45),
        ("sub/silent-scene-003.mp4", 24),
    ]
    for row, color, hertz in zip(rows_of(out), _COLORS, _HERTZ, strict=False):
        path = out / row["video"]
        assert probe_video(path).fps == FPS
        frames = list(iter_frames(path))
        assert len(frames) == row["frames"]
        # The position of the bar is the frame number.
        for index in (0, row["frames"] - 1):
            bar = torch.from_numpy(frames[index].copy()).float().mean((0, 2)).argmax()
            assert index <= bar < index + 4
            assert (
                abs(torch.from_numpy(frames[index][:, -4:].copy()).float().mean((0, 1)) - torch.tensor(color)).max()
                < 12
            )
        assert hertz_of(path) == pytest.approx(hertz, abs=4)
        assert read_audio(path).duration_s == pytest.approx(row["frames"] / float(FPS), abs=0.05)
    assert report.notes["clips without audio"] == 3
    assert (out / "images" / "fílm ☃-scene-002-1.png").is_file()
    assert "content_val" in (out / "fílm ☃.stats.csv").read_text()


def test_bad_videos_are_named(cut):
    _, _, report = cut
    assert report.counts["split"] == {"done": 6, "failed": 2}
    reasons = {item.rsplit("/", 1)[-1]: reason for _, item, reason in report.failures}
    assert "0 bytes" in reasons["zero.mp4"]
    assert "not a readable media file" in reasons["text.mkv"]


def content(path):
    """Frames and audio of a clip. Not its bytes: with AVX-512, x264 writes other bits now and then."""
    return torch.from_numpy(np.stack(list(iter_frames(path)))).float(), read_audio(path)


def assert_same(one, two):
    (frames, audio), (other_frames, other_audio) = one, two
    assert frames.shape == other_frames.shape
    assert (frames - other_frames).abs().mean() < 0.5  # of 255
    assert (audio is None) == (other_audio is None)
    assert audio is None or audio.waveform.equal(other_audio.waveform)


def test_a_second_run_cuts_missing_clips_alike(cut, console):
    out, options, _ = cut
    lost = out / "fílm ☃-scene-002.mp4"
    before, table = content(lost), (out / "scenes.jsonl").read_bytes()
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4") if path != lost}
    lost.unlink()
    report = split_scenes(options, console)
    assert report.counts["split"] == {"done": 1, "skipped": 5, "failed": 2}
    assert_same(content(lost), before)
    assert (out / "scenes.jsonl").read_bytes() == table
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_film_whose_name_is_not_utf_8_is_cut(films, tmp_path, console):
    folder = tmp_path / "films"
    folder.mkdir()
    name = os.fsdecode(b"caf\xe9")
    (folder / f"{name}.mp4").symlink_to(films / "fílm ☃.mp4")
    for outcome in ("done", "skipped"):
        report = split_scenes(SplitOptions(folder, tmp_path / "clips"), console)
        assert report.counts["split"] == {outcome: 3}, report.failures
    assert [row["video"] for row in rows_of(tmp_path / "clips")] == [f"{name}-scene-00{n}.mp4" for n in (1, 2, 3)]


def test_other_options_do_not_mix_with_existing_clips(cut, films, console):
    out, _, _ = cut
    film = films / "fílm ☃.mp4"
    report = split_scenes(SplitOptions(film, out, max_length="20"), console)
    assert "was split with other options" in report.failures[0][2]
    assert len(list(out.glob("fílm*.mp4"))) == 3


def test_a_film_that_was_replaced_is_not_blamed_on_the_options(films, tmp_path, console):
    film = tmp_path / "film.mp4"
    film.write_bytes((films / "fílm ☃.mp4").read_bytes())
    options = SplitOptions(film, tmp_path / "clips")
    split_scenes(options, console)
    film.write_bytes((films / "sub" / "silent.mp4").read_bytes())
    (failure,) = split_scenes(options, console).failures
    assert "is not the file that was split before" in failure[2]
    assert len(rows_of(tmp_path / "clips")) == 3


def test_long_scenes_are_cut_short_ones_skipped_and_overwritten(films, tmp_path, console):
    film = films / "fílm ☃.mp4"
    split_scenes(SplitOptions(film, tmp_path), console)
    options = SplitOptions(film, tmp_path, filter_shorter_than="0.9s", max_length="00:00:00.8", trim=1, overwrite=True)
    report = split_scenes(options, console)
    # 30, 45 and 24 frames, less one at either end; shortest 27, longest 24.
    assert [row["frames"] for row in rows_of(tmp_path)] == [14, 14, 21, 22]
    assert report.notes["short scenes skipped"] == 1
    assert len(list(tmp_path.glob("*.mp4"))) == 4


@pytest.mark.parametrize("detector", ["adaptive", "histogram"])
def test_other_detectors_find_hard_cuts(films, tmp_path, console, detector):
    detection = Detection(detector, threshold=0.05 if detector == "histogram" else None)
    report = split_scenes(SplitOptions(films / "fílm ☃.mp4", tmp_path, detection, dry_run=True), console)
    assert report.notes["clips that would be cut"] == 3
    assert "30 frames -> " in console.file.getvalue()
    assert not list(tmp_path.iterdir())


def test_fades_and_part_of_a_video(films, tmp_path, console):
    frames = torch.full((60, 48, 64, 3), 120, dtype=torch.uint8)
    frames[25:35] = 0
    write_video(tmp_path / "fade.mp4", frames, 25)
    for fade_bias, first in ((-1.0, 25), (1.0, 35)):
        detection = Detection("threshold", fade_bias=fade_bias)
        split_scenes(SplitOptions(tmp_path / "fade.mp4", tmp_path / str(first), detection), console)
        assert [row["frames"] for row in rows_of(tmp_path / str(first))] == [first, 60 - first]
    detection = Detection(start="10", end="70", max_scenes=1)
    split_scenes(SplitOptions(films / "fílm ☃.mp4", tmp_path / "part", detection), console)
    (row,) = rows_of(tmp_path / "part")
    assert (row["frames"], row["start_s"]) == (20, pytest.approx(10 / float(FPS), abs=1e-3))


def _die_at_the_second_clip(films, out):
    writer = command.video_writer

    def dying(path, *arguments, **options):
        if "002" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        return writer(path, *arguments, **options)

    command.video_writer = dying
    split_scenes(SplitOptions(films, out, recursive=True))


def test_a_killed_run_resumes_to_the_same_clips(films, cut, tmp_path, console):
    out, _, _ = cut
    process = multiprocessing.get_context("fork").Process(target=_die_at_the_second_clip, args=(films, tmp_path))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*.mp4"))) == 1
    report = split_scenes(SplitOptions(films, tmp_path, recursive=True), console)
    assert report.counts["split"] == {"done": 5, "skipped": 1, "failed": 2}
    for path in sorted(out.rglob("*.mp4")):
        assert_same(content(tmp_path / path.relative_to(out)), content(path))


def test_times():
    assert parse_time("123", FPS, "--x") == 123
    assert parse_time("12.5s", Fraction(24), "--x") == 300
    assert parse_time("01:00:01.500", Fraction(10), "--x") == 36015
    with pytest.raises(ValueError, match=r"--x: '3 min' is not a time"):
        parse_time("3 min", FPS, "--x")
    assert arrange([(0, 10), (10, 35)], 1, 10) == ([(0, 10), (10, 18), (18, 26), (26, 35)], 0)


def test_invalid_input_is_refused(tmp_path, capsys):
    assert main(["split-scenes", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "contains no media files" in capsys.readouterr().err
    write_clip(tmp_path / "a.mp4")
    (tmp_path / "a.mkv").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert main(["split-scenes", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "would have the same names" in capsys.readouterr().err
