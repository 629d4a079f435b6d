"""Checkpoints and exports of a run: resumes from the newest, saves, and keeps out what is not finite."""

import gc
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ltx_titan.build import export_model
from ltx_titan.checkpoint import (
    METRICS_KEY,
    BackgroundSaver,
    DamagedError,
    KeepBest,
    TrainingState,
    best_steps,
    complete_folders,
    first_not_finite,
    latest_complete,
    load_state,
    save_everything,
    save_state,
    set_aside,
    state_tensors,
    step_folder,
)
from ltx_titan.common.secrets import redacted_values
from ltx_titan.config import JobConfig, job_changes, plain_job
from ltx_titan.config.errors import nearest
from ltx_titan.data import DataPosition, resume_step
from ltx_titan.lora import is_adapter
from ltx_titan.metrics import StepGuard
from ltx_titan.optim import EMA
from ltx_titan.optim.build import Optimizers
from ltx_titan.plan import Plan
from ltx_titan.train.room import check_room

logger = logging.getLogger("ltx_titan")

# Keys that the factor on adapters follows from, which no tensor holds. Other ranks do not fit the checkpoint.
_SCALES = ("alpha", "rslora", "ranks")


class Saves:
    """Reads and writes the training state of a run; every rank creates one and calls its methods together.

    Args:
        plan: of the job.
        model: sharded.
        optimizers: of the model.
        ema: average of the weights; None without `optimizer.ema_decay`.
        guard: judges steps; None if none is skipped.
        is_main: whether this rank reports.
    """

    def __init__(
        self,
        plan: Plan,
        model: nn.Module,
        optimizers: Optimizers,
        ema: EMA | None,
        guard: StepGuard | None,
        *,
        is_main: bool,
    ) -> None:
        self.folder = plan.folder / "checkpoint"
        self._plan = plan
        self._model = model
        self._optimizers = optimizers
        self._saved_optimizers = [*optimizers.parts, *([ema] if ema is not None else [])]
        self._guard = guard
        self._is_main = is_main
        # With LoRA only the adapters: the frozen base is read from its own file.
        self._select = is_adapter if plan.job.model.mode == "lora" else save_everything
        self._keep_last = max(plan.job.checkpoint.keep_last, 0)
        self._keep_best = _keep_best(plan.job)
        self._has_warned = False
        self._blocked_s: float | None = None
        self._saver: BackgroundSaver | None = None
        if plan.job.checkpoint.enable and plan.job.checkpoint.background:
            self._saver = BackgroundSaver(self.folder, keep_last=self._keep_last, keep_best=self._keep_best)

    def resume(self) -> tuple[int, int]:
        """Restores the newest complete checkpoint and checks that the disk has room for the next one.

        Returns:
            The steps taken, and the number of the next global batch.

        Raises:
            ValueError: the only checkpoints are damaged, or the disk is too full.
        """
        step, next_batch = self._restore()
        check_room(self._plan, self._model, self._weights(), step, is_main=self._is_main)
        return step, next_batch

    def _restore(self) -> tuple[int, int]:
        damaged = None
        for path in complete_folders(self.folder) if self._plan.job.checkpoint.resume else ():
            try:
                saved = load_state(path, self._state({}))
            except DamagedError as error:
                damaged = error
                if self._is_main:
                    logger.warning("%s It is now %s; trying the next older one.", error, set_aside(path).name)
                continue
            return self._resume_from(path, saved)
        if damaged is not None:
            # What was read of it has overwritten the initial weights.
            raise ValueError(f"{damaged} There is no older one; move it away to start from the beginning.")
        return 0, 0

    def _resume_from(self, path: Path, saved: dict[str, Any]) -> tuple[int, int]:
        _check_scales(path, saved["job"], self._plan.job)
        for change in job_changes(saved["job"], self._plan.job):
            logger.warning("job settings changed since the checkpoint: %s", change)
        batches = self._plan.batches
        # Only warnings: settings may change between runs. State that does not fit has been refused by `load_state`.
        position = DataPosition.from_dict(saved["data"])
        next_batch, notes = resume_step(
            position, global_batch_size=batches.global_batch_size, fingerprint=batches.fingerprint
        )
        for note in notes:
            logger.warning("resumed: %s", note)
        if self._guard is not None and "guard" in saved:
            self._guard.load_state_dict(saved["guard"])
        logger.info("resumed from %s: step %d of %d", path, saved["step"], self._plan.job.training.steps)
        return saved["step"], next_batch

    @property
    def has_failed(self) -> bool:
        """Whether the save in the background has failed on this rank."""
        return self._saver is not None and self._saver.has_failed

    def settle(self) -> bool:
        """Waits for the save in the background; returns whether it is complete, True without one."""
        return self._saver is None or self._saver.settle()

    def save(self, step: int, next_batch: int, metrics: Mapping[str, float | None]) -> None:
        """Saves unless `checkpoint.enable` is off, in the background if the job says so.

        Args:
            step: optimizer steps taken.
            next_batch: number of the next global batch.
            metrics: logged at this step; used on rank 0, which writes the trainer state.

        Raises:
            FloatingPointError: a tensor to be saved is not finite.
            SaveError, OSError: the checkpoint cannot be written.
        """
        if not self._plan.job.checkpoint.enable:
            return
        batches = self._plan.batches
        position = DataPosition(next_batch * batches.global_batch_size, batches.global_batch_size, batches.fingerprint)
        # The scale is derived from the data, which `ltx-titan export` does not have.
        trainer = {
            "data": position.to_dict(),
            "job": redacted_values(plain_job(self._plan.job)),
            "reference_scale": self._plan.reference_scale,
        }
        if self._guard is not None:
            trainer["guard"] = self._guard.state_dict()
        if self._keep_best is not None and self._is_main:
            trainer[METRICS_KEY] = self._compared(self._keep_best.metric, step, metrics)
        state = self._state(trainer)
        self._refuse_not_finite(state, step)
        started = time.perf_counter()
        if self._saver is not None:
            self._saver.save(step, state)
        else:
            save_state(self.folder, step, state, keep_last=self._keep_last, keep_best=self._keep_best)
        # Every rank pauses here anyway: also collect the oldest generation, which the runs between steps skip.
        gc.collect()
        self._blocked_s = time.perf_counter() - started
        how = "is being written in the background" if self._saver is not None else "is saved"
        logger.info("checkpoint of step %d %s; training was blocked for %.1f s", step, how, self._blocked_s)

    def best(self) -> tuple[Path, str] | None:
        """The best checkpoint by `checkpoint.keep_best` and its value as text; None without one."""
        if self._keep_best is None:
            return None
        for step, value in best_steps(self.folder, self._keep_best).items():
            return step_folder(self.folder, step), f"{self._keep_best.metric} {value:.4f}"
        logger.warning(
            "checkpoint.keep_best.metric = %r was logged at the step of no checkpoint, so none was kept for it",
            self._keep_best.metric,
        )
        return None

    def take_figures(self) -> dict[str, float]:
        """Seconds that the newest save blocked training, for the next log line; empty if there was none since."""
        blocked_s, self._blocked_s = self._blocked_s, None
        return {} if blocked_s is None else {"perf/save_blocked_s": blocked_s}

    def export(self, step: int) -> Path | None:
        """Writes the file for inference tools unless `checkpoint.export` is off."""
        if not self._plan.exports:
            return None
        with self._optimizers.averaged(self._model):
            self._refuse_not_finite(self._weights(), step)
            return export_model(self._plan, self._model, step)

    def not_finite(self, step: int, what: str) -> FloatingPointError:
        """The error that ends a run whose figures or weights are NaN or infinite; waits for the save in progress."""
        self.close()  # so that the newest checkpoint is known
        return FloatingPointError(
            f"step {step}: {what}. Nothing of this step was saved or exported; the newest checkpoint is "
            f"{latest_complete(self.folder)}. Lower optimizer.lr, keep training.max_grad_norm at 1.0 "
            f"(optimizer.in_backward cannot clip), and inspect this step's samples."
        )

    def close(self) -> None:
        """Waits for the save in progress and ends the saver; an error of that save is logged, not raised."""
        saver, self._saver = self._saver, None
        if saver is None:
            return
        try:
            saver.close()
        except Exception as error:  # the run ends anyway, with an error that matters more
            logger.error("the checkpoint in progress failed: %s", error)

    def _compared(self, metric: str, step: int, metrics: Mapping[str, float | None]) -> dict[str, float]:
        """The metric that checkpoints are compared by, to be stored in this one; empty if it is not known."""
        value = metrics.get(metric)
        if value is not None:
            return {metric: value}
        if metric not in metrics and not self._has_warned:
            self._has_warned = True
            known = (name for name, figure in metrics.items() if figure is not None and name != "step")
            logger.warning(
                "checkpoint.keep_best.metric = %r is not logged at step %d, so its checkpoint is not compared; %s",
                metric,
                step,
                nearest(metric, known),
            )
        return {}

    def _refuse_not_finite(self, state: TrainingState, step: int) -> None:
        """Raises FloatingPointError on every rank if a tensor to be written is NaN or infinite on any of them."""
        name = first_not_finite(state_tensors(state))
        if name is not None:
            raise self.not_finite(step, f"{name} contains NaN or infinity")

    def _weights(self) -> TrainingState:
        return TrainingState(self._model, select=self._select)

    def _state(self, trainer: dict[str, Any]) -> TrainingState:
        return TrainingState(self._model, self._saved_optimizers, select=self._select, trainer=trainer)


def _keep_best(job: JobConfig) -> KeepBest | None:
    best = job.checkpoint.keep_best
    return None if best.metric is None else KeepBest(best.metric, best.mode == "max", best.count)


def _check_scales(path: Path, before: Mapping[str, Any], job: JobConfig) -> None:
    """Checks that the adapters of a checkpoint keep the factor that they were trained with.

    Raises:
        ValueError: a key of it differs.
    """
    if job.model.mode != "lora":
        return
    # Checkpoints of earlier versions lack newer keys.
    old, new = before.get("lora", {}), plain_job(job)["lora"]
    changed = [f"lora.{key}: {old[key]} -> {new[key]}" for key in _SCALES if key in old and old[key] != new[key]]
    if changed:
        raise ValueError(
            f"{path}: its adapters were trained with another scale, and would compute another update: "
            f"{'; '.join(changed)}. Set it back, or start another run from this one's export (model.adapter_path), "
            "which keeps the update."
        )
