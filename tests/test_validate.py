"""Validation inside a job: clips and a held-out loss appear, on any number of ranks, and training is not disturbed."""

import pytest

from ltx_titan.media import probe_video, read_sound
from ltx_titan.train import main
from tests.jobs import read_run, train, write_job

SAMPLES = """
[validation]
interval = 2
video_dims = [64, 64, 9]
inference_steps = 2
stg_blocks = [1]
text_encoder_path = "{encoder}"
held_out_root = "{data}"
held_out_samples = 2
held_out_sigmas = [0.5]

[[validation.samples]]
prompt = "a rabbit"
"""


def job_with_validation(folder, nano_path, data_root):
    job = write_job(folder, nano_path, data_root, training__steps=2, metrics__interval=1)
    text = SAMPLES.format(encoder=nano_path.parent / "text_encoder", data=data_root)
    job.write_text(job.read_text() + text)
    return job


@pytest.mark.distributed
def test_clips_and_held_out_loss_on_one_and_two_ranks(tmp_path, nano_path, data_root):
    plain = train(write_job(tmp_path / "plain", nano_path, data_root, training__steps=2))
    for ranks in (1, 2):
        job = job_with_validation(tmp_path / f"on_{ranks}", nano_path, data_root)
        lines = train(job, ranks)
        samples = job.parent / "run/samples"
        assert sorted(path.name for path in samples.iterdir()) == ["step-0", "step-2"]
        clip = probe_video(samples / "step-2/sample-01.mp4")
        assert (clip.width, clip.height, clip.frames) == (64, 64, 9)
        assert read_sound(samples / "step-2/sample-01.mp4").sample_rate == 48000
        assert (samples / "step-2/contact-sheet.png").stat().st_size > 0
        assert lines[1]["held_out/total"] > 0
        assert lines[1]["loss"] == pytest.approx(plain[1]["loss"], rel=1e-5)


def test_a_sample_that_cannot_be_made_is_refused_before_training(tmp_path, nano_path, data_root, caplog):
    job = job_with_validation(tmp_path, nano_path, data_root)
    assert main([str(job), "--validation.video_dims=[65,64,9]"]) == 1
    assert "video_dims" in caplog.text
    assert not (tmp_path / "run").exists()


def test_held_out_loss_needs_no_samples(tmp_path, nano_path, data_root):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1)
    job.write_text(job.read_text() + f'[validation]\ninterval = 1\nheld_out_root = "{data_root}"\n')
    train(job)
    assert read_run(job)[0]["held_out/video"] > 0
