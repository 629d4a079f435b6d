"""`ltx-titan doctor`: what is broken is found, named and given a remedy."""

import stat

import pytest
import torch

from ltx_titan.cli import main
from ltx_titan.commands import doctor
from tests.jobs import small_validation, write_dataset, write_job


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(doctor, "_PROBE_BYTES", 2**20)


def lines(capsys):
    return capsys.readouterr().out.splitlines()


def test_a_machine_and_a_job_in_order(tmp_path, nano_path, data_root, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_SLOW_BYTES_PER_S", 0)  # the disk of a busy machine is slow
    job = write_job(tmp_path, nano_path, data_root, **small_validation(nano_path, samples=[{"prompt": "x"}]))
    assert main(["doctor", str(job)]) == 0
    printed = lines(capsys)
    for subject in ("python", "memory", "disk", "job", "checkpoint", "data", "validation"):
        assert any(line.startswith("ok") and subject in line for line in printed), subject
    assert printed[-1].startswith("0 broken")
    # The probe of the disk is removed.
    assert not list(tmp_path.glob(".ltx-titan*"))


def test_without_a_job_or_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda query: [])
    assert main(["doctor", "--disk", str(tmp_path)]) == 0
    printed = lines(capsys)
    assert any(line.startswith("warning") and "none found" in line for line in printed)


def test_a_build_without_cuda_on_a_machine_with_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(doctor, "_nvidia_smi", lambda query: [["H100", "550.1", "81559 MiB", "0 MiB"]])
    assert main(["doctor", "--disk", str(tmp_path)]) == 1
    text = "\n".join(lines(capsys))
    assert "build without CUDA" in text
    # Without --force-reinstall pip takes the installed build for the one that is asked for.
    assert "-> install a CUDA build: " in text
    assert "pip install --force-reinstall torch==" in text


@pytest.mark.parametrize("damage", ["checkpoint", "data", "validation", "job"])
def test_what_is_broken_is_named_with_its_remedy(damage, tmp_path, nano_path, capsys):
    root = write_dataset(tmp_path / "data", nano_path, clips=2)
    checkpoint, more = tmp_path / "model.safetensors", {}
    content = bytearray(nano_path.read_bytes())
    if damage == "checkpoint":
        content = content[:-100]
    checkpoint.write_bytes(content)
    if damage == "data":
        (root / "latents" / "clip_1.pt").write_bytes(b"damaged")
    if damage == "validation":
        more = small_validation(nano_path, samples=[{"prompt": "x"}]) | {"validation__text_encoder_path": None}
        more = {key: value for key, value in more.items() if value is not None}
    job = write_job(tmp_path, checkpoint, root, **more)
    if damage == "job":
        job.write_text(job.read_text() + "\n[lora]\nrnak = 3\n")
    assert main(["doctor", str(job)]) == 1
    printed = lines(capsys)
    broken = next(index for index, line in enumerate(printed) if line.startswith("broken"))
    named = {"checkpoint": "model.safetensors", "data": "clip_1", "validation": "text_encoder_path", "job": "rnak"}
    remedies = [line for line in printed[broken:] if line.strip().startswith("->")]
    assert named[damage] in "\n".join(printed[broken:])
    assert remedies


def test_packages_are_compared_with_what_the_project_requires(tmp_path, monkeypatch, capsys):
    versions = {"torchao": "0.1.0", "diffusers": None}
    version = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: versions.get(name, version(name)) if name in versions else version(name)
    )
    assert main(["doctor", "--disk", str(tmp_path), "--quiet"]) == 1
    printed = "\n".join(lines(capsys))
    assert "torchao 0.1.0: expected" in printed
    assert "pip install 'diffusers" in printed
    assert "ok       " not in printed


def test_gpus_are_read_from_the_driver(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559 MiB, 3 MiB'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert doctor._nvidia_smi("name") == [["NVIDIA H100 80GB HBM3", "550.54.15", "81559 MiB", "3 MiB"]]
    program.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._nvidia_smi("name") == []
