import json
import logging
import math

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD, AdamW

from ltx_titan.checkpoint import (
    BackgroundSaver,
    KeepBest,
    TrainingState,
    best_steps,
    latest_complete,
    load_state,
    read_trainer_state,
    save_state,
    step_folder,
)
from ltx_titan.checkpoint import state as state_module
from ltx_titan.checkpoint.folders import saved_steps
from ltx_titan.checkpoint.state import state_tensors
from tests.checkpoint.toy import LAYOUTS, full, toy
from tests.processes import run_ranks


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone, as a job on one device has."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def job(layout="plain", seed=0, optimizer=AdamW, **trainer):
    module = LAYOUTS[layout](toy(seed))
    return TrainingState(module, [optimizer(module.parameters(), lr=1e-2)], trainer=trainer)


def train(state, steps, first=0):
    """Steps on data that depends on the step only, so that any layout sees the same."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 5, generator=generator)
        state.model(x).square().mean().backward()
        for optimizer in state.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def snapshot(state):
    return {name: full(tensor) for name, tensor in state_tensors(state).items()}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def save_on_two(folder):
    state = job("fsdp", data_position=24)
    train(state, 3)
    with torch.no_grad():
        state.model(torch.ones(1, 5))  # as validation does: FSDP leaves the root's parameters gathered
    path = save_state(folder / "two", 3, state)
    assert path == folder / "two" / "step-3"
    expected = snapshot(state)
    if dist.get_rank() == 0:
        torch.save(expected, folder / "expected.pt")


def reshard_on_four(folder):
    expected = torch.load(folder / "expected.pt")
    for layout in ("hsdp", "fsdp_tp", "wrapped"):
        state = job(layout, seed=1)
        trainer = load_state(folder / "two" / "step-3", state)
        assert trainer == {"step": 3, "data_position": 24}
        assert_equal(snapshot(state), expected)
        save_state(folder / layout, 3, state)


def return_to_two(folder):
    expected = torch.load(folder / "expected.pt")
    for layout in ("hsdp", "fsdp_tp", "wrapped"):
        state = job("fsdp", seed=2)
        load_state(latest_complete(folder / layout), state)
        assert_equal(snapshot(state), expected)


@pytest.mark.distributed
def test_state_is_bit_exact_from_two_ranks_to_four_and_back(tmp_path):
    run_ranks(save_on_two, 2, tmp_path)
    run_ranks(reshard_on_four, 4, tmp_path)
    run_ranks(return_to_two, 2, tmp_path)
    expected = torch.load(tmp_path / "expected.pt")
    assert expected["optimizer.patchify_proj.weight.step"] == 3
    assert expected["optimizer.patchify_proj.weight.exp_avg_sq"].abs().sum() > 0


def save_in_background(folder):
    saver = BackgroundSaver(folder, keep_last=2)
    state = job("fsdp")
    train(state, 1)
    expected = {1: snapshot(state)}
    saver.save(1, state)
    for step in (2, 3):
        # Training continues immediately: the copy must be written, not the state that later steps changed.
        train(state, 1, first=step - 1)
        expected[step] = snapshot(state)
        saver.save(step, state)
    train(state, 2)
    assert saver.wait() == step_folder(folder, 3)
    assert saved_steps(folder) == [2, 3]
    for step in (2, 3):
        resumed = job("fsdp", seed=1)
        load_state(step_folder(folder, step), resumed)
        assert_equal(snapshot(resumed), expected[step])

    (folder / "step-4").write_text("in the way")
    saver.save(4, state)
    with pytest.raises((OSError, RuntimeError), match="step-4"):
        saver.close()


@pytest.mark.distributed
def test_background_save_keeps_the_state_of_its_step(tmp_path):
    run_ranks(save_in_background, 2, tmp_path)


def test_resumed_training_equals_an_uninterrupted_run(tmp_path, one_rank):
    unbroken = job()
    train(unbroken, 5)

    broken = job()
    train(broken, 2)
    save_state(tmp_path, 2, broken)
    resumed = job(seed=1)
    load_state(latest_complete(tmp_path), resumed)
    train(resumed, 3, first=2)

    assert_equal(snapshot(resumed), snapshot(unbroken))


def test_a_parameter_that_never_had_a_gradient_has_no_state_after_resuming(tmp_path, one_rank):
    state = job()
    train(state, 1)
    resumed = job(seed=1)
    load_state(save_state(tmp_path, 1, state), resumed)
    assert resumed.model.keyframes_abs_pos_embedding not in resumed.optimizers[0].state
    assert len(resumed.optimizers[0].state) == len(state.optimizers[0].state) > 0


def test_settings_of_the_optimizer_come_from_the_job(tmp_path, one_rank):
    state = job()
    train(state, 1)
    resumed = job(seed=1)
    resumed.optimizers[0].param_groups[0]["lr"] = 0.5
    load_state(save_state(tmp_path, 1, state), resumed)
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.5


def test_frozen_parameters_are_neither_saved_nor_touched(tmp_path, one_rank):
    def is_trained(name):
        return name.startswith("patchify_proj")

    def adapter_job(seed):
        module = toy(seed)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(is_trained(name))
        optimizer = AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
        return TrainingState(module, [optimizer], select=is_trained)

    state = adapter_job(0)
    train(state, 1)
    path = save_state(tmp_path, 1, state)
    resumed = adapter_job(1)
    load_state(path, resumed)

    assert torch.equal(resumed.model.patchify_proj.weight, state.model.patchify_proj.weight)
    assert torch.equal(resumed.model.scale_shift_table, toy(1).scale_shift_table)
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def test_interrupted_save_leaves_the_previous_checkpoint_and_is_cleaned_up(tmp_path, one_rank, monkeypatch):
    state = job()
    train(state, 1)
    save_state(tmp_path, 1, state)

    def killed(*_):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(state_module, "_publish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            save_state(tmp_path, 2, state)
    assert latest_complete(tmp_path) == tmp_path / "step-1"
    assert (tmp_path / "step-2.incomplete").is_dir()

    save_state(tmp_path, 3, state)
    assert latest_complete(tmp_path) == tmp_path / "step-3"
    assert not (tmp_path / "step-2.incomplete").exists()


def test_nothing_saved_yet_is_none(tmp_path):
    assert latest_complete(tmp_path / "checkpoint") is None


@pytest.mark.parametrize("victim", [".metadata", "__0_0.distcp", "trainer.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_checkpoint_is_reported_and_an_older_one_used(tmp_path, one_rank, caplog, victim, how):
    state = job()
    train(state, 1)
    for step in (1, 2):
        save_state(tmp_path, step, state)
    file = tmp_path / "step-2" / victim
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-9])

    with caplog.at_level(logging.WARNING):
        assert latest_complete(tmp_path) == tmp_path / "step-1"
    assert "step-2" in caplog.text
    with pytest.raises(ValueError, match="step-2 cannot be used"):
        load_state(tmp_path / "step-2", state)

    # Training again up to that step replaces it.
    save_state(tmp_path, 2, state)
    assert latest_complete(tmp_path) == tmp_path / "step-2"


@pytest.mark.parametrize(("keep_last", "kept"), [(0, [1, 2, 3, 4]), (1, [4]), (2, [3, 4])])
def test_retention(tmp_path, one_rank, keep_last, kept):
    state = job()
    for step in (1, 2, 3, 4):
        save_state(tmp_path, step, state, keep_last=keep_last)
    assert saved_steps(tmp_path) == kept


@pytest.mark.parametrize(("higher", "count", "kept"), [(True, 1, [1, 5]), (False, 2, [2, 4, 5])])
def test_the_best_checkpoints_are_kept_besides_the_newest(tmp_path, one_rank, higher, count, kept):
    keep_best = KeepBest("held_out/total", higher, count)
    # Step 3 has no value and step 5 none that is finite; those of steps 2 and 4 are equal, and the earlier is better.
    for step, value in enumerate((3.0, 1.0, None, 1.0, math.inf), start=1):
        metrics = {} if value is None else {"held_out/total": value}
        save_state(tmp_path, step, job(metrics=metrics), keep_last=1, keep_best=keep_best)
    assert saved_steps(tmp_path) == kept
    assert list(best_steps(tmp_path, keep_best)) == [step for step in kept if step < 5]


def test_retention_does_not_count_a_damaged_checkpoint(tmp_path, one_rank):
    state = job()
    for step in (1, 2):
        save_state(tmp_path, step, state)
    (tmp_path / "step-2" / ".metadata").unlink()
    save_state(tmp_path, 3, state, keep_last=2)
    assert (tmp_path / "step-1").is_dir()


def test_saving_a_step_again_keeps_it(tmp_path, one_rank):
    state = job(note="first")
    save_state(tmp_path, 2, state, keep_last=1)
    save_state(tmp_path, 2, job(seed=1, note="second"), keep_last=1)
    assert read_trainer_state(tmp_path / "step-2")["note"] == "first"


def test_a_different_job_is_refused_with_the_setting_responsible(tmp_path, one_rank):
    state = job()
    train(state, 1)
    path = save_state(tmp_path, 1, state)

    with pytest.raises(ValueError, match=r"optimizer\.patchify_proj\.weight\.exp_avg.*\n.*optimizer\.name"):
        load_state(path, job(optimizer=SGD))

    module = toy(audio=True)
    module.scale_shift_table = torch.nn.Parameter(torch.zeros(3, 12))
    with pytest.raises(ValueError, match="nothing was loaded") as failure:
        load_state(path, TrainingState(module))
    assert "model.audio_patchify_proj.weight" in str(failure.value)
    assert "model.scale_shift_table (saved [2, 12] float32, job [3, 12] float32)" in str(failure.value)
    assert not module.scale_shift_table.any()


def test_an_optimizer_cannot_be_resumed_from_a_checkpoint_without_its_state(tmp_path, one_rank):
    state = job(optimizer=SGD)
    train(state, 1)
    path = save_state(tmp_path, 1, state)
    with pytest.raises(ValueError, match=r"optimizer\.name"):
        load_state(path, job())


def test_trainer_state_is_plain_text(tmp_path, one_rank):
    path = save_state(tmp_path, 7, job(job="[training]\nsteps = 9\n", notes=["resumed"]))
    content = json.loads((path / "trainer.json").read_text())
    assert sorted(content.pop("files")) == [".metadata", "__0_0.distcp"]
    assert isinstance(content.pop("crc32"), int)
    assert content == {
        "step": 7,
        "job": "[training]\nsteps = 9\n",
        "notes": ["resumed"],
    }
