"""Weights & Biases, next to TensorBoard and with the same tags.

One job is one run: its id is stored in the dump folder, and a resumed job continues the run. W&B drops values whose
step is smaller than an earlier one, as after resuming from an older checkpoint; so `step` is logged as a value, and
declared as the x axis of all others.
"""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ltx_titan.common.files import write_text

if TYPE_CHECKING:
    from wandb import Run

    from ltx_titan.config import MetricsSection

logger = logging.getLogger(__name__)

_ID_FILE = "wandb-run-id"


def start_wandb(settings: "MetricsSection", folder: str | Path, config: Mapping[str, Any], notes: str = "") -> "Run":
    """Starts the job's run or resumes it; on one rank only.

    Args:
        settings: `[metrics]`, with `wandb` other than "off".
        folder: the dump folder: its name is the run's, and W&B's own files go below it.
        config: the job, for W&B's table of runs.
        notes: free text.

    Raises:
        ValueError: W&B cannot start the run; the message has its reason.
    """
    # Imported here: an optional package.
    import wandb

    assert settings.wandb != "off"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            mode=settings.wandb,
            project=settings.wandb_project,
            entity=settings.wandb_entity,
            tags=settings.wandb_tags,
            id=_run_id(folder),
            # Continues the run with this id, or starts it.
            resume="allow",
            name=folder.resolve().name,
            notes=notes,
            config=dict(config),
            # A resumed job may have changed settings, which W&B would refuse as a conflict.
            allow_val_change=True,
            dir=folder,
            settings=wandb.Settings(quiet=True, show_info=False),
        )
    except wandb.errors.Error as error:
        raise ValueError(
            f'metrics.wandb = "{settings.wandb}": Weights & Biases cannot start a run ({error}); set it to "offline" '
            'to write below the dump folder, or to "off".'
        ) from error
    # Not W&B's own step, which must never decrease.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    where = run.url if settings.wandb == "online" else f"offline; `wandb sync {Path(run.dir).parent}` uploads it"
    logger.info("Weights & Biases: %s", where)
    return run


def end_wandb(run: "Run") -> None:
    """Ends a run; while an exception is being handled, it is marked as failed."""
    run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def _run_id(folder: Path) -> str:
    path = folder / _ID_FILE
    if not path.exists():
        write_text(path, uuid4().hex[:16] + "\n")
    return path.read_text().strip()
