import json
import shutil

import pytest
import torch
from PIL import Image

from ltx_titan.cli import main
from ltx_titan.commands.inspection.inspect_data import InspectOptions, inspect_data
from ltx_titan.data import write_sample
from ltx_titan.media import Audio, write_wav
from ltx_titan.model import TransformerConfig
from ltx_titan.model.flops import training_flops
from ltx_titan.weights import read_metadata
from tests.media.clips import tone, write_clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_clip(folder / "a.mp4", frames=20)
    write_clip(folder / "b ☃.mp4", frames=20, channels=1, rate=24000, height=96, width=64)
    write_clip(folder / "silent.mp4", frames=20, channels=0)
    write_clip(folder / "short.mp4", frames=3)
    write_wav(folder / "rain.wav", Audio(tone(1.0, 32000), 32000))
    Image.new("RGB", (90, 50), "orange").save(folder / "still.png")
    (folder / "zero.mp4").touch()
    cut = write_clip(folder / "cut.mp4", frames=20)
    cut.write_bytes(cut.read_bytes()[:2000])
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Three samples: one complete, one without audio, one whose text is missing; and a damaged file."""
    root = tmp_path_factory.mktemp("clips") / ".precomputed"
    generator = torch.Generator().manual_seed(0)
    for name, present in (("a.pt", True), ("sub/b.pt", False), ("c.pt", True)):
        latents = torch.randn(128, 3, 2, 3, generator=generator)
        write_sample(
            root / "latents" / name, {"latents": latents, "num_frames": 3, "height": 2, "width": 3, "fps": 25.0}
        )
        audio = {"latents": torch.randn(8, 17, 16, generator=generator), "num_time_steps": 17, "frequency_bins": 16}
        write_sample(root / "audio_latents" / name, {**audio, "duration": 0.68, "present": present})
    mask = torch.ones(16, dtype=torch.int64)
    for name, text in (("a.pt", mask), ("sub/b.pt", torch.cat([mask[:6] * 0, mask[:10]]))):
        features = {"video_prompt_embeds": torch.randn(16, 8), "prompt_attention_mask": text}
        write_sample(root / "conditions" / name, features)
    (root / "latents" / "broken.pt").write_bytes(b"PK noise")
    return root


def test_clips_are_measured_and_drawn(clips, tmp_path, console):
    sheet, findings = tmp_path / "sheet.png", tmp_path / "findings.json"
    report = inspect_data(
        InspectOptions(clips, sheet, json=findings, resolution_buckets="96x64x17;64x96x9;96x64x1", deep=True), console
    )
    found = {record["path"].rsplit("/", 1)[-1]: record for record in json.loads(findings.read_text())}
    assert {name: record["bucket"] for name, record in found.items() if record["bucket"]} == {
        "a.mp4": "96x64x17",
        "b ☃.mp4": "64x96x9",
        "silent.mp4": "96x64x17",
        "short.mp4": "96x64x1",
        "still.png": "96x64x1",
    }
    assert (found["a.mp4"]["video_tokens"], found["a.mp4"]["audio_tokens"]) == (3 * 2 * 3, 17)
    assert (found["b ☃.mp4"]["channels"], found["b ☃.mp4"]["sample_rate"]) == (1, 24000)
    assert (found["silent.mp4"]["audio_tokens"], found["rain.wav"]["audio_tokens"]) == (0, 25)
    assert {name for name, record in found.items() if record["problem"]} == {"zero.mp4", "cut.mp4"}
    assert report.counts["files"] == {"done": 6, "failed": 2}
    assert report.notes["videos without audio among others with audio"] == 1
    with Image.open(sheet) as picture:
        # All clips, two in a row, below the header.
        assert picture.width > 1900
        assert picture.height > 500
        assert len(picture.resize((64, 64)).getcolors(4096)) > 50


def test_proposed_buckets_are_those_that_it_says_to_pass(clips, tmp_path, console):
    found = []
    text = "auto"
    for name in ("proposed.json", "passed.json"):
        options = InspectOptions(clips, no_sheet=True, json=tmp_path / name, resolution_buckets=text)
        inspect_data(options, console)
        found.append(json.loads((tmp_path / name).read_text()))
        text = console.file.getvalue().partition('--resolution-buckets "')[2].partition('"')[0]
    assert ";" in text
    assert found[0] == found[1]
    assert any(record["bucket"] for record in found[0])


def test_missing_captions_of_a_table_are_counted(clips, tmp_path, console):
    table = clips / "table.jsonl"
    rows = [{"video": "a.mp4", "caption": "a tone"}, {"video": "silent.mp4", "caption": ""}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = inspect_data(InspectOptions(table, tmp_path / "sheet.png"), console)
    assert report.notes["clips without a caption"] == 1


def test_step_time_follows_from_the_tokens(clips, tmp_path, console, nano):
    table = clips / "one.json"
    table.write_text(json.dumps([{"video": "a.mp4"}]))
    options = InspectOptions(table, no_sheet=True, resolution_buckets="96x64x17", model_path=nano, mfu=0.5, mode="full")
    inspect_data(options, console)
    assert not options.sheet.exists()
    config = TransformerConfig.from_metadata(read_metadata(nano).transformer_config())
    flops = training_flops(config, video_tokens=18, audio_tokens=17, text_tokens=1024)
    printed = console.file.getvalue()
    assert f"{flops / (0.5 * 989e12):.3g}" in printed
    assert "H100 at 50% of its peak, full fine-tuning" in printed


def test_prepared_data_is_measured_and_drawn_in_false_colors(prepared, tmp_path, console):
    sheet, findings = tmp_path / "sheet.png", tmp_path / "findings.json"
    # The folder that contains the root as `.precomputed` works as well if it contains no clips.
    report = inspect_data(InspectOptions(prepared.parent, sheet, json=findings), console)
    found = {record["name"]: record for record in json.loads(findings.read_text())}
    complete = found["a.pt"]
    assert complete["bucket"] == "96x64x17"
    assert (complete["video_tokens"], complete["audio_tokens"], complete["text_tokens"]) == (18, 17, 16)
    assert complete["duration_s"] == pytest.approx(17 / 25)
    assert not found["sub/b.pt"]["has_audio"]
    assert report.counts["samples"]["done"] == 2
    reasons = {item: reason for _, item, reason in report.failures}
    assert reasons["conditions/c.pt"] == "is missing"
    assert "run the preprocessing again" in reasons["latents/broken.pt"]
    assert report.notes["prompts that fill all tokens (probably truncated)"] == 1
    printed = console.file.getvalue()
    assert "96x64x17" in printed
    assert "latents: mean" in printed
    with Image.open(sheet) as picture:
        assert len(picture.resize((64, 64)).getcolors(4096)) > 50


def test_prepared_data_decoded(prepared, nano, tmp_path, console):
    root = tmp_path / "root"
    for folder in ("latents", "audio_latents"):
        (root / folder).mkdir(parents=True)
        shutil.copy(prepared / folder / "a.pt", root / folder)
    options = InspectOptions(root, tmp_path / "sheet.png", decode=True, model_path=nano)
    assert inspect_data(options, console).counts["samples"] == {"done": 1}
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.height > 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file or folder"),
        (["SOURCE", "--resolution-buckets", "50x50x3"], "does not fit the video VAE"),
        (["SOURCE", "--gpu", "abacus"], "peak of 'abacus' is not known"),
        (["SOURCE", "--mfu", "40"], "--mfu"),
        (["SOURCE", "--shape", "ltx-9"], "ltx-9"),
    ],
)
def test_invalid_options_are_refused(clips, capsys, arguments, message):
    assert main(["inspect", *[str(clips) if argument == "SOURCE" else argument for argument in arguments]]) == 1
    assert message in capsys.readouterr().err
