"""Whole-step CUDA graphs around a validation, which frees and records them again."""

import subprocess
import sys

import pytest

from tests.jobs import curve, read_run, write_job

COMPILED = {"compile__enable": True, "compile__graphs": "on"}


def losses(folder, nano_path, data_root, **settings):
    job = write_job(
        folder,
        nano_path,
        data_root,
        model__mode="lora",
        lora__targets=["all_attention"],
        training__dtype="bfloat16",
        training__steps=14,
        training__global_batch_size=1,
        checkpoint__enable=False,
        **settings,
    )
    # A process of its own, whose process group is that of the device.
    subprocess.run([sys.executable, "-m", "ltx_titan.train", str(job)], check=True)
    return curve(read_run(job))


@pytest.mark.gpu
def test_a_validation_between_replayed_graphs_changes_no_loss(tmp_path, nano_path, data_root):
    held_out = {"validation__held_out_root": str(data_root), "validation__held_out_samples": 2}
    validating = {"validation__interval": 4, "validation__samples": [], **held_out}
    never = {**validating, "validation__interval": 1000}
    expected = losses(tmp_path / "without", nano_path, data_root, **COMPILED, **never)
    assert losses(tmp_path / "with", nano_path, data_root, **COMPILED, **validating) == expected
