"""Checkpoints under attack: values that are not finite, failed saves, damaged and hostile files."""

import logging
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW

from ltx_titan.checkpoint import (
    BackgroundSaver,
    DamagedError,
    TrainingState,
    complete_folders,
    first_not_finite,
    latest_complete,
    load_state,
    save_state,
    set_aside,
    state_tensors,
)
from tests.checkpoint.toy import LAYOUTS, toy
from tests.processes import run_ranks


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(layout="plain"):
    module = LAYOUTS[layout](toy(0))
    optimizer = AdamW(module.parameters(), lr=1e-2)
    module(torch.ones(4, 5)).square().mean().backward()
    optimizer.step()
    return TrainingState(module, [optimizer])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.scale_shift_table", "optimizer.patchify_proj.weight.exp_avg_sq"])
def test_one_value_that_is_not_finite_is_found_by_name(value, name):
    tensors = state_tensors(trained())
    assert first_not_finite(tensors) is None
    tensors[name].view(-1)[-1] = value
    assert first_not_finite(tensors) == name


def test_integers_empty_tensors_and_every_float_dtype_are_accepted():
    tensors = {str(dtype): torch.ones(3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)}
    tensors |= {"codes": torch.ones(3, dtype=torch.uint8), "empty": torch.empty(0), "scalar": torch.tensor(1.0)}
    tensors["fp8"] = torch.ones(3).to(torch.float8_e4m3fn)
    assert first_not_finite(tensors) is None
    tensors["torch.bfloat16"][1] = float("nan")
    assert first_not_finite(tensors) == "torch.bfloat16"


def find_on_the_last_rank():
    state = trained("fsdp")
    shard = state.model.transformer_blocks[1].attn1.to_q.weight.to_local()
    if dist.get_rank() == 1:
        with torch.no_grad():
            shard[-1, -1] = float("nan")
    return first_not_finite(state_tensors(state))


@pytest.mark.distributed
def test_a_value_on_one_rank_is_found_on_all():
    assert run_ranks(find_on_the_last_rank, 2) == ["model.transformer_blocks.1.attn1.to_q.weight"] * 2


def fail_twice_then_save(folder):
    saver, state = BackgroundSaver(folder), trained("fsdp")
    folder.mkdir(exist_ok=True)
    outcomes = []
    for step in (1, 2, 3):
        if dist.get_rank() == 0 and step < 3:
            (folder / f"step-{step}").write_text("in the way of the rename")
        dist.barrier()
        saver.save(step, state)
        outcomes.append(saver.settle())
        assert not saver.has_failed
    saver.close()
    return outcomes


@pytest.mark.distributed
def test_a_failed_background_save_is_known_on_every_rank_and_the_next_one_succeeds(tmp_path):
    folder = tmp_path / "checkpoint"
    assert run_ranks(fail_twice_then_save, 2, folder) == [[False, False, True]] * 2
    assert latest_complete(folder) == folder / "step-3"


def test_three_failed_saves_in_a_row_end_the_run(tmp_path, one_rank):
    saver, state = BackgroundSaver(tmp_path / "checkpoint"), trained()
    (tmp_path / "checkpoint").write_text("a file")
    for step in (1, 2):
        saver.save(step, state)
        assert not saver.settle()
    saver.save(3, state)
    with pytest.raises(OSError, match="checkpoint"):
        saver.settle()
    saver.close()


def test_a_complete_background_save_is_announced(tmp_path, one_rank, caplog):
    saver = BackgroundSaver(tmp_path)
    with caplog.at_level(logging.INFO, "ltx_titan"):
        saver.save(7, trained())
        saver.close()
    assert "checkpoint of step 7 is complete" in caplog.text


def test_a_shard_of_zeros_is_damage_and_the_older_checkpoint_loads(tmp_path, one_rank):
    state = trained()
    for step in (1, 2):
        save_state(tmp_path, step, state)
    shard = tmp_path / "step-2" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DamagedError, match="step-2 cannot be used"):
        load_state(tmp_path / "step-2", state)
    set_aside(tmp_path / "step-2")
    assert list(complete_folders(tmp_path)) == [tmp_path / "step-1"]
    assert load_state(tmp_path / "step-1", state)["step"] == 1
    # The step is saved again when training reaches it.
    save_state(tmp_path, 2, state)
    assert load_state(tmp_path / "step-2", state)["step"] == 2


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": null}', '{"step": "2"}', '{"step": -1}', "nonsense", ""])
def test_a_wrong_trainer_state_is_damage(tmp_path, one_rank, text):
    for step in (1, 2):
        save_state(tmp_path, step, trained())
    (tmp_path / "step-2" / "trainer.json").write_text(text)
    assert latest_complete(tmp_path) == tmp_path / "step-1"


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"state": [bomb]}], ids=["bare", "nested"])
def test_metadata_from_a_stranger_runs_no_code(tmp_path, one_rank, caplog, wrap):
    for step in (1, 2):
        save_state(tmp_path, step, trained())
    (tmp_path / "step-2" / ".metadata").write_bytes(pickle.dumps(wrap(Touch(tmp_path / "owned"))))
    assert latest_complete(tmp_path) == tmp_path / "step-1"
    with pytest.raises(DamagedError, match="which checkpoint metadata never contains"):
        load_state(tmp_path / "step-2", trained())
    assert not (tmp_path / "owned").exists()


def test_metadata_cannot_name_files_outside_its_folder(tmp_path, one_rank):
    save_state(tmp_path, 1, trained())
    file = tmp_path / "step-1" / ".metadata"
    # Same length, so the pickle stays valid.
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../../etc"))
    assert latest_complete(tmp_path) is None
