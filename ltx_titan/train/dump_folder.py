"""The dump folder before training: whether it can be written to, and whether what the job asks for is in it already."""

import errno
import logging
import os
from pathlib import Path

from ltx_titan.checkpoint import folders_with_states, latest_complete, read_trainer_state
from ltx_titan.common.files import LOCK_FILE, describe_os_error
from ltx_titan.config import job_changes
from ltx_titan.plan import Plan
from ltx_titan.weights import check_contents, read_metadata

logger = logging.getLogger(__name__)

# Folders that a run makes in its dump folder after its first steps, and may not be files by then.
_FOLDERS = ("checkpoint", "export", "samples", "skipped", "stacks", "tensorboard", "profile", "validation-cache")


def check_dump_folder(folder: Path) -> None:
    """Makes the dump folder and checks that files can be written there, before a model is loaded.

    Raises:
        ValueError: it cannot be made or is read-only; the message names the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Rank 0 makes its lock file a moment later anyway; here every rank learns of a read-only disk by itself.
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for name in _FOLDERS:
            if (folder / name).exists() and not (folder / name).is_dir():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder / name))
    except OSError as error:
        found, path = describe_os_error(error, folder), Path(error.filename or folder)
        if isinstance(error, FileExistsError):
            # As the system puts it, a link whose target is gone exists and does not.
            target = f"a link to {path.readlink()}, which does not exist" if path.is_symlink() else "a file"
            found = f"{path} is {target}"
        raise ValueError(
            f"job.dump_folder = {str(folder)!r}: expected a folder that can be written to, found: {found}. Set another "
            "folder, or make it writable."
        ) from error


def is_finished(plan: Plan) -> bool:
    """Returns whether all that the job asks for exists: the checkpoint of its last step, and its export; logs it.

    A job whose checkpoint is complete and whose export is missing or damaged is not finished: training it again takes
    no step and exports.

    Raises:
        ValueError: `checkpoint.resume = false` and the folder is not empty; or no checkpoint in it can be used.
    """
    if not plan.job.checkpoint.resume:
        if plan.folder.is_dir() and any(entry.name != LOCK_FILE for entry in plan.folder.iterdir()):
            raise ValueError(
                f"checkpoint.resume = false starts a new run, but job.dump_folder = {str(plan.folder)!r} is not empty; "
                f"choose another folder, or remove its contents."
            )
        return False
    path = latest_complete(plan.folder / "checkpoint")
    if path is None:
        if saved := folders_with_states(plan.folder / "checkpoint"):
            # Starting over would replace them, and the metrics of what they were trained for.
            raise ValueError(
                f"{plan.folder / 'checkpoint'}: expected a checkpoint to resume from, found "
                f"{', '.join(saved)}, none of which can be used. Restore their files (and their names), or move these "
                "folders away to start from the beginning."
            )
        return False
    # Only the JSON part: reading the state would take as long as resuming.
    trainer = read_trainer_state(path)
    step, export = trainer["step"], plan.export_path(trainer["step"])
    if step < plan.last_step:
        return False
    if plan.exports and not export.is_file():
        logger.info("step %d of %d is saved, but %s is missing: exporting it", step, plan.job.training.steps, export)
        return False
    if plan.exports:
        try:
            read_metadata(export)
            check_contents(export)
        except ValueError as error:
            logger.warning("step %d of %d is saved, and is exported again: %s", step, plan.job.training.steps, error)
            return False
    for change in job_changes(trainer["job"], plan.job):
        logger.warning("job settings changed since the checkpoint, and nothing is left to do with them: %s", change)
    steps = plan.job.training.steps
    logger.info("nothing to do: %s has step %d, and the job ends at step %d of %d", path, step, plan.last_step, steps)
    return True
