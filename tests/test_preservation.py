"""Preservation end to end: drift from the base falls, other figures stay those of the loss, and runs resume."""

import shutil
from pathlib import Path

import pytest
import torch

from ltx_titan.conditioning import ModelInputs
from ltx_titan.config import ConfigError, PreservationSection, load_job
from ltx_titan.plan import plan_job
from ltx_titan.train.preservation import Preservation
from tests.jobs import NO_CHECKPOINTS, curve, read_run, train, write_job
from tests.lora.adapted import adapted, golden_inputs, settings, transformer

LORA = {
    "model__mode": "lora",
    "lora__targets": ["video"],
    "lora__base_dtype": "float32",
    "optimizer__lr": 0.03,
    "training__steps": 4,
    "training__global_batch_size": 2,
}
PARTS = ("loss/prior", "loss/blank_prompt")


def write(folder: Path, nano_path: Path, data_root: Path, **settings: object) -> Path:
    """A LoRA job on the video alone, with two micro-batches of one sample in a step."""
    job = write_job(folder, nano_path, data_root, **LORA, **settings)
    job.write_text(job.read_text().replace('[audio]\nis_generated = true\nlatents_dir = "audio_latents"\n', ""))
    return job


@pytest.fixture(scope="module")
def jobs(tmp_path_factory, nano_path, data_root) -> dict[float, Path]:
    """Finished jobs by weight; one of 1e-9 measures the drift and changes nothing else."""
    folder, found = tmp_path_factory.mktemp("preservation"), {}
    for weight, saves in ((1e-9, NO_CHECKPOINTS), (30.0, {"checkpoint__interval": 3, "checkpoint__export": False})):
        weights = {f"preservation__{part}_weight": weight for part in ("prior", "blank_prompt")}
        job = found[weight] = write(folder / str(weight), nano_path, data_root, **weights, **saves)
        train(job)
    return found


def test_preservation_lowers_the_drift_from_the_base_with_and_without_captions(jobs):
    for part in PARTS:
        free, kept = ([line[part] for line in read_run(jobs[weight])] for weight in (1e-9, 30.0))
        # B is zero before the first update: the model is its base, up to rounding.
        assert free[0] < 1e-10
        assert free[-1] > 1e-4
        assert kept[-1] < 0.5 * free[-1]


def test_the_loss_is_the_sum_of_its_parts(jobs):
    for weight, job in jobs.items():
        for line in read_run(job):
            parts = line["loss_video"] + weight * sum(line[part] for part in PARTS)
            assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_a_resumed_run_equals_the_unbroken_one(jobs):
    unbroken = curve(read_run(jobs[30.0])), [[line[part] for part in PARTS] for line in read_run(jobs[30.0])]
    shutil.rmtree(jobs[30.0].parent / "run/checkpoint/step-4")
    resumed = train(jobs[30.0])
    assert (curve(resumed), [[line[part] for part in PARTS] for line in resumed]) == unbroken


def test_targets_are_the_velocities_of_the_base_alone():
    video, audio = golden_inputs()
    model, base = adapted(settings()), transformer()
    target = torch.zeros_like(video.latent[:, 1:])
    inputs = ModelInputs(video, audio, target, None, torch.ones(target.shape[:2]) > 0, None)
    found = Preservation(model, PreservationSection(prior_weight=1.0)).base_targets(inputs)
    with torch.no_grad():
        expected, _ = base(video, audio)
        changed, _ = model(video, audio)
    torch.testing.assert_close(found.video_target, expected[:, 1:])
    assert found.audio_target is None
    assert (changed - expected).abs().max() > 1e-3


def test_a_job_that_has_no_base_or_no_captions_to_leave_out_is_refused(tmp_path, nano_path, data_root):
    full = write_job(tmp_path / "full", nano_path, data_root, preservation__prior_weight=1.0)
    with pytest.raises(ConfigError, match=r"preservation\.prior_weight = 1\.0.*keeps no base"):
        load_job(full)
    synthetic = {"data__source": "synthetic", "preservation__blank_prompt_weight": 1.0}
    job = write(tmp_path / "contexts", nano_path, data_root, **synthetic)
    with pytest.raises(ValueError, match=r"blank_prompt_weight.*finished contexts"):
        plan_job(load_job(job, ["--video.conditions=[]"]), 1)
