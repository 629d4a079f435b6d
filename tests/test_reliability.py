"""Promises of docs/reliability.md that concern a whole run."""

import pytest
import torch

from ltx_titan.common.files import claimed
from ltx_titan.config import load_job
from ltx_titan.train import main
from tests.jobs import train, write_job


def test_a_run_without_its_export_is_not_finished(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1)
    train(job)
    export = tmp_path / "run/export/transformer-step-1.safetensors"
    expected = export.read_bytes()
    export.rename(export.with_name(f"{export.name}.tmp.1.0123abcd"))  # killed before the rename
    (tmp_path / "run/checkpoint/step-9.incomplete").mkdir()
    assert main([str(job)]) == 0
    assert export.read_bytes() == expected
    assert [entry.name for entry in export.parent.iterdir()] == [export.name]
    assert [entry.name for entry in (tmp_path / "run/checkpoint").iterdir()] == ["step-1"]


def test_an_update_that_overflows_is_neither_saved_nor_exported(tmp_path, nano_path, data_root, caplog, monkeypatch):
    def overflow(optimizers):
        with torch.no_grad():
            next(iter(optimizers.parts[0].param_groups[0]["params"])).fill_(float("nan"))

    monkeypatch.setattr("ltx_titan.optim.build.Optimizers.step", overflow)
    settings = {"optimizer__in_backward": True, "training__local_batch_size": 4, "training__max_grad_norm": 0.0}
    assert main([str(write_job(tmp_path, nano_path, data_root, training__steps=1, **settings))]) == 1
    assert "step 1: model." in caplog.text
    assert "contains NaN or infinity" in caplog.text
    assert not (tmp_path / "run/export").exists()
    assert not (tmp_path / "run/checkpoint").exists()


def test_a_learning_rate_above_1_is_refused(tmp_path, nano_path, data_root):
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        load_job(write_job(tmp_path, nano_path, data_root, optimizer__lr=1e39))


def test_a_dump_folder_has_one_user_who_is_named(tmp_path, nano_path, data_root, caplog):
    job = write_job(tmp_path, nano_path, data_root, training__steps=1)
    with claimed(tmp_path / "run"):
        assert main([str(job)]) == 1
    assert "is in use by process" in caplog.text
    assert " on " in caplog.text
    assert not (tmp_path / "run/metrics.jsonl").exists()
