"""`ltx-titan export`: the bytes that training exports, from any mesh's checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ltx_titan.checkpoint.digests import signed
from ltx_titan.cli import main
from tests.jobs import train, write_dataset, write_job

LORA = {"model__mode": "lora", "lora__rank": 4, "lora__alpha": 8.0}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("settings", "ranks", "name"),
    [
        ({}, 2, "transformer-step-2.safetensors"),
        (LORA, 2, "lora-step-2.safetensors"),
        ({**LORA, "lora__dora": True}, 1, "transformer-step-2.safetensors"),
    ],
    ids=["full", "lora", "dora"],
)
def test_a_checkpoint_exports_to_the_bytes_that_training_wrote(
    tmp_path, nano_path, data_root, capsys, settings, ranks, name
):
    train(write_job(tmp_path, nano_path, data_root, training__steps=2, **settings), ranks)
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run/checkpoint/step-2"), str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (tmp_path / "run/export" / name).read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, nano_path) -> Path:
    """Checkpoint of one step, whose data is gone."""
    folder = tmp_path_factory.mktemp("trained")
    data_root = write_dataset(folder / "data", nano_path)
    train(write_job(folder, nano_path, data_root, training__steps=1, checkpoint__export=False))
    shutil.rmtree(data_root)
    return folder / "run/checkpoint/step-1"


@pytest.fixture
def step(trained, tmp_path) -> Path:
    """A copy of that checkpoint, which a test may damage."""
    return shutil.copytree(trained, tmp_path / "run/checkpoint/step-1")


def test_export_needs_neither_data_nor_gpu_nor_ranks_and_takes_another_dtype(tmp_path, step):
    out = tmp_path / "new" / "model.safetensors"
    assert main(["export", str(step), str(out), "--dtype", "bfloat16"]) == 0
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.bfloat16}


@pytest.mark.parametrize("what", ["missing", "damaged", "not a step", "wrong name"])
def test_what_cannot_be_exported_is_named_in_one_line(tmp_path, step, capsys, what):
    out, expected = tmp_path / "out.safetensors", str(step)
    if what == "missing":
        step = tmp_path / "run/checkpoint/step-7"
        expected = "step-7 cannot be used"
    elif what == "damaged":
        shard = next(step.glob("*.distcp"))
        shard.write_bytes(bytes(shard.stat().st_size))  # zeros, as a power cut or a sparse copy leaves them
        expected = "is not what was saved"
    elif what == "not a step":
        step = tmp_path / "run"
        expected = "trainer.json is missing"
    else:
        out = tmp_path / "out.pt"
        expected = "expected a file name that ends in .safetensors"
    assert main(["export", str(step), str(out)]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert not out.exists()
    assert not list(tmp_path.glob("*.tmp.*"))


@pytest.mark.parametrize("key", ["model.checkpoint_path", "model.connectors_path"])
def test_an_export_does_not_replace_the_files_that_it_is_made_of(tmp_path, step, nano_path, capsys, key):
    base = shutil.copyfile(nano_path, tmp_path / "base.safetensors")
    trainer = json.loads((step / "trainer.json").read_text())
    trainer["job"]["model"][key.removeprefix("model.")] = str(base)
    (step / "trainer.json").write_text(json.dumps(signed({k: v for k, v in trainer.items() if k != "crc32"})))
    link = tmp_path / "out.safetensors"
    link.symlink_to(base)
    assert main(["export", str(step), str(link)]) == 1
    assert f"which is {key} of the job" in capsys.readouterr().err
    assert base.read_bytes() == nano_path.read_bytes()
