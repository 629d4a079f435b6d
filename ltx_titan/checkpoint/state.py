"""Training state on disk: sharded model and optimizer by torch.distributed.checkpoint, and a small JSON of the rest.

Every rank writes its own shards and reads whatever boxes of them its own layout needs, so a job resumes on another
number of GPUs or another mesh, exactly. Names are the official ones, without wrapper levels: switching compile or
activation checkpointing on or off does not touch them.

The optimizer's tensors are saved as `optimizer.<parameter name>.<state name>`. Its settings (learning rate, betas,
weight decay) are not: they come from the job, so that an edited job means what it says.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from ltx_titan.checkpoint.folders import (
    TRAINER_FILE,
    find_damage,
    incomplete_folder,
    logger,
    read_state_metadata,
    read_trainer_state,
    remove_leftovers,
    remove_old,
    saved_steps,
    step_folder,
)
from ltx_titan.common.files import sync_folder
from ltx_titan.common.ranks import agree, is_main_rank
from ltx_titan.weights.tensors import module_tensors, parameter_names, plain_tensor

_LISTED = 10


def save_everything(name: str) -> bool:
    """The default `select`: every parameter and persistent buffer is saved."""
    return True


@dataclass(frozen=True)
class TrainingState:
    """What is saved and restored.

    Attributes:
        model: the built, sharded model.
        optimizers: each parameter belongs to at most one.
        select: names of the model tensors to save; training adapters on a frozen base, the adapters only.
        trainer: what else resuming needs, as JSON: step, data position, job text. Filled in by whoever saves.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer] = ()
    select: Callable[[str], bool] = save_everything
    trainer: dict[str, Any] = field(default_factory=dict)


def save_state(folder: str | Path, step: int, state: TrainingState, *, keep_last: int = 0) -> Path:
    """Saves the state of `step` under `<folder>/step-<step>`; all ranks call it and wait for each other.

    The folder must be one that all nodes share. Nothing that was complete is touched before the new state is
    complete; an interrupted save leaves only a folder that the next one clears away.

    Args:
        folder: the job's checkpoint folder.
        step: optimizer steps taken.
        state: what to save. `state.trainer` gets the key `step`.
        keep_last: how many complete steps to keep, the new one included; 0 keeps all.

    Returns:
        The complete step folder. If it exists already, nothing is written.

    Raises:
        RuntimeError: a rank could not write; raised on every rank.
    """
    return write_state(Path(folder), step, state_tensors(state), trainer_text(state, step), keep_last)


def load_state(path: str | Path, state: TrainingState) -> dict[str, Any]:
    """Restores a step folder into an already built model and its optimizers, in place; all ranks call it.

    Args:
        path: a complete step folder, see `latest_complete`.
        state: model, optimizers and selection as the resuming job builds them. `state.trainer` is ignored.

    Returns:
        The saved trainer state.

    Raises:
        ValueError: the folder is damaged, or holds other tensors than the job has; says which settings decide about
            them.
    """
    path = Path(path)
    damage = find_damage(path)
    if damage is not None:
        raise ValueError(f"Checkpoint {path} cannot be used: {damage}. Resume from an older step.")
    saved = read_state_metadata(path).state_dict_metadata
    _prime(state)
    _drop_unsaved_optimizer_state(state, set(saved))
    tensors = state_tensors(state)
    _check_same(path, saved, tensors)
    dcp.load(tensors, checkpoint_id=path)
    return read_trainer_state(path)


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """All tensors of a state by the name they are saved under, sharing storage with model and optimizers."""
    tensors = {f"model.{name}": tensor for name, tensor in module_tensors(state.model).items() if state.select(name)}
    names = parameter_names(state.model)
    for optimizer in state.optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                assert isinstance(value, Tensor), (
                    f"optimizer state '{key}' is {type(value).__name__}, expected a tensor"
                )
                tensors[f"optimizer.{names[parameter]}.{key}"] = plain_tensor(value)
    return tensors


def trainer_text(state: TrainingState, step: int) -> str:
    """The plain part of a state as it is written."""
    return json.dumps({**state.trainer, "step": step}, indent=1)


def write_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer: str,
    keep_last: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes collected tensors as a step folder; `save_state` says the rest. `group` carries the communication."""
    path, temporary = step_folder(folder, step), incomplete_folder(folder, step)
    what = f"saving {path}"
    already = _on_main_rank(lambda: _prepare(folder, step), what, group)
    if already:
        return path
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group)
    _on_main_rank(lambda: _publish(temporary, path, trainer), what, group)
    _on_main_rank(lambda: remove_old(folder, step, keep_last), f"removing old checkpoints in {folder}", group)
    return path


def _on_main_rank(work: Callable[[], Any], what: str, group: dist.ProcessGroup | None) -> Any:
    """Runs `work` on rank 0 while the others wait; its result on every rank, its failure as an error on every rank."""
    result, error = [None], None
    if is_main_rank():
        try:
            result = [work()]
        except Exception as failure:  # whatever it is, the other ranks must not be left waiting
            error = failure
    agree(error, what, group)
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0, group=group)
    return result[0]


def _prepare(folder: Path, step: int) -> bool:
    """Clears the way for a save; True if that step is saved already."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    path = step_folder(folder, step)
    if step not in saved_steps(folder):
        return False
    damage = find_damage(path)
    if damage is None:
        logger.info("Step %d is saved already in %s.", step, path)
        return True
    logger.warning("Replacing the damaged checkpoint %s (%s).", path, damage)
    shutil.rmtree(path)
    return False


def _publish(temporary: Path, path: Path, trainer: str) -> None:
    """Completes a written folder and gives it its final name."""
    with (temporary / TRAINER_FILE).open("w") as file:
        file.write(trainer)
        file.flush()
        os.fsync(file.fileno())
    # Every rank has reported success, so a file missing here was written on another node's own disk.
    damage = find_damage(temporary)
    if damage is not None:
        raise RuntimeError(f"{temporary}: {damage}. Do all nodes share job.dump_folder?")
    sync_folder(temporary)
    temporary.rename(path)
    sync_folder(path.parent)


def _prime(state: TrainingState) -> None:
    """Gives a fresh optimizer the state tensors it would have after a step, so that there is something to load into.

    One step with zero gradients and learning rate makes them, whatever the optimizer. What it does to the parameters
    (at most a change of sign of zero, or a random rounding) is overwritten: every trained parameter is loaded
    afterwards.
    """
    for optimizer in state.optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter in optimizer.state for parameter in parameters if parameter.requires_grad):
            continue
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)


def _drop_unsaved_optimizer_state(state: TrainingState, saved: set[str]) -> None:
    """A parameter without a gradient so far has no optimizer state in the checkpoint; nor shall it have now."""
    if not any(name.startswith("optimizer.") for name in saved):
        return  # saved by an optimizer without state: dropping all of it would hide that the job's has changed
    names = parameter_names(state.model)
    for optimizer in state.optimizers:
        for parameter, values in list(optimizer.state.items()):
            name = names[parameter]
            is_known = f"model.{name}" in saved
            if is_known and not any(f"optimizer.{name}.{key}" in saved for key in values):
                del optimizer.state[parameter]


def _check_same(path: Path, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises with all differences between saved tensors and the job's, and the settings they come from."""
    missing = [name for name in tensors if name not in saved]
    unexpected = [name for name in saved if name not in tensors]
    changed = []
    for name in tensors.keys() & saved.keys():
        entry = saved[name]
        size = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        dtype = entry.properties.dtype if isinstance(entry, TensorStorageMetadata) else None
        if (size, dtype) != (tuple(tensors[name].shape), tensors[name].dtype):
            changed.append(
                f"{name} (saved {_text(size, dtype)}, job {_text(tensors[name].shape, tensors[name].dtype)})"
            )
    lists = {
        "missing from the checkpoint": missing,
        "in the checkpoint without a place in the job": unexpected,
        "of another shape or dtype": sorted(changed),
    }
    lines = [f"  {len(names)} {what}: {_first(names)}" for what, names in lists.items() if names]
    if lines:
        settings = sorted({_setting_behind(name) for names in lists.values() for name in names})
        raise ValueError(
            f"Checkpoint {path} does not fit this job; nothing was loaded.\n"
            + "\n".join(lines)
            + f"\nCompare {', '.join(settings)} with the job text saved in {path / TRAINER_FILE}, "
            "or set another job.dump_folder to start afresh."
        )


def _setting_behind(name: str) -> str:
    """The job setting that most likely decides whether and how a tensor exists."""
    if "lora_" in name:
        return "lora.rank, lora targets and model.mode"
    if name.startswith("optimizer."):
        return "optimizer.name and its precision"
    return "model.checkpoint_path, model.mode and which of [video] and [audio] are trained"


def _first(names: list[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _text(shape: Sequence[int] | None, dtype: torch.dtype | None) -> str:
    return "not a tensor" if shape is None else f"{list(shape)} {dtype}".replace("torch.", "")
