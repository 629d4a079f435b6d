"""A checkpoint path that is not a transformer is refused with an explanation before anything is built."""

import logging

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx_titan.cli import main as command_line
from ltx_titan.config import load_job
from ltx_titan.plan import plan_job
from ltx_titan.train import main as train
from tests.jobs import write_job

MESSAGE = r"vae\.safetensors: .*holds an autoencoder and no transformer\. Set model\.checkpoint_path to an official"


@pytest.fixture
def vae_job(tmp_path, nano_path, data_root):
    """A job whose checkpoint is the video VAE of a split pack."""
    with safe_open(nano_path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor for key, tensor in load_file(nano_path).items() if key.startswith("vae.")}
    save_file(tensors, tmp_path / "vae.safetensors", metadata | {"config": '{"vae": {"patch_size": 4}}'})
    return write_job(tmp_path, tmp_path / "vae.safetensors", data_root)


def test_planning_refuses_a_file_without_a_transformer(vae_job):
    with pytest.raises(ValueError, match=MESSAGE):
        plan_job(load_job(vae_job), 1)


def test_training_prints_the_message_without_a_traceback(vae_job, caplog):
    with caplog.at_level(logging.ERROR):
        assert train([str(vae_job)]) == 1
    assert "holds an autoencoder and no transformer" in caplog.text
    assert "Traceback" not in caplog.text


def test_estimating_prints_the_message(vae_job, capsys):
    assert command_line(["estimate", str(vae_job)]) == 1
    assert "holds an autoencoder and no transformer" in capsys.readouterr().err
