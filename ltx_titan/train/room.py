"""The check of the disk before the first step: a run that cannot save is refused while it costs nothing."""

import logging

from torch import nn

from ltx_titan.build import export_bytes
from ltx_titan.checkpoint import TrainingState, num_bytes, saved_steps, state_tensors
from ltx_titan.common.files import free_bytes
from ltx_titan.common.ranks import agree
from ltx_titan.optim.build import STATE_BYTES
from ltx_titan.plan import Plan

logger = logging.getLogger(__name__)


def check_room(plan: Plan, model: nn.Module, weights: TrainingState, step: int, *, is_main: bool) -> None:
    """Refuses to start if the disk has no room for what the remaining run writes at least; all ranks call it.

    Warns if it has no room for all checkpoints that are kept at a time.

    Args:
        plan: of the job.
        model: sharded, with gradients enabled on what is trained.
        weights: the weights that a checkpoint holds.
        step: steps taken so far.
        is_main: whether this rank looks.

    Raises:
        ValueError: on the rank that looks.
        PeerError: on the others.
    """
    error = None
    if is_main and plan.job.checkpoint.enable:
        error = _refusal(plan, model, weights, step)
    agree(error, "checking the disk")


def _refusal(plan: Plan, model: nn.Module, weights: TrainingState, step: int) -> ValueError | None:
    optimizer, saves = plan.job.optimizer, 0.0
    if step < plan.last_step:
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        # Before the first step the optimizer has no state yet.
        state = trained * (STATE_BYTES[optimizer.name] + (0 if optimizer.ema_decay is None else 4))
        saves = num_bytes(state_tensors(weights)) + state
    exports = export_bytes(plan, model) if plan.exports else 0
    free = free_bytes(plan.folder)
    if saves + exports > free:
        return ValueError(
            f"job.dump_folder = {str(plan.folder)!r}: a checkpoint needs {saves / 2**30:.2f} GiB and the export "
            f"{exports / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on its disk. Free some space, or set another "
            f"folder."
        )
    more = _most_at_a_time(plan, step) - len(saved_steps(plan.folder / "checkpoint"))
    if more * saves + exports > free:
        logger.warning(
            "job.dump_folder = %r: %.2f GiB are free on its disk, and up to %d more checkpoints of %.2f GiB will be on "
            "it at a time (checkpoint.keep_last, checkpoint.keep_best, and the one being written). The run ends at the "
            "first one that finds no room; free some space, or keep fewer.",
            str(plan.folder),
            free / 2**30,
            more,
            saves / 2**30,
        )
    return None


def _most_at_a_time(plan: Plan, step: int) -> int:
    """Most checkpoints that are on the disk at a time: an old one is deleted once its successor is complete."""
    settings = plan.job.checkpoint
    written = -(-(plan.last_step - step) // (settings.interval or plan.last_step))
    there = written + len(saved_steps(plan.folder / "checkpoint"))
    if settings.keep_last == -1:
        return there
    best = 0 if settings.keep_best.metric is None else settings.keep_best.count
    return min(there, settings.keep_last + best + 1)
