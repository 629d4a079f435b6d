"""Every changed byte of a checkpoint is found, or is without effect; a damaged one falls back to an older one."""

import json
import random
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW

from ltx_titan.checkpoint import (
    DamagedError,
    SavedTensors,
    TrainingState,
    latest_complete,
    load_state,
    save_state,
    state_tensors,
)
from tests.checkpoint.toy import LAYOUTS, toy
from tests.processes import run_ranks

FLIPS = 80


def trained(layout="plain"):
    module = LAYOUTS[layout](toy(0))
    optimizer = AdamW(module.parameters(), lr=1e-2)
    module(torch.ones(4, 5)).square().mean().backward()
    optimizer.step()
    return TrainingState(module, [optimizer], trainer={"job": {"lr": 1e-2}, "note": "text"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps of a run, saved by one rank."""
    folder = tmp_path_factory.mktemp("digests")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for step in (1, 2):
        save_state(folder, step, trained())
    yield folder
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "trainer.json"])
def test_every_flipped_bit_is_found_or_changes_nothing(saved, name):
    file, state = saved / "step-2" / name, trained()
    whole, found, rng = file.read_bytes(), 0, random.Random(7)
    expected = {key: tensor.clone() for key, tensor in state_tensors(state).items()}
    before = load_state(saved / "step-2", state)
    try:
        for _ in range(FLIPS):
            position, bit = rng.randrange(len(whole)), rng.randrange(8)
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            try:
                assert load_state(saved / "step-2", state) == before, (position, bit)
                tensors = state_tensors(state)
                assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items()), (position, bit)
            except DamagedError:
                found += 1
                with pytest.raises(DamagedError, match="step-2 cannot be used"):
                    SavedTensors(saved / "step-2")
    finally:
        file.write_bytes(whole)
    # A shard and the metadata have no byte without effect; JSON can write one number in two ways (1e-05, 1E-05).
    assert found == FLIPS if name != "trainer.json" else found > 0.9 * FLIPS


def test_a_shard_of_another_save_is_found(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    shutil.copy(tmp_path / "run/step-1/.metadata", tmp_path / "run/step-2/.metadata")
    assert latest_complete(tmp_path / "run") == tmp_path / "run/step-1"
    state = trained()
    with torch.no_grad():
        state.model.scale_shift_table += 1
    save_state(tmp_path / "run", 3, state)
    shutil.copy(tmp_path / "run/step-1/__0_0.distcp", tmp_path / "run/step-3/__0_0.distcp")
    with pytest.raises(DamagedError, match=r"__0_0\.distcp is .*the file of another save"):
        load_state(tmp_path / "run/step-3", trained())


def test_checkpoints_without_digests_still_load(saved, tmp_path):
    shutil.copytree(saved / "step-1", tmp_path / "step-1")
    file = tmp_path / "step-1" / "trainer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key not in ("files", "crc32")}))
    assert load_state(tmp_path / "step-1", trained())["step"] == 1


def save_and_damage(folder):
    state = trained("fsdp")
    for step in (1, 2):
        save_state(folder, step, state)
    dist.barrier()
    if dist.get_rank() == 0:
        # Of rank 1, and read by rank 1: rank 0 learns of it all the same.
        shard = folder / "step-2" / "__1_0.distcp"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 4
        shard.write_bytes(content)
    dist.barrier()
    try:
        load_state(folder / "step-2", state)
    except DamagedError as error:
        return str(error), sorted(json.loads((folder / "step-1/trainer.json").read_text())["files"])
    return "", []


@pytest.mark.distributed
def test_a_damaged_shard_is_known_on_every_rank(tmp_path):
    results = run_ranks(save_and_damage, 2, tmp_path)
    assert all("__1_0.distcp is not what was saved" in message for message, _ in results)
    assert results[0][1] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
