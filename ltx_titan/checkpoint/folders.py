"""Step folders of a job's training state: completeness, the newest one, retention.

`<folder>/step-N` exists only when every rank has finished writing it: a save goes to `step-N.incomplete` and is
renamed at the end. A complete folder that lost a file later (a full quota, an interrupted copy) is detected from the
metadata that torch.distributed.checkpoint stores next to the shards.
"""

import json
import logging
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ltx_titan.checkpoint.digests import FILES_KEY, SELF_KEY, Digests, changed_file, check_signed
from ltx_titan.checkpoint.reader import METADATA_FILE, StateReader

logger = logging.getLogger(__name__)

TRAINER_FILE = "trainer.json"
_PREFIX = "step-"
_INCOMPLETE = ".incomplete"
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class KeepBest:
    """The checkpoints that retention keeps for a metric.

    Attributes:
        metric: its name in `METRICS_KEY` of the trainer state.
        is_better_higher: whether higher values are better.
        count: number of checkpoints.
    """

    metric: str
    is_better_higher: bool
    count: int


METRICS_KEY = "metrics"
"""Metrics of a checkpoint's step by name, in its trainer state: published with the checkpoint or not at all."""


def step_folder(folder: str | Path, step: int) -> Path:
    """Folder of the complete state of `step`."""
    return Path(folder) / f"{_PREFIX}{step}"


def incomplete_folder(folder: str | Path, step: int) -> Path:
    """Folder to which the state of `step` is written until it is complete."""
    return Path(folder) / f"{_PREFIX}{step}{_INCOMPLETE}"


def saved_steps(folder: str | Path) -> list[int]:
    """Steps that have a folder under their final name, ascending, including damaged ones."""
    names = (entry.name.removeprefix(_PREFIX) for entry in Path(folder).glob(f"{_PREFIX}*") if entry.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def folders_with_states(folder: str | Path) -> list[str]:
    """Names of all step folders, also of damaged ones that were set aside, in the order of their steps."""
    found = [entry.name for entry in Path(folder).glob(f"{_PREFIX}*") if entry.is_dir()]
    steps = {name: name.removeprefix(_PREFIX).removesuffix(_DAMAGED) for name in found}
    return sorted((name for name in found if steps[name].isdecimal()), key=lambda name: (int(steps[name]), name))


def complete_folders(folder: str | Path) -> Iterator[Path]:
    """Yields the step folders that can be resumed from, newest first; damaged ones are skipped with a warning."""
    # By number rather than by file time, which copying changes.
    for step in reversed(saved_steps(folder)):
        path = step_folder(folder, step)
        damage = find_damage(path)
        if damage is None:
            yield path
        else:
            logger.warning("Checkpoint %s cannot be used: %s. Trying the next older one.", path, damage)


def latest_complete(folder: str | Path) -> Path | None:
    """Returns the newest step folder that can be resumed from, or None."""
    return next(complete_folders(folder), None)


def set_aside(path: Path) -> Path:
    """Renames a folder with damaged shards, so that its step is saved again; returns the new name."""
    renamed = path.with_name(path.name + _DAMAGED)
    if renamed.exists():
        shutil.rmtree(renamed)
    return path.rename(renamed)


def find_damage(path: Path) -> str | None:
    """Checks that every file in a step folder's metadata exists at full length; returns the first problem or None."""
    try:
        trainer = read_trainer_state(path)
        if type(trainer.get("step")) is not int or trainer["step"] < 0:
            return f"{TRAINER_FILE} does not hold a trainer state"
        # Order and retention go by names: a copy under the name of a later step would be resumed from again and again.
        if (number := path.name.removeprefix(_PREFIX)).isdecimal() and int(number) != trainer["step"]:
            return f"{TRAINER_FILE} is of step {trainer['step']}; the folder was renamed or copied, name it accordingly"
    except (OSError, ValueError, RecursionError) as error:
        return f"{TRAINER_FILE} is missing or unreadable ({error})"
    try:
        return _find_damaged_file(path, read_state_metadata(path)) or _find_changed_file(path, read_digests(path))
    except ValueError as error:
        return str(error)
    except Exception as error:  # a flipped bit leaves objects without attributes, or with values of other types
        return f".metadata is unreadable ({type(error).__name__}: {error})"


def read_state_metadata(path: Path) -> Metadata:
    """Reads the metadata of the tensors saved in a step folder.

    Raises:
        ValueError: `.metadata` is missing or unreadable.
    """
    return StateReader(path).read_metadata()


def _find_changed_file(path: Path, digests: Digests) -> str | None:
    """Compares what takes no reading of shards: the length of every file, and the content of the metadata.

    `load_state` compares the contents of the shards, which it reads anyway.
    """
    for name, digest in sorted(digests.items()):
        if Path(name).name != name:
            return f"{TRAINER_FILE} refers to {name!r}, outside the folder"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != digest["bytes"]:
            problem = "cut short" if size < digest["bytes"] else "longer than it was saved"
            return f"{name} is {problem} (expected {digest['bytes']:,} bytes, found {size:,})"
    small = {METADATA_FILE: digests[METADATA_FILE]} if METADATA_FILE in digests else {}
    return changed_file(path, small)


def _find_damaged_file(path: Path, metadata: Metadata) -> str | None:
    # Several tensors share a file; it must reach to the end of the last one.
    ends: dict[str, int] = defaultdict(int)
    for info in metadata.storage_data.values():
        ends[info.relative_path] = max(ends[info.relative_path], info.offset + info.length)
    for name, end in sorted(ends.items()):
        if Path(name).name != name:
            return f".metadata refers to {name!r}, outside the folder"
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size < end:
            return f"{name} is cut short (expected {end:,} bytes, found {file.stat().st_size:,})"
    return None


def read_trainer_state(path: str | Path) -> dict[str, Any]:
    """Reads the JSON part of a saved state (step, data position, job text), no tensors.

    Raises:
        ValueError: it is not JSON, or not what was saved.
    """
    content = _read_trainer_file(Path(path))
    return {key: value for key, value in content.items() if key not in (FILES_KEY, SELF_KEY)}


def read_digests(path: Path) -> Digests:
    """Reads the digests stored with a saved state; checkpoints of earlier versions have none.

    Raises:
        ValueError: as `read_trainer_state`.
    """
    return _read_trainer_file(path).get(FILES_KEY, {})


def _read_trainer_file(path: Path) -> dict[str, Any]:
    content = json.loads((path / TRAINER_FILE).read_text())
    if not isinstance(content, dict):
        raise ValueError(f"expected a table, found {type(content).__name__}")
    check_signed(content)
    return content


def remove_leftovers(folder: Path) -> None:
    """Deletes the folders of interrupted saves."""
    for path in folder.glob(f"{_PREFIX}*{_INCOMPLETE}"):
        logger.info("Removing %s of an interrupted save.", path)
        shutil.rmtree(path)


def best_steps(folder: str | Path, keep_best: KeepBest) -> dict[int, float]:
    """Finds the complete checkpoints with the best values of a metric: value by step, the best first.

    Of equal values the earlier is better. Checkpoints without the metric, or where it was not finite, do not compete.
    """
    values = {}
    for step in saved_steps(folder):
        path = step_folder(folder, step)
        if find_damage(path) is None:
            value = read_trainer_state(path).get(METRICS_KEY, {}).get(keep_best.metric)
            if value is not None and math.isfinite(value):
                values[step] = value
    sign = -1 if keep_best.is_better_higher else 1
    ordered = sorted(values, key=lambda step: (sign * values[step], step))
    return {step: values[step] for step in ordered[: keep_best.count]}


def remove_old(folder: Path, newest: int, keep_last: int, keep_best: KeepBest | None = None) -> None:
    """Deletes all but the newest `keep_last` steps up to `newest`, which must be complete; 0 keeps everything.

    Damaged folders do not count as kept, or `keep_last = 1` after a fallback would leave nothing to fall back to.
    The steps of `keep_best` are kept as well.
    """
    if keep_last == 0:
        return
    best = {} if keep_best is None else best_steps(folder, keep_best)
    # `newest` is not checked again: it was just written and verified.
    kept = 0
    for step in reversed([step for step in saved_steps(folder) if step <= newest]):
        path = step_folder(folder, step)
        if step != newest and kept >= keep_last and step not in best:
            # Renamed first: an interrupted deletion must not leave half a checkpoint under a final name.
            renamed = path.with_name(path.name + _INCOMPLETE)
            try:
                path.rename(renamed)
                shutil.rmtree(renamed)
            except OSError as error:
                logger.warning("Could not remove the old checkpoint %s: %s. Training continues.", path, error)
        elif step == newest or find_damage(path) is None:
            kept += 1
