"""Validation inside a job: the same clips and losses on any mesh, and the clips of inference with what was exported.

Clips are compared by their contact sheets: eight frames of each, without loss.
"""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ltx_titan
from ltx_titan.checkpoint import read_trainer_state
from ltx_titan.cli import main as main_of_cli
from ltx_titan.commands.sample import SampleOptions, sample_clips
from ltx_titan.common.options import parse_options
from ltx_titan.config import load_job
from ltx_titan.media import probe_video, read_audio
from ltx_titan.train import main
from ltx_titan.validation.usage import usage
from tests.jobs import NO_CHECKPOINTS, read_run, small_validation, train, write_job
from tests.validation.quality_models import write_clap, write_clip
from tests.validation.test_report import Page
from tests.wandb_records import history, run_folders

CLIP = str(Path(ltx_titan.__file__).parent / "assets" / "big_buck_bunny_5s.mp4")
SAMPLES = [
    {"prompt": "a rabbit", "conditions": [{"type": "first_frame", "image_or_video": CLIP}]},
    {"prompt": "a hill", "video_dims": [96, 64, 17], "seed": 0},
    {"prompt": "a tree", "video_dims": [64, 96, 1]},
]
PREFIX = "model.diffusion_model."


@pytest.fixture(scope="module")
def contexts(tmp_path_factory):
    """Contexts of prompts, encoded by the first job for all."""
    return tmp_path_factory.mktemp("contexts")


@pytest.fixture(scope="module")
def write(nano_path, data_root, contexts):
    """Writes a job with validation."""

    def write(folder, **overrides):
        given = small_validation(
            nano_path, held_out_root=str(data_root), held_out_samples=3, held_out_sigmas=[0.5], samples=SAMPLES
        )
        job = write_job(folder, nano_path, data_root, **{"training__steps": 2, **given, **overrides})
        (folder / "run").mkdir()
        (folder / "run/validation-cache").symlink_to(contexts)
        return job

    return write


@pytest.fixture(scope="module")
def single(write, tmp_path_factory):
    """A job on one rank that validates before the first step and after the last, into TensorBoard and W&B."""
    clip, clap = write_clip(tmp_path_factory.mktemp("clip")), write_clap(tmp_path_factory.mktemp("clap"))
    job = write(
        tmp_path_factory.mktemp("single"),
        metrics__tensorboard=True,
        metrics__wandb="offline",
        validation__offload_optimizer=True,
        validation__quality={"clip_path": clip, "clap_path": clap, "frames": 2},
        checkpoint__interval=2,
        checkpoint__keep_best={"metric": "quality/text_video", "mode": "max"},
    )
    train(job)
    return job


def sheet(folder):
    return np.asarray(Image.open(folder / "contact-sheet.png")).astype(int)


def same_pictures(a, b):
    """Equal to a rounding of the last of 255 levels."""
    return a.shape == b.shape and abs(a - b).max() <= 1


def write_lora(path, layer="diffusion_model.transformer_blocks.0.attn1.to_q"):
    generator = torch.Generator().manual_seed(5)
    a, b = (torch.randn(*size, generator=generator) for size in ((4, 128), (128, 4)))
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, path)
    return path


def infer(job, folder, *changes):
    """Clips that `ltx-titan sample` makes of the samples of a job."""
    folder.mkdir()
    (folder / ".contexts").symlink_to(job.parent / "run/validation-cache")
    arguments = ["--job", job, "--output-dir", folder, "--device", "cpu", *changes]
    options = parse_options(SampleOptions, [str(argument) for argument in arguments], prog="sample", description="")
    sample_clips(options)
    return sheet(folder)


def test_clips_have_the_sizes_and_rates_that_were_asked_for_before_training_and_while_it_lasts(single):
    samples = single.parent / "run/samples"
    assert sorted(path.name for path in samples.iterdir()) == ["step-0", "step-2"]
    for folder in samples.iterdir():
        for name, size in (("sample-01.mp4", (64, 64, 9)), ("sample-02.mp4", (96, 64, 17))):
            clip = probe_video(folder / name)
            assert (clip.width, clip.height, clip.frames, clip.fps) == (*size, 24)
            assert read_audio(folder / name).sample_rate == 48000
        assert Image.open(folder / "sample-03.png").size == (64, 96)
    untrained, trained = sheet(samples / "step-0"), sheet(samples / "step-2")
    assert not same_pictures(untrained, trained)


def test_the_command_of_the_report_samples_with_the_settings_of_the_validation(single, tmp_path):
    folder = single.parent / "run"
    (export,) = (folder / "export").glob("*.safetensors")
    command, *words = shlex.split(usage(load_job(folder / "job.toml", []), export)[0].code.replace("\\\n", " "))
    assert command == "ltx-titan"
    assert words[0] == "sample"
    words += ["--output-dir", str(tmp_path / "clips"), "--device", "cpu"]
    assert main_of_cli(words) == 0
    clip = probe_video(tmp_path / "clips/sample-01.mp4")
    assert (clip.width, clip.height, clip.frames, clip.fps) == (64, 64, 9, 24)


def test_clips_and_held_out_curve_are_in_tensorboard_from_the_untrained_model_on(single):
    events = EventAccumulator(str(single.parent / "run/tensorboard")).Reload()
    for tag in ("sample-01/video", "sample-03/frames", "sample-02/audio"):
        assert [event.step for event in events.Tensors(tag)] == [0, 2]
    assert events.SummaryMetadata("sample-01/video").display_name == "a rabbit"
    held_out = ("held_out/total", "held_out/video", "held_out/audio", "held_out/audio_sigma_0.5")
    for tag in (*held_out, "quality/text_video", "quality/text_audio"):
        curve = {event.step: event.value for event in events.Scalars(tag)}
        assert sorted(curve) == [0, 2]
        assert read_run(single)[1][tag] == pytest.approx(curve[2])


def test_checkpoints_store_the_metric_that_they_are_compared_by(single):
    trainer = read_trainer_state(single.parent / "run/checkpoint/step-2")
    assert trainer["metrics"] == {"quality/text_video": read_run(single)[1]["quality/text_video"]}


def test_clips_audio_and_frames_are_in_wandb_with_prompt_and_step(single):
    (run,) = run_folders(single.parent / "run")
    rows = history(run)
    clips = [row for row in rows if "sample-01/video.path" in row]
    assert [row["step"] for row in clips] == [0, 2]
    for kind, ending in (("video", ".mp4"), ("frames", ".png"), ("audio", ".wav")):
        assert clips[1][f"sample-01/{kind}.caption"] == "a rabbit"
        stored = run / "files" / clips[1][f"sample-01/{kind}.path"]
        assert stored.suffix == ending
        assert stored.stat().st_size > 0
    assert probe_video(run / "files" / clips[1]["sample-02/video.path"]).frames == 17
    assert "sample-03/video.path" not in clips[1]
    assert [row["loss/total"] for row in rows if "loss/total" in row] == [line["loss"] for line in read_run(single)]


def test_the_report_of_a_run_has_its_clips_prompts_curves_job_and_use(single):
    page = Page((single.parent / "run/report.html").read_text(encoding="utf-8"))
    assert len(page.sources("video")) == 4  # two clips with audio, before training and after it
    assert len(page.sources("img")) == 2
    assert all(source.startswith("data:") for source in page.loaded())
    for shown in ("a rabbit", "a hill", "a tree", "before training", "step 2", "stg_blocks"):
        assert shown in page.text
    assert "transformer-step-2.safetensors" in page.text
    assert "Held-out loss" in page.text
    assert "Similarity of clips and prompts" in page.text


def test_inference_with_the_export_makes_the_clips_of_the_last_validation(single, tmp_path):
    export = single.parent / "run/export/transformer-step-2.safetensors"
    found = infer(single, tmp_path / "clips", "--transformer-path", export)
    assert same_pictures(found, sheet(single.parent / "run/samples/step-2"))


def test_inference_with_base_and_adapter_makes_the_clips_of_a_lora_job(write, single, tmp_path, caplog):
    lora = {"model__mode": "lora", "lora__rank": 4, "lora__alpha": 8.0, "optimizer__lr": 3e-2}
    misspelled = {"checkpoint__interval": 2, "checkpoint__keep_best": {"metric": "held_out/totl"}}
    loras = [{"path": str(write_lora(tmp_path / "style.safetensors")), "strength": 0.5}]
    job = write(tmp_path / "job", validation__samples=SAMPLES[:1], validation__loras=loras, **lora, **misspelled)
    train(job)
    assert (
        "'held_out/totl' is not logged at step 2, so its checkpoint is not compared; did you mean held_out/total"
        in (caplog.text)
    )
    assert "logged at the step of no checkpoint" in caplog.text
    samples = job.parent / "run/samples"
    found = infer(job, tmp_path / "clips", "--lora", job.parent / "run/export/lora-step-2.safetensors")
    assert same_pictures(found, sheet(samples / "step-2"))
    assert not same_pictures(found, sheet(samples / "step-0"))
    # Without the style the same weights make another clip.
    assert not same_pictures(sheet(samples / "step-0"), sheet(single.parent / "run/samples/step-0")[: found.shape[0]])


@pytest.mark.distributed
@pytest.mark.parametrize("axis", ["tp", "cp"])
def test_clips_and_losses_do_not_depend_on_the_mesh_nor_training_on_validation(write, single, tmp_path, axis):
    settings = {"validation__skip_initial_validation": True, f"parallelism__{axis}": 2, **NO_CHECKPOINTS}
    settings["validation__samples"] = SAMPLES[:1]
    job = write(tmp_path, **settings)
    (first, last), expected = train(job, 2), read_run(single)
    found = sheet(job.parent / "run/samples/step-2")
    assert same_pictures(found, sheet(single.parent / "run/samples/step-2")[: found.shape[0], : found.shape[1]])
    # The job on one rank has paused for clips before its first step.
    assert [first["loss"], last["loss"]] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    for tag in ("held_out/total", "held_out/video", "held_out/audio"):
        assert last[tag] == pytest.approx(expected[1][tag], rel=1e-5)


@pytest.mark.distributed
def test_averaged_weights_are_sampled_under_fsdp2_where_asked_for(write, nano_path, tmp_path):
    settings = {"validation__use_ema": True, "optimizer__ema_decay": 0.999, "optimizer__lr": 1e-2}
    settings["validation__samples"] = SAMPLES[:1]
    job = write(tmp_path / "job", validation__interval=1, validation__skip_initial_validation=True, **settings)
    train(job, 2, "--training.stop_at=1")
    export = job.parent / "run/export/transformer-step-1.safetensors"
    trained, start = load_file(export), load_file(nano_path)
    # In step 1 the decay is 2 / 11.
    average = {
        name: start[name].float().lerp(tensor, 9 / 11)
        if name.startswith(PREFIX) and "embeddings_connector" not in name
        else tensor
        for name, tensor in trained.items()
    }
    with safe_open(export, framework="pt") as file:
        save_file(average, tmp_path / "average.safetensors", metadata=file.metadata())
    found = sheet(job.parent / "run/samples/step-1")
    assert same_pictures(found, infer(job, tmp_path / "a", "--transformer-path", tmp_path / "average.safetensors"))
    assert not same_pictures(found, infer(job, tmp_path / "b", "--transformer-path", export))


def test_a_sample_that_cannot_be_made_is_refused_before_training(write, tmp_path, caplog):
    job = write(tmp_path)
    assert main([str(job), "--validation.video_dims=[65,64,9]"]) == 1
    assert "video_dims" in caplog.text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["validation-cache"]


def test_held_out_loss_needs_no_samples(write, tmp_path):
    job = write(tmp_path, validation__samples=[], validation__interval=1, training__steps=1, **NO_CHECKPOINTS)
    train(job)
    assert read_run(job)[0]["held_out/video"] > 0
