"""The check of the disk before the first step: a run that cannot save is refused while it costs nothing."""

from torch import nn

from ltx_titan.build import export_bytes
from ltx_titan.checkpoint import TrainingState, num_bytes, state_tensors
from ltx_titan.common.files import free_bytes
from ltx_titan.common.ranks import agree
from ltx_titan.optim.build import STATE_BYTES
from ltx_titan.plan import Plan


def check_room(plan: Plan, model: nn.Module, weights: TrainingState, step: int, *, is_main: bool) -> None:
    """Refuses to start if the disk has no room for what the remaining run writes at least; all ranks call it.

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
    if saves + exports <= free:
        return None
    return ValueError(
        f"job.dump_folder = {str(plan.folder)!r}: a checkpoint needs {saves / 2**30:.2f} GiB and the export "
        f"{exports / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on its disk. Free some space, or set another "
        f"folder."
    )
