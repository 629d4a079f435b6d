import shutil

import pytest
import torch
from PIL import Image

from ltx_titan.cli import main
from ltx_titan.codecs import load_audio_codec, load_video_codec
from ltx_titan.commands.decode_latents import DecodeOptions, decode_latents
from ltx_titan.data import write_sample
from ltx_titan.media import probe_video, read_audio, read_image, to_uint8
from tests.media.clips import tone


@pytest.fixture(scope="module")
def root(nano, tmp_path_factory):
    """A clip with audio, one marked as without, a still image, audio alone, references, and a broken file."""
    root = tmp_path_factory.mktemp("prepared")
    video, audio = load_video_codec(nano, dtype=torch.float32, part="encoder"), load_audio_codec(nano, part="encoder")
    pixels = torch.linspace(-1, 1, 9 * 64).view(1, 1, 9, 1, 64).expand(1, 3, 9, 32, 64)
    clip = video.encode(pixels)[0]
    audio_latents = audio.encode(tone(9 / 24, 16000)[None], 16000)[0][:, :9].contiguous()

    def fields(latents, fps):
        _, frames, height, width = latents.shape
        return {"latents": latents, "num_frames": frames, "height": height, "width": width, "fps": fps}

    present = {"latents": audio_latents, "num_time_steps": 9, "frequency_bins": 16, "duration": 9 / 24}
    write_sample(root / "latents" / "a.pt", fields(clip, 24.0))
    write_sample(root / "latents" / "sub" / "mönö ☃.pt", fields(clip, 24.0))
    write_sample(root / "latents" / "still.pt", fields(clip[:, :1], 1.0))
    write_sample(root / "audio_latents" / "a.pt", present)
    write_sample(root / "audio_latents" / "sub" / "mönö ☃.pt", {**present, "present": False})
    write_sample(root / "audio_latents" / "rain.pt", present)
    write_sample(root / "reference_latents" / "a.pt", fields(clip, 24.0))
    (root / "latents" / "broken.pt").write_bytes(b"PK noise")
    return root


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_everything_is_decoded_and_a_second_run_skips_it(root, nano, tmp_path, console):
    report = decode_latents(DecodeOptions(root, tmp_path, nano), console)
    assert files_of(tmp_path) == [
        "audio_latents/rain.wav",
        "latents/a.mp4",
        "latents/still.png",
        "latents/sub/mönö ☃.mp4",
        "reference_latents/a.mp4",
    ]
    info = probe_video(tmp_path / "latents" / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps, info.has_audio) == (9, 64, 32, 24, True)
    audio = read_audio(tmp_path / "latents" / "a.mp4")
    assert audio.sample_rate == 48000
    assert audio.duration_s == pytest.approx(9 / 24, abs=0.06)
    assert not probe_video(tmp_path / "latents" / "sub" / "mönö ☃.mp4").has_audio
    assert probe_video(tmp_path / "reference_latents" / "a.mp4").frames == 9
    assert read_audio(tmp_path / "audio_latents" / "rain.wav").waveform.shape[0] == 2
    with Image.open(tmp_path / "latents" / "still.png") as still:
        assert still.size == (64, 32)
    assert report.counts["decode"] == {"done": 5, "failed": 1}
    (_, item, reason), *others = report.failures
    assert item.endswith("latents/broken.pt")
    assert "delete the file and run the preprocessing again" in reason

    (tmp_path / "latents" / "a.mp4").unlink()
    report = decode_latents(DecodeOptions(root, tmp_path, nano), console)
    assert report.counts["decode"] == {"done": 1, "skipped": 4, "failed": 1}


def test_a_still_equals_the_output_of_the_decoder(root, nano, tmp_path, console):
    decode_latents(DecodeOptions(root / "latents" / "still.pt", tmp_path, nano), console)
    codec = load_video_codec(nano, dtype=torch.float32, part="decoder")
    latents = torch.load(root / "latents" / "still.pt", weights_only=True)["latents"]
    assert torch.equal(read_image(tmp_path / "still.png"), to_uint8(codec.decode(latents[None])[0]))


def test_one_folder_some_samples_no_audio(root, nano, tmp_path, console):
    options = DecodeOptions(root / "latents", tmp_path, nano, skip_audio=True, limit=2)
    report = decode_latents(options, console)
    # Of a, broken, still and sub/...: the first and the last.
    assert files_of(tmp_path) == ["a.mp4", "sub/mönö ☃.mp4"]
    assert report.counts["decode"] == {"done": 2}
    assert not probe_video(tmp_path / "a.mp4").has_audio


def test_ranks_share_the_work(root, nano, tmp_path, console, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        report = decode_latents(DecodeOptions(root, tmp_path, nano, dry_run=True), console)
        assert report.notes["would be decoded"] == 3
    printed = console.file.getvalue()
    assert printed.count(" -> ") == 6
    assert not files_of(tmp_path)


def test_split_packs_and_wrong_paths(root, nano, tmp_path, capsys):
    split = tmp_path / "vae.safetensors"
    shutil.copy(nano, split)
    arguments = ["--model-path", "nowhere.safetensors", "--video-vae-path", str(split), "--audio-vae-path", str(split)]
    assert main(["decode-latents", str(root / "reference_latents"), str(tmp_path / "out"), *arguments]) == 0
    assert files_of(tmp_path / "out") == ["a.mp4"]
    assert main(["decode-latents", "nowhere", str(tmp_path / "out"), *arguments]) == 1
    assert "no such file or folder" in capsys.readouterr().err
