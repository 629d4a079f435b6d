"""Columns and options in addition to clips and captions; every tensor is read back."""

from fractions import Fraction

import pytest
import torch
from PIL import Image

from ltx_titan.codecs import load_text_encoder, load_video_codec, quantize_text_encoder
from ltx_titan.conditioning import to_contexts
from ltx_titan.data import PrecomputedDataset, read_sample
from ltx_titan.encode.captions import without_prefix
from ltx_titan.media import Audio, read_clip, write_video, write_wav
from ltx_titan.weights import load_text_connectors
from tests.commands.process.helpers import contents, load, run, write_rows
from tests.media.clips import tone, write_clip


def half_white(path, width=96, height=64):
    """Writes an image that is black on the left and white on the right."""
    image = Image.new("L", (width, height))
    image.paste(255, (width // 2, 0, width, height))
    image.save(path)


@pytest.fixture(scope="module")
def extras(nano, tmp_path_factory):
    """A dataset with every column; references of half the size and half the frames."""
    folder = tmp_path_factory.mktemp("extras")
    for name in ("a", "b"):
        write_clip(folder / f"{name}.mp4", frames=40, fps=Fraction(10), width=128, height=64)
        write_clip(folder / f"{name}_edges.mp4", frames=33, fps=Fraction(10), channels=0, width=128, height=64)
    write_wav(folder / "voice.wav", Audio(tone(1.0, 16000, 1), 16000))
    half_white(folder / "mask.png", 128, 64)
    mask = torch.zeros(33, 64, 128, 3, dtype=torch.uint8)
    mask[1:9, :, :64] = 255
    write_video(folder / "mask.mp4", mask, 10)
    torch.save(torch.tensor([1.0, 0.0]), folder / "audio_mask.pt")
    (folder / "empty.png").touch()
    same = {"reference_audio": "voice.wav", "audio_mask": "audio_mask.pt"}
    rows = [
        {"video": "a.mp4", "caption": "x", "reference_video": "a_edges.mp4", "video_mask": "mask.png", **same},
        {"video": "b.mp4", "caption": "y", "reference_video": "b_edges.mp4", "video_mask": "mask.mp4", **same},
    ]
    clip = write_clip(folder / "c.mp4", frames=40, fps=Fraction(10), width=128, height=64)
    rows.append({"video": clip.name, "caption": "z", "reference_video": "missing.mp4", "video_mask": "empty.png"})
    path = write_rows(folder, rows)
    options = {"reference_downscale_factor": 2, "reference_temporal_scale_factor": 2}
    report, printed = run(nano, path, buckets="128x64x33", **options)
    return folder, path, report, printed, options


def test_reference_video_is_smaller_and_slower(extras, nano):
    folder = extras[0]
    target, reference = (load(folder, source, "a.pt") for source in ("latents", "reference_latents"))
    assert target["latents"].shape == (128, 5, 2, 4)
    assert set(reference) == {"latents", "num_frames", "height", "width", "fps"}
    assert reference["latents"].shape == (128, 3, 1, 2)
    assert reference["latents"].dtype == torch.bfloat16
    assert (target["fps"], reference["fps"]) == (10.0, 5.0)
    pixels = read_clip(folder / "a_edges.mp4", 33, 64, 32)
    pixels = torch.cat([pixels[:, :1], pixels[:, 1::2]], dim=1)
    expected = load_video_codec(nano, dtype=torch.float32, part="encoder").encode(pixels[None])[0]
    torch.testing.assert_close(reference["latents"], expected.to(torch.bfloat16))


def test_reference_audio_is_cut_but_not_padded(extras):
    reference = load(extras[0], "reference_audio_latents", "a.pt")
    assert set(reference) == {"latents", "num_time_steps", "frequency_bins", "duration"}
    assert reference["latents"].shape == (8, 25, 16)
    assert reference["latents"].dtype == torch.float32
    assert reference["duration"] == 1.0


def test_masks_have_the_shape_of_their_latents(extras):
    folder = extras[0]
    image, video = (load(folder, "video_masks", name)["mask"] for name in ("a.pt", "b.pt"))
    assert image.dtype == video.dtype == torch.float32
    assert torch.equal(image, torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(5, 2, 4))
    # Pixel frames 1 to 8 are the second latent frame.
    assert video[:, 0].tolist() == [[0] * 4, [1, 1, 0, 0], [0] * 4, [0] * 4, [0] * 4]
    audio = load(folder, "audio_masks", "a.pt")["mask"]
    steps = load(folder, "audio_latents", "a.pt")["num_time_steps"]
    assert (audio.shape, audio.dtype) == ((steps,), torch.float32)
    assert audio[: steps // 2 - 1].all()
    assert not audio[steps // 2 + 1 :].any()


def test_bad_extra_file_is_reported_and_its_sample_kept(extras):
    folder, _, report, printed, _ = extras
    assert report.counts["captions"] == {"done": 3}
    assert report.counts["references"] == {"done": 2, "failed": 1}
    assert report.counts["video masks"] == {"done": 2, "failed": 1}
    assert "missing.mp4: no such file" in printed
    assert "empty.png: is empty (0 bytes)" in printed
    assert "rows without a file for audio masks: 1" in printed
    sources = {"latents": "video_latents", "conditions": "conditions", "reference_latents": "reference_latents"}
    sources |= {name: name for name in ("video_masks", "audio_masks", "reference_audio_latents")}
    data = PrecomputedDataset(folder, sources | {"audio_latents": "audio_latents"})
    assert [data.name(i) for i in range(len(data))] == ["a.pt", "b.pt"]
    data.load(0)


def test_second_run_skips_everything(extras, nano):
    folder, path, _, _, options = extras
    before = contents(folder / ".precomputed")
    report, _ = run(nano, path, buckets="128x64x33", **options)
    assert all(counts["done"] == 0 for counts in report.counts.values())
    assert report.counts["references"] == {"skipped": 2, "failed": 1}
    assert contents(folder / ".precomputed") == before


def test_dry_run_reports_the_same_without_writing(extras, nano, tmp_path):
    folder, path, real, _, options = extras
    report, printed = run(nano, path, buckets="128x64x33", output_dir=tmp_path / "out", dry_run=True, **options)
    assert report.counts == real.counts
    assert {item for _, item, _ in report.failures} == {item for _, item, _ in real.failures}
    assert "videos: 3 x 128x64x33 at 10 fps" in printed
    assert "references: 2 x 64x32x17 at 5 fps" in printed
    assert not (tmp_path / "out").exists()
    size = sum(path.stat().st_size for path in (folder / ".precomputed" / "conditions").iterdir())
    assert report.bytes["captions"] == pytest.approx(size, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_downscale_factor": 3}, "128x64x33 would have 42.6"),
        ({"reference_temporal_scale_factor": 3}, "1 more than a multiple of 24"),
        ({"reference_downscale_factor": 0}, "expected 1 or more"),
        ({"audio_durations": "2.0"}, "omit it"),
        ({"fps": "fast"}, "--fps = 'fast'"),
        ({"shard_size": 0}, "--shard-size = 0"),
        ({"shard_size": 8, "reference_layout": True}, "cannot read files of --shard-size"),
    ],
)
def test_wrong_options_fail_before_any_work(extras, nano, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(nano, extras[1], buckets="128x64x33", output_dir=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_other_options_for_a_stored_dataset_are_refused(extras, nano):
    folder, path, _, _, options = extras
    with pytest.raises(ValueError, match=r"latents: was prepared with resolution_buckets = \['128x64x33'\]"):
        run(nano, path, buckets="64x64x33", **options)
    with pytest.raises(ValueError, match="was prepared with lora_trigger = None, now it is 'SKS'"):
        run(nano, path, media=False, lora_trigger="SKS")
    assert load(folder, "latents", "a.pt")["latents"].shape == (128, 5, 2, 4)


def test_fps_resamples_all_videos(nano, tmp_path):
    write_clip(tmp_path / "fast.mp4", frames=34, fps=Fraction(50))
    write_clip(tmp_path / "slow.mp4", frames=9, fps=Fraction(12))
    path = write_rows(tmp_path, [{"video": "fast.mp4", "caption": "x"}, {"video": "slow.mp4", "caption": "y"}])
    report, printed = run(nano, path, buckets="64x32x17", fps="25")
    fast, slow = (load(tmp_path, "latents", name) for name in ("fast.pt", "slow.pt"))
    assert fast["latents"].shape == slow["latents"].shape == (128, 3, 1, 2)
    assert fast["fps"] == slow["fps"] == 25.0
    # Every second frame of the fast one.
    pixels = read_clip(tmp_path / "fast.mp4", 33, 64, 32)[:, ::2]
    expected = load_video_codec(nano, dtype=torch.float32, part="encoder").encode(pixels[None])[0]
    torch.testing.assert_close(fast["latents"], expected.to(torch.bfloat16))
    for name in ("fast.pt", "slow.pt"):
        assert load(tmp_path, "audio_latents", name)["duration"] == pytest.approx(17 / 25)
    assert "whose frames were repeated: 1" in printed


def test_random_crops_differ_between_samples_and_not_between_runs(nano, tmp_path):
    # A gradient from left to right: the mean of a crop depends on its position.
    frames = torch.linspace(0, 255, 200).to(torch.uint8).view(1, 1, -1, 1).expand(9, 32, -1, 3).contiguous()
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", frames, 25)
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x"}, {"video": "b.mp4", "caption": "y"}])
    for out in ("one", "two"):
        run(nano, path, buckets="32x32x9", captions=False, reshape_mode="random", output_dir=tmp_path / out)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    a, b = (read_sample(tmp_path / "one" / "latents" / f"{name}.pt")["latents"] for name in ("a", "b"))
    assert not torch.equal(a, b)


def test_audio_is_cut_to_listed_durations_without_videos(nano, tmp_path):
    for name, seconds in (("long", 1.3), ("short", 0.6), ("tiny", 0.2)):
        write_wav(tmp_path / f"{name}.wav", Audio(tone(seconds, 24000, 1), 24000))
    path = write_rows(tmp_path, [{"audio": f"{name}.wav", "caption": "x"} for name in ("long", "short", "tiny")])
    report, printed = run(nano, path, buckets=None, audio_durations="0.4; 1.0", captions=False)
    assert load(tmp_path, "audio_latents", "long.pt")["num_time_steps"] == 25
    assert load(tmp_path, "audio_latents", "short.pt")["num_time_steps"] == 10
    assert "tiny.wav: lasts 0.20 s, the shortest of --audio-durations is 0.4 s" in printed
    assert not (tmp_path / ".precomputed" / "conditions").exists()


def test_reference_layout_leaves_out_silent_clips_and_keeps_the_length_of_audio(nano, tmp_path):
    write_clip(tmp_path / "loud.mp4", frames=25)
    write_clip(tmp_path / "silent.mp4", frames=25, channels=0)
    path = write_rows(tmp_path, [{"video": "loud.mp4", "caption": "x"}, {"video": "silent.mp4", "caption": "y"}])
    run(nano, path, buckets="32x32x25", captions=False)
    ours = load(tmp_path, "audio_latents", "loud.pt")
    assert load(tmp_path, "audio_latents", "silent.pt")["present"] is False
    options = {"buckets": "32x32x25", "captions": False, "reference_layout": True}
    with pytest.raises(ValueError, match="was prepared with reference_layout = False, now it is True"):
        run(nano, path, **options)
    report, _ = run(nano, path, overwrite_changed=True, **options)
    theirs = load(tmp_path, "audio_latents", "loud.pt")
    # One second: 25 steps by duration, 26 of the encoder.
    assert (ours["num_time_steps"], theirs["num_time_steps"]) == (25, 26)
    assert torch.equal(theirs["latents"][:, :25], ours["latents"])
    # The placeholder of the first run is gone as well.
    assert not (tmp_path / ".precomputed" / "audio_latents" / "silent.pt").exists()
    assert (tmp_path / ".precomputed" / "latents" / "silent.pt").exists()
    report, _ = run(nano, path, **options)
    assert report.counts["videos"] == {"skipped": 2}


def test_captions_and_videos_in_two_runs_equal_one_run(nano, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=9)
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "a rabbit"}])
    options = {"buckets": "64x32x9"}
    run(nano, path, output_dir=tmp_path / "whole", **options)
    run(nano, path, output_dir=tmp_path / "parts", media=False)
    assert [entry.name for entry in (tmp_path / "parts").iterdir() if entry.is_dir()] == ["conditions"]
    # Media need no captions.
    bare = write_rows(tmp_path, [{"video": "a.mp4"}])
    run(nano, bare, output_dir=tmp_path / "parts", captions=False, **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_contexts_are_outputs_of_the_connectors(nano, tmp_path):
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "a rabbit"}])
    run(nano, path, output_dir=tmp_path / "features", media=False)
    run(nano, path, output_dir=tmp_path / "contexts", media=False, contexts=True)
    stored = torch.load(tmp_path / "contexts" / "conditions" / "a.pt", weights_only=True)
    assert set(stored) == {"video_context", "audio_context"}
    features = read_sample(tmp_path / "features" / "conditions" / "a.pt")
    connectors = load_text_connectors(nano, "cpu", torch.float32)
    expected = to_contexts({key: value[None] for key, value in features.items()}, connectors, torch.float32)
    for stream in ("video", "audio"):
        assert stored[f"{stream}_context"].dtype == torch.bfloat16
        torch.testing.assert_close(
            stored[f"{stream}_context"].float(), expected[f"{stream}_prompt_embeds"][0], atol=0.03, rtol=0.03
        )
    # Without a mask, training reads them as contexts and loads no connectors.
    assert "prompt_attention_mask" not in read_sample(tmp_path / "contexts" / "conditions" / "a.pt", "text")


@pytest.mark.parametrize(("precision", "error"), [("int8", 0.02), ("float8", 0.06), ("int4", 0.3)])
def test_quantized_text_encoder_gives_nearly_the_same_features(nano, precision, error):
    folder = nano.parent / "text_encoder"
    full, mask = load_text_encoder(folder, dtype=torch.float32).encode(["A rabbit stretches in the sun."])
    encoder = quantize_text_encoder(load_text_encoder(folder, dtype=torch.float32), precision, "cpu")
    small, _ = encoder.encode(["A rabbit stretches in the sun."])
    relative = (small - full).norm() / full.norm()
    assert 1e-4 < relative < error


def test_quantized_text_encoder_in_a_run(nano, tmp_path):
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "a rabbit"}])
    run(nano, path, media=False, text_encoder_precision="int4")
    assert load(tmp_path, "conditions", "a.pt")["video_prompt_embeds"].shape == (1024, 128)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("The video shows a dog.", "a dog."),
        (" In this video clip, a dog runs. ", "a dog runs."),
        ("Caption: The image depicts a dog.", "The image depicts a dog."),
        ("A dog. The video shows it.", "A dog. The video shows it."),
    ],
)
def test_one_introductory_phrase_is_removed(caption, expected):
    assert without_prefix(caption) == expected


def test_video_masks_show_the_moments_of_their_clip(nano, tmp_path):
    """A mask of another rate is read by its times, unless it has a frame for every frame of the clip."""
    write_clip(tmp_path / "a.mp4", frames=25, fps=Fraction(25))
    for name, fps, frames in (("slow", 5, 5), ("drawn", 30, 25), ("square", 25, 25)):
        # White from the middle of the clip on.
        mask = torch.zeros(frames, 64, 64 if name == "square" else 96, 3, dtype=torch.uint8)
        mask[round(frames * 0.6) :] = 255
        write_video(tmp_path / f"{name}.mp4", mask, fps)
    found = {}
    for name in ("slow", "drawn", "square"):
        path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x", "video_mask": f"{name}.mp4"}])
        options = {"captions": False, "output_dir": tmp_path / name, "skip_audio": True}
        _, printed = run(nano, path, buckets="96x64x25", **options)
        mask = torch.load(tmp_path / name / "video_masks" / "a.pt", weights_only=True)["mask"]
        found[name] = mask.flatten(1).mean(1).tolist()
        assert ("masks of another frame rate than their video" in printed) == (name != "square")
        assert ("masks of another aspect ratio than their video" in printed) == (name == "square")
    # Frames 15 and later are white: those of latent frames 2 (9 to 16) and 3.
    assert found == {key: [0.0, 0.0, 1.0, 1.0] for key in found}
    path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x", "video_mask": "drawn.mp4"}])
    report, printed = run(nano, path, buckets="96x64x17", captions=False, fps="20", output_dir=tmp_path / "at_20")
    assert report.counts["video masks"] == {"failed": 1}
    assert "drawn.mp4: has as many frames as its clip, at 30 fps instead of 25" in printed


def test_masks_that_cover_nothing_or_everything_are_counted(nano, tmp_path):
    write_clip(tmp_path / "a.mp4", frames=17)
    for color, note in (
        (0, "masks that are dark or silent in all of their clip"),
        (255, "masks that are white or loud"),
    ):
        Image.new("L", (96, 64), color).save(tmp_path / "mask.png")
        path = write_rows(tmp_path, [{"video": "a.mp4", "caption": "x", "video_mask": "mask.png"}])
        assert note in run(nano, path, captions=False)[1]
