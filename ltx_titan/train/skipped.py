"""Skipped steps: the decision of all ranks together, and the record from which a skipped step can be replayed."""

import json
import logging

import torch
import torch.distributed as dist
from torch import Tensor

from ltx_titan.common.files import write_text
from ltx_titan.data import StepBatches
from ltx_titan.metrics import StepGuard, Sums
from ltx_titan.metrics.alerts import Alerts
from ltx_titan.metrics.step import Mark
from ltx_titan.plan import Plan

logger = logging.getLogger("ltx_titan")


class SkippedSteps:
    """Skips the steps that `StepGuard` rejects and lists them in `skipped/` of the dump folder.

    Args:
        plan: of the job.
        guard: judges each step; the same decisions on every rank.
        alerts: informed of each skipped step.
        is_main: whether this rank writes.
    """

    def __init__(self, plan: Plan, guard: StepGuard, alerts: Alerts, *, is_main: bool) -> None:
        self.guard = guard
        self.given_up: str | None = None
        """Why the run has to end; None as long as it may continue."""
        self._plan = plan
        self._alerts = alerts
        self._is_main = is_main

    def figures(self, sums: Sums, mark: Mark, grad_norm: Tensor) -> Tensor:
        """Loss and gradient norm of the step [2], on the device, the same bits on every rank.

        Args:
            sums: that the step was added to.
            mark: position of `sums` before the step.
            grad_norm: before clipping, the same on every rank.
        """
        degrees = self._plan.degrees
        # Shares whose sum over all ranks is the figure, in one all-reduce.
        share = sums.loss_since(mark) / (degrees.cp * degrees.tp)
        figures = torch.stack([share, grad_norm.to(share.device) / dist.get_world_size()])
        dist.all_reduce(figures)
        return figures

    def skips(self, batches: StepBatches, sums: Sums, mark: Mark, figures: Tensor) -> bool:
        """Whether all ranks skip this step's update; records the step and takes its losses out of the means if so.

        Args:
            batches: of the step.
            sums: that the step was added to.
            mark: position of `sums` before the step.
            figures: of the step, see `figures`.
        """
        loss, norm = figures.tolist()  # the step's one wait for the device
        reason = self.guard.judge(loss, norm)
        if reason is None:
            return False
        sums.undo(mark)
        if self._is_main:
            self._record(batches, reason, loss, norm)
        if self.guard.gives_up:
            counts = f"{self.guard.in_a_row} steps in a row would have to be skipped, training.max_skipped_steps is"
            self.given_up = f"{reason}; {counts} {self.guard.max_in_a_row}"
        return True

    def _record(self, batches: StepBatches, reason: str, loss: float, norm: float) -> None:
        plan = self._plan
        file = plan.folder / "skipped" / f"step-{batches.step}.json"
        # Draws are functions of seed, step and position, so this is all that a replay needs.
        record = {
            "step": batches.step,
            "reason": reason,
            "loss": str(loss),
            "grad_norm": str(norm),
            "seed": plan.job.training.seed,
            "batch": batches.batch_number,
            "dataset": plan.batches.fingerprint,
            "samples": [plan.dataset.name(index) for index in plan.batches.global_batch(batches.batch_number)],
            "skipped_in_a_row": self.guard.in_a_row,
        }
        write_text(file, json.dumps(record, indent=1) + "\n")
        self._alerts.send("spiking", f"skipped, {reason}", batches.step)
        logger.warning("step %d: skipped, %s; its samples are in %s", batches.step, reason, file)
