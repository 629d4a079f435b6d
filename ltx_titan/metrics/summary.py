"""What a run says of itself: whether it is finished already, where its loss went, and what it wrote."""

import logging
from pathlib import Path

from ltx_titan.checkpoint import latest_complete, read_trainer_state
from ltx_titan.metrics.loggers import read_metrics
from ltx_titan.metrics.plots import plot_loss
from ltx_titan.plan import Plan

logger = logging.getLogger(__name__)


def is_finished(plan: Plan) -> bool:
    """Whether the dump folder already holds the last step; says so.

    Raises:
        ValueError: `checkpoint.resume = false` and the folder is not empty.
    """
    if not plan.job.checkpoint.resume:
        if plan.folder.is_dir() and any(plan.folder.iterdir()):
            raise ValueError(
                f"checkpoint.resume = false starts afresh, but job.dump_folder = {str(plan.folder)!r} is not empty; "
                f"choose another folder, or remove what is there."
            )
        return False
    path = latest_complete(plan.folder / "checkpoint")
    if path is None or read_trainer_state(path)["step"] < plan.last_step:
        return False
    logger.info("finished already: %s holds step %d of %d", path, plan.last_step, plan.job.training.steps)
    return True


def report(plan: Plan, export: Path | None) -> None:
    """Prints where the loss went and where the files are; draws the curve."""
    folder = plan.folder
    curve = folder / "loss.png"
    records = read_metrics(folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["loss"] is not None]
    if losses:
        plot_loss(folder / "metrics.jsonl", curve, title=plan.job.job.description or str(folder))
        tail = losses[-max(len(losses) // 10, 1) :]
        logger.info(
            "loss: %.4f at step %d, %.4f as the mean of the last %d logged steps",
            losses[0],
            records[0]["step"],
            sum(tail) / len(tail),
            len(tail),
        )
    files = {
        "loss curve": curve,
        "metrics": folder / "metrics.jsonl",
        "tensorboard": folder / "tensorboard",
        "samples": folder / "samples",
        "checkpoint": latest_complete(folder / "checkpoint"),
        "export": export,
    }
    for name, path in files.items():
        if path is not None and path.exists():
            logger.info("%-12s %s", name, path)
