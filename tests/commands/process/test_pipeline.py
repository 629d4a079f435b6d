from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ltx_titan.cli import main
from ltx_titan.codecs import load_text_encoder, load_video_codec
from ltx_titan.commands.captioning.table import CaptionTable
from ltx_titan.data import PrecomputedDataset
from ltx_titan.media import Audio, read_clip, write_wav
from tests.commands.process.helpers import load, run, write_rows
from tests.media.clips import tone, write_clip, write_mixed_files


@pytest.fixture(scope="module")
def mixed(nano, tmp_path_factory):
    """A dataset of every kind of file, processed once."""
    folder = tmp_path_factory.mktemp("mixed")
    files = write_mixed_files(folder)
    cut = write_clip(folder / "cut.mp4", frames=20)
    cut.write_bytes(cut.read_bytes()[:2000])
    rows = [{"video": name, "caption": f"a caption of {name}"} for name in (*files, "cut.mp4", "missing.mp4")]
    path = write_rows(folder, rows)
    report, printed = run(nano, path, buckets="64x32x17;32x64x1")
    return folder, path, report, printed


def test_fields_of_a_clip_with_audio(mixed):
    folder = mixed[0]
    video = load(folder, "latents", "stereo.pt")
    assert set(video) == {"latents", "num_frames", "height", "width", "fps"}
    assert video["latents"].shape == (128, 3, 1, 2)
    assert video["latents"].dtype == torch.bfloat16
    assert (video["num_frames"], video["height"], video["width"]) == (3, 1, 2)
    assert video["fps"] == pytest.approx(24000 / 1001, abs=1e-9)

    audio = load(folder, "audio_latents", "stereo.pt")
    assert set(audio) == {"latents", "num_time_steps", "frequency_bins", "duration"}
    seconds = 17 * 1001 / 24000
    assert audio["duration"] == pytest.approx(seconds)
    assert audio["num_time_steps"] == round(25 * seconds) == 18
    assert audio["latents"].shape == (8, 18, 16)
    assert audio["latents"].dtype == torch.float32

    text = load(folder, "conditions", "stereo.pt")
    assert set(text) == {"video_prompt_embeds", "audio_prompt_embeds", "prompt_attention_mask"}
    assert text["video_prompt_embeds"].shape == (1024, 128)
    assert text["audio_prompt_embeds"].shape == (1024, 64)
    assert text["video_prompt_embeds"].dtype == torch.bfloat16
    assert text["prompt_attention_mask"].dtype == torch.int64
    assert text["prompt_attention_mask"].sum() == 1 + len("a caption of stereo.mp4")
    assert text["prompt_attention_mask"][-1] == 1


def test_latents_encode_the_first_frames(mixed, nano):
    folder = mixed[0]
    codec = load_video_codec(nano, dtype=torch.float32, part="encoder")
    expected = codec.encode(read_clip(folder / "stereo.mp4", 17, 64, 32)[None])[0]
    torch.testing.assert_close(load(folder, "latents", "stereo.pt")["latents"], expected.to(torch.bfloat16))


def test_unicode_names_folders_and_mono_audio(mixed):
    folder = mixed[0]
    audio = load(folder, "audio_latents", "sub/mönö ☃.pt")
    assert audio["num_time_steps"] == round(25 * 17 / 25)
    assert load(folder, "latents", "sub/mönö ☃.pt")["fps"] == 25.0


def test_still_image(mixed):
    folder = mixed[0]
    image = load(folder, "latents", "still.pt")
    assert image["latents"].shape == (128, 1, 2, 1)
    assert image["fps"] == 1.0
    assert load(folder, "audio_latents", "still.pt")["present"] is False


def test_clip_without_audio_gets_a_placeholder(mixed):
    folder, _, report, printed = mixed
    placeholder = load(folder, "audio_latents", "silent.pt")
    assert placeholder["present"] is False
    assert placeholder["latents"].shape == (8, round(25 * 17 / 25), 16)
    assert "present" not in load(folder, "audio_latents", "stereo.pt")
    assert report.notes["videos and images without audio"] == 2
    assert "videos and images without audio: 2" in printed


def test_training_reads_what_was_written(mixed):
    sources = {"latents": "video_latents", "audio_latents": "audio_latents", "conditions": "conditions"}
    dataset = PrecomputedDataset(mixed[0] / ".precomputed", sources)
    assert len(dataset) == 5
    assert {dataset.name(i) for i in range(5)} >= {"sub/mönö ☃.pt", "silent.pt", "still.pt"}


def test_bad_files_are_reported_and_skipped(mixed):
    folder, _, report, printed = mixed
    reasons = {item.rsplit("/", 1)[-1]: reason for _, item, reason in report.failures}
    assert set(reasons) == {"zero.mp4", "text.mp4", "cut.mp4", "missing.mp4"}
    assert "0 bytes" in reasons["zero.mp4"]
    assert "not a readable media file" in reasons["text.mp4"]
    assert reasons["missing.mp4"] == "no such file"
    for name in reasons:
        assert name in printed
        assert not (folder / ".precomputed" / "conditions" / name).with_suffix(".pt").exists()
    # Three frames are enough for the bucket of one.
    assert report.counts["videos"] == {"done": 5, "failed": 4}
    assert report.counts["captions"] == {"done": 5}
    assert not list(folder.rglob("*.tmp.*"))


def test_second_run_skips_stored_samples_and_remakes_damaged_ones(mixed, nano):
    folder, path, *_ = mixed
    root = folder / ".precomputed"
    damaged, deleted = root / "latents" / "stereo.pt", root / "conditions" / "silent.pt"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    deleted.unlink()
    kept = {p: p.stat().st_mtime_ns for p in root.rglob("*.pt") if p != damaged}
    report, _ = run(nano, path, buckets="64x32x17;32x64x1")
    assert report.counts["videos"] == {"done": 1, "skipped": 4, "failed": 4}
    assert report.counts["captions"] == {"done": 1, "skipped": 4}
    assert load(folder, "latents", "stereo.pt")["latents"].shape == (128, 3, 1, 2)
    changed = {p for p, time in kept.items() if p.stat().st_mtime_ns != time}
    assert changed == {root / "audio_latents" / "stereo.pt"}


def test_separate_audio_gets_the_duration_of_its_video(nano, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=17, fps=Fraction(10))
    write_clip(tmp_path / "b.mp4", frames=17, fps=Fraction(10))
    write_wav(tmp_path / "a.wav", Audio(tone(0.5, 16000, 1), 16000))
    path = write_rows(
        tmp_path,
        [{"video": "a.mp4", "audio": "a.wav", "caption": "x"}, {"video": "b.mp4", "audio": None, "caption": "y"}],
    )
    report, _ = run(nano, path, buckets="64x32x17")
    audio = load(tmp_path, "audio_latents", "a.pt")
    assert audio["duration"] == pytest.approx(1.7)
    assert audio["num_time_steps"] == round(25 * 1.7)
    # The column replaces the audio of videos, also in rows without a file.
    assert not (tmp_path / ".precomputed" / "audio_latents" / "b.pt").exists()
    assert report.counts["audio"] == {"done": 1}


def test_audio_only_needs_no_buckets(nano, tmp_path):
    write_wav(tmp_path / "a.wav", Audio(tone(1.5, 44100), 44100))
    path = write_rows(tmp_path, [{"audio": "a.wav", "caption": "a tone"}])
    report, _ = run(nano, path, buckets=None)
    assert load(tmp_path, "audio_latents", "a.pt")["num_time_steps"] == round(25 * 1.5)
    assert report.counts == {"audio": {"done": 1}, "captions": {"done": 1}}


def test_trigger_skip_audio_and_output_dir(nano, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=17)
    path = write_rows(tmp_path, [{"media_path": "a.mp4", "caption": " a rabbit "}])
    out = tmp_path / "out"
    run(nano, path, output_dir=out, lora_trigger=" SKS ", skip_audio=True)
    assert sorted(p.name for p in out.iterdir()) == ["conditions", "latents", "prepare.json"]
    encoder = load_text_encoder(nano.parent / "text_encoder", dtype=torch.float32)
    mask = torch.load(out / "conditions" / "a.pt", weights_only=True)["prompt_attention_mask"]
    assert mask.sum() == len(encoder.tokenize("SKS a rabbit"))


def test_clip_shorter_than_every_bucket_fails_with_a_remedy(nano, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=5)
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x"}])
    report, printed = run(nano, path, buckets="64x32x17")
    assert "has 5 frame(s), the shortest bucket needs 17" in printed
    assert not report.succeeded()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buckets": None}, "--resolution-buckets: needed"),
        ({"buckets": "60x32x17"}, "multiple of 32"),
        ({"text_encoder_path": "nowhere"}, "no config.json"),
        ({"model_path": "nowhere.safetensors"}, "no such file"),
    ],
)
def test_wrong_options_fail_before_any_work(nano, tmp_path, changes, message):
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x"}])
    changes = {key: Path(value) if key.endswith("_path") else value for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        run(nano, path, **{"buckets": "64x32x17", **changes})
    assert not (tmp_path / ".precomputed").exists()


def test_captions_with_unicode_line_breaks_reach_the_encoder(nano, tmp_path):
    """`ltx-titan caption` writes tables with `CaptionTable`, which does not escape U+2028, U+2029 and U+0085."""
    caption = "a dog\u2028a cat\u2029a cow\u0085a pig"
    encoder = load_text_encoder(nano.parent / "text_encoder", dtype=torch.float32)
    for suffix in (".jsonl", ".csv", ".json"):
        write_clip(tmp_path / "a.mp4", frames=3)
        table = CaptionTable(tmp_path, tmp_path / f"dataset{suffix}", frozenset({".mp4"}), recursive=False)
        table.add(tmp_path / "a.mp4", caption)
        table.save()
        out = tmp_path / suffix
        report, _ = run(nano, table.path, media=False, output_dir=out)
        assert report.counts["captions"] == {"done": 1}
        mask = torch.load(out / "conditions" / "a.pt", weights_only=True)["prompt_attention_mask"]
        assert mask.sum() == len(encoder.tokenize(caption))


def test_commands_share_their_options(nano, tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", frames=9)
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x"}])
    encoder = ["--text-encoder-path", str(nano.parent / "text_encoder")]
    media = ["--resolution-buckets", "64x32x9", "--skip-audio"]
    common = [str(path), "--model-path", str(nano), "--device", "cpu", "--dry-run"]
    assert main(["process-dataset", *common, *encoder, *media]) == 0
    assert {"videos: 1 x 64x32x9 at 25 fps", "captions: 1 x caption"} <= set(capsys.readouterr().out.split("\n"))
    assert main(["process-videos", *common, *media]) == 0
    assert "captions" not in capsys.readouterr().out
    assert main(["process-captions", *common, *encoder, "--load-text-encoder-in-8bit"]) == 0
    assert "videos" not in capsys.readouterr().out
    for arguments in (["process-dataset", *common, *media], ["process-videos", *common, *encoder]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "--text-encoder-path" in capsys.readouterr().err
