"""A job with schedule-free AdamW: exact resume, and the average of the weights wherever the model is used."""

import shutil
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ltx_titan.checkpoint import SavedTensors
from ltx_titan.commands.export import ExportOptions, export_checkpoint
from ltx_titan.common.tensors import local
from ltx_titan.validation import training
from tests.jobs import curve, train, write_job

SETTINGS = {
    "model__mode": "lora",
    "lora__targets": ["attn1.to_q"],
    "training__steps": 3,
    "training__global_batch_size": 1,
    "optimizer__name": "adamw_schedulefree",
    "optimizer__lr": 1e-2,
    "scheduler__name": "constant",
    "scheduler__warmup_steps": 1,
    "checkpoint__interval": 2,
    "validation__interval": 3,
    "validation__skip_initial_validation": True,
    "validation__held_out_samples": 1,
}


class Run(NamedTuple):
    """What one run of the job made."""

    curve: list
    evaluated: dict[str, Tensor]
    exported: dict[str, Tensor]
    saved: dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, nano_path, data_root) -> tuple[Run, Run, dict[str, Tensor]]:
    """Three steps at once; the third one again, from the checkpoint after two; and the export of that after three."""
    folder = tmp_path_factory.mktemp("schedule_free")
    job = write_job(folder, nano_path, data_root, **SETTINGS, validation__held_out_root=str(data_root))
    evaluated = {}

    def held_out_losses(model, *args):
        evaluated.update({name: local(p).detach().clone() for name, p in model.named_parameters() if p.requires_grad})
        return {}

    def run():
        lines = train(job)
        checkpoint = SavedTensors(folder / "run/checkpoint/step-3")
        saved = {name: checkpoint.read(name) for name in checkpoint.entries}
        return Run(curve(lines), dict(evaluated), load_file(folder / "run/export/lora-step-3.safetensors"), saved)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "held_out_losses", held_out_losses)
        straight = run()
        export_checkpoint(ExportOptions(folder / "run/checkpoint/step-3", folder / "again.safetensors"))
        shutil.rmtree(folder / "run/checkpoint/step-3")
        return straight, run(), load_file(folder / "again.safetensors")


def test_a_resumed_job_equals_the_unbroken_one(runs):
    straight, resumed, _ = runs
    assert resumed.curve == straight.curve
    assert any(name.endswith(".weight_sum") for name in straight.saved)
    for one, two in ((straight.saved, resumed.saved), (straight.exported, resumed.exported)):
        assert one.keys() == two.keys()
        assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


def test_the_average_is_evaluated_and_exported_and_training_continues_with_the_trained_weights(runs):
    straight, *_ = runs
    for name, average in straight.evaluated.items():
        assert torch.equal(straight.exported[f"diffusion_model.{name}"], average)
        assert not torch.equal(straight.saved[f"model.{name}"], average)


def test_the_export_of_a_checkpoint_is_that_of_the_run(runs):
    straight, _, again = runs
    assert again.keys() == straight.exported.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in straight.exported.items())
