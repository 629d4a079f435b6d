"""Training state on disk: sharded model and optimizer by torch.distributed.checkpoint, and a small JSON of the rest.

Every rank writes its own shards and reads the parts that its own layout needs, so a job resumes bit-exactly on another
number of GPUs or another mesh. Names are the official ones, without wrapper levels: they are the same with and without
compile and activation checkpointing.

The optimizer's tensors are saved as `optimizer.<parameter name>.<state name>`. Its settings (learning rate, betas,
weight decay) are not saved: they come from the job, so that changing them in the job takes effect.
"""

import json
import logging
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
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from ltx_titan.checkpoint.digests import FILES_KEY, Digests, DigestWriter, changed_file, file_digest, signed
from ltx_titan.checkpoint.folders import (
    TRAINER_FILE,
    KeepBest,
    find_damage,
    incomplete_folder,
    read_digests,
    read_state_metadata,
    read_trainer_state,
    remove_leftovers,
    remove_old,
    saved_steps,
    step_folder,
)
from ltx_titan.checkpoint.reader import METADATA_FILE, StateReader
from ltx_titan.common.failure import RunError
from ltx_titan.common.files import describe_free, sync_folder
from ltx_titan.common.ranks import agree, is_main_rank
from ltx_titan.weights import module_tensors, parameter_names, plain_tensor
from ltx_titan.weights.names import listed

logger = logging.getLogger(__name__)


class SaveError(RunError):
    """A checkpoint could not be written; older ones are whole."""


class DamagedError(ValueError):
    """A checkpoint cannot be read."""


def save_everything(name: str) -> bool:
    """The default `select`: every parameter and persistent buffer is saved."""
    return True


@dataclass(frozen=True)
class TrainingState:
    """Everything that is saved and restored.

    Attributes:
        model: the built, sharded model.
        optimizers: each parameter belongs to at most one.
        select: predicate on names of model tensors to save; LoRA jobs save the adapters only.
        trainer: other state that resuming needs, as JSON: data position, job text. Used by saving only.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer] = ()
    select: Callable[[str], bool] = save_everything
    trainer: dict[str, Any] = field(default_factory=dict)


def save_state(
    folder: str | Path, step: int, state: TrainingState, *, keep_last: int = 0, keep_best: KeepBest | None = None
) -> Path:
    """Saves the state of `step` under `<folder>/step-<step>`; all ranks call it and wait for each other.

    The folder must be shared by all nodes. Complete checkpoints are not changed before the new one is complete; an
    interrupted save leaves only a folder that the next save removes.

    Args:
        folder: the job's checkpoint folder.
        step: optimizer steps taken.
        state: the state to save. The key `step` is added to its trainer state.
        keep_last: number of complete steps to keep, including the new one; 0 keeps all.
        keep_best: steps that are kept besides these; None for none.

    Returns:
        The complete step folder. If it exists already, nothing is written.

    Raises:
        SaveError, OSError: a rank could not write; other ranks raise SaveError or PeerError.
    """
    return write_state(Path(folder), step, state_tensors(state), trainer_text(state, step), keep_last, keep_best)


def load_state(path: str | Path, state: TrainingState) -> dict[str, Any]:
    """Restores a step folder into an already built model and its optimizers, in place; all ranks call it.

    Args:
        path: a complete step folder, see `latest_complete`.
        state: model, optimizers and selection as the resuming job builds them. `state.trainer` is ignored.

    Returns:
        The saved trainer state.

    Raises:
        DamagedError: a file is damaged; raised on every rank. Some tensors may have been overwritten.
        ValueError: the folder has other tensors than the job; the message names the settings that determine them.
    """
    path = Path(path)
    damage = find_damage(path) or _find_changed_shard(path)
    if damage is not None:
        raise DamagedError(f"Checkpoint {path} cannot be used: {damage}.")
    saved = read_state_metadata(path).state_dict_metadata
    # DCP loads into existing tensors, so a new optimizer needs its state first.
    _prime(state)
    _drop_unsaved_optimizer_state(state, set(saved))
    tensors = state_tensors(state)
    # DCP itself casts a tensor of another dtype without a word, and stops at the first name that is missing.
    _check_same(path, saved, tensors)
    try:
        dcp.load(tensors, storage_reader=StateReader(path))
    except CheckpointException as error:  # raised on every rank
        raise DamagedError(f"Checkpoint {path} cannot be used: {_first_reason(error)}.") from error
    return read_trainer_state(path)


class SavedTensors:
    """The tensors of a step folder, read in one process whatever mesh saved them, one at a time.

    Args:
        path: a complete step folder.

    Raises:
        DamagedError: the folder is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        # Before anything is read, so that no part of a damaged checkpoint is exported.
        damage = find_damage(self._path) or changed_file(self._path, read_digests(self._path))
        if damage is not None:
            raise DamagedError(f"Checkpoint {path} cannot be used: {damage}.")
        self._reader = StateReader(self._path)
        saved = self._reader.read_metadata().state_dict_metadata
        self.entries = {name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
        """Shape (`size`) and dtype (`properties.dtype`) by saved name."""

    def read(self, name: str) -> Tensor:
        """Reads one full tensor to the host.

        Raises:
            DamagedError: its file is damaged.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({name: tensor}, storage_reader=self._reader, no_dist=True)
        except CheckpointException as error:
            reason = _first_reason(error)
            raise DamagedError(f"Checkpoint {self._path} cannot be used: {name} is unreadable: {reason}.") from error
        return tensor


def state_tensors(state: TrainingState) -> dict[str, Tensor]:
    """Returns all tensors of a state by their saved names, sharing storage with model and optimizers."""
    tensors = {f"model.{name}": tensor for name, tensor in module_tensors(state.model).items() if state.select(name)}
    names = parameter_names(state.model)
    for optimizer in state.optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                assert isinstance(value, Tensor), (
                    f"optimizer state '{key}' is {type(value).__name__}, expected a tensor"
                )
                # By parameter name rather than group and index, which depend on the job's settings.
                tensors[f"optimizer.{names[parameter]}.{key}"] = plain_tensor(value)
    return tensors


def trainer_text(state: TrainingState, step: int) -> str:
    """Serializes the trainer state to JSON."""
    return json.dumps({**state.trainer, "step": step}, indent=1)


def write_state(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    trainer: str,
    keep_last: int,
    keep_best: KeepBest | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Writes tensors as a step folder, see `save_state`.

    Args:
        folder: the job's checkpoint folder.
        step: optimizer steps taken.
        tensors: from `state_tensors`.
        trainer: from `trainer_text`.
        keep_last: number of complete steps to keep.
        keep_best: steps that are kept besides these.
        group: process group of all collectives; the default group if None.
    """
    path, temporary = step_folder(folder, step), incomplete_folder(folder, step)
    what = f"saving {path}"
    is_saved = _on_main_rank(lambda: _prepare(folder, step), what, group)
    if is_saved:
        return path
    # Every rank takes part and returns when its own files are written.
    writer = DigestWriter(temporary)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:  # raised on every rank
        raise SaveError(_why_not_saved(path, tensors, error)) from error
    digests = _gather_digests(writer.digests, group)
    _on_main_rank(lambda: _publish(temporary, path, trainer, digests), what, group)
    # Only after the new one is complete: a crash at any time leaves at least one usable checkpoint.
    _on_main_rank(
        lambda: remove_old(folder, step, keep_last, keep_best), f"removing old checkpoints in {folder}", group
    )
    return path


def _gather_digests(own: Digests, group: dist.ProcessGroup | None) -> Digests:
    """Digests of the shards of all ranks."""
    parts: list[Digests | None] = [own]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, own, group=group)
    found = {name: digest for part in parts for name, digest in (part or {}).items()}
    # Rank 0's writer also has the metadata, under a temporary name.
    return {name: digest for name, digest in sorted(found.items()) if name.endswith(".distcp")}


def _find_changed_shard(path: Path) -> str | None:
    """Compares all shards with their digests, each rank its share; returns the first difference on every rank."""
    if not dist.is_initialized():
        return changed_file(path, read_digests(path))
    rank, size = dist.get_rank(), dist.get_world_size()
    found: list[str | None] = [None] * size
    dist.all_gather_object(found, changed_file(path, read_digests(path), share=rank, shares=size))
    return next((damage for damage in found if damage is not None), None)


def num_bytes(tensors: dict[str, Tensor]) -> int:
    """Size of a state on disk, over all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _why_not_saved(path: Path, tensors: dict[str, Tensor], error: CheckpointException) -> str:
    """One line: the rank that failed, its reason, and the space, which the reason omits if a zip file was cut short."""
    needed = f"{num_bytes(tensors) / 2**30:.2f} GiB"
    return (
        f"{path} could not be written: {_first_reason(error)}. It needs {needed}, {describe_free(path.parent)}. Older "
        f"checkpoints are whole: free some space and rerun the same command."
    )


def _first_reason(error: CheckpointException) -> str:
    """The first rank that failed and its reason, without the tracebacks and advice that torch adds."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    lines = str(cause).strip().splitlines() or [""]
    return f"rank {rank}: {type(cause).__name__}: {lines[0].split('. In PyTorch')[0]}".rstrip(": .")


def _on_main_rank(work: Callable[[], Any], what: str, group: dist.ProcessGroup | None) -> Any:
    """Runs `work` on rank 0 and returns its result on every rank; an error is raised on every rank."""
    result, error = [None], None
    if is_main_rank():
        try:
            result = [work()]
        except Exception as failure:  # any error: the other ranks are waiting in `agree`
            error = failure
    agree(error, what, group)
    # The result is a decision, such as skipping a save, that all ranks have to make alike.
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0, group=group)
    return result[0]


def _prepare(folder: Path, step: int) -> bool:
    """Creates the folder and removes interrupted saves; returns whether the step is already saved."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    path = step_folder(folder, step)
    if step not in saved_steps(folder):
        return False
    # Saved before, when a job that fell back to an older checkpoint reaches this step again.
    damage = find_damage(path)
    if damage is None:
        logger.info("Step %d is already saved in %s.", step, path)
        return True
    logger.warning("Replacing the damaged checkpoint %s (%s).", path, damage)
    shutil.rmtree(path)
    return False


def _publish(temporary: Path, path: Path, trainer: str, digests: Digests) -> None:
    """Adds the trainer state to a written folder and renames it to its final name."""
    files = {**digests, METADATA_FILE: file_digest(temporary / METADATA_FILE)}
    content = signed({**json.loads(trainer), FILES_KEY: files})
    # Written last: a folder with this file has all shards.
    with (temporary / TRAINER_FILE).open("w") as file:
        file.write(json.dumps(content, indent=1))
        file.flush()
        os.fsync(file.fileno())
    # Every rank has reported success, so a file missing here was written to another node's local disk.
    damage = find_damage(temporary)
    if damage is not None:
        raise SaveError(f"{temporary}: {damage}. Set job.dump_folder to a folder that all nodes share.")
    # The rename is the moment at which the checkpoint exists; everything in it must be on disk before.
    sync_folder(temporary)
    temporary.rename(path)
    sync_folder(path.parent)


def _prime(state: TrainingState) -> None:
    """Creates the state tensors of a new optimizer, as targets to load into.

    One step with zero gradients and zero learning rate creates them for any optimizer. Its effect on the parameters (at
    most a changed sign of zero, or a stochastic rounding) is overwritten: every trained parameter is loaded afterwards.
    """
    for optimizer in state.optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if all(parameter in optimizer.state for parameter in parameters if parameter.requires_grad):
            continue
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            # Compiled and capturable optimizers keep the learning rate in a tensor and require one.
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)


def _drop_unsaved_optimizer_state(state: TrainingState, saved: set[str]) -> None:
    """Drops the state that `_prime` created for parameters without one in the checkpoint: they had no gradient yet."""
    if not any(name.startswith("optimizer.") for name in saved):
        return  # saved by an optimizer without state: dropping all would hide that the job's optimizer differs
    names = parameter_names(state.model)
    for optimizer in state.optimizers:
        for parameter, values in list(optimizer.state.items()):
            name = names[parameter]
            is_known = f"model.{name}" in saved
            if is_known and not any(f"optimizer.{name}.{key}" in saved for key in values):
                del optimizer.state[parameter]


def _check_same(path: Path, saved: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Raises ValueError with all differences between saved tensors and the job's, and the settings behind them."""
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
    problems = {
        "missing from the checkpoint": missing,
        "in the checkpoint, but not in the job": unexpected,
        "with another shape or dtype": sorted(changed),
    }
    lines = [f"  {len(names)} {problem}: {listed(names)}" for problem, names in problems.items() if names]
    if lines:
        settings = sorted({_setting_behind(name) for names in problems.values() for name in names})
        raise ValueError(
            f"Checkpoint {path} does not fit this job; nothing was loaded.\n"
            + "\n".join(lines)
            + f"\nCompare {', '.join(settings)} with the job text saved in {path / TRAINER_FILE}, "
            "or set another job.dump_folder to start from scratch."
        )


def _setting_behind(name: str) -> str:
    """The job setting that most likely determines whether a tensor exists, and its shape."""
    if "lora_" in name:
        return "lora.rank, lora.ranks, lora targets and model.mode"
    if name.startswith("optimizer."):
        return "optimizer.name, its precision and what optimizer.groups freeze"
    return "model.checkpoint_path, model.mode and which of [video] and [audio] are trained"


def _text(shape: Sequence[int] | None, dtype: torch.dtype | None) -> str:
    return "not a tensor" if shape is None else f"{list(shape)} {dtype}".replace("torch.", "")
