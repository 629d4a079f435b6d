"""The training loop.

`plan_job` validates the job on the host. `Trainer.__init__` then joins the other ranks, builds the model on the meta
device, shards it, loads this rank's slices and resumes. `Trainer.train` loops; each step is

    data -> text contexts -> inputs -> forward -> loss -> backward     for each micro-batch
    clip -> optimizer -> log -> save
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch.distributed as dist

from ltx_titan.build import load_connectors, load_transformer
from ltx_titan.checkpoint import latest_complete
from ltx_titan.common.determinism import set_determinism
from ltx_titan.common.failure import report_error
from ltx_titan.common.files import write_text
from ltx_titan.common.ranks import StalledError
from ltx_titan.common.secrets import redacted, redacted_values
from ltx_titan.config import dump_job, plain_job
from ltx_titan.data import StepLoader
from ltx_titan.metrics import MetricsLogger, StepGuard, Sums, profile_steps, start_wandb, summarize_run
from ltx_titan.metrics.alerts import Alerts
from ltx_titan.metrics.clock import StepClock
from ltx_titan.metrics.heartbeat import Heartbeat, Phase
from ltx_titan.optim import EMA, build_optimizers
from ltx_titan.parallel.mesh import build_mesh, default_store, init_distributed, set_timeouts
from ltx_titan.parallel.stop import StepVote
from ltx_titan.parallel.watch import Watch
from ltx_titan.plan import Plan
from ltx_titan.train.garbage import GarbageCollector
from ltx_titan.train.report import StepReport
from ltx_titan.train.saves import Saves
from ltx_titan.train.skipped import SkippedSteps
from ltx_titan.train.step import GradNorms, TrainStep
from ltx_titan.validation.report import RunReport
from ltx_titan.validation.training import TrainingValidation

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger("ltx_titan")


class Trainer:
    """One run of a job on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.job = job = plan.job
        set_determinism(enabled=job.job.deterministic)
        self.device = init_distributed(job.job.timeout_s, plan.folder / "stacks")
        self.is_main = dist.get_rank() == 0
        self.alerts = Alerts(job.alerts, plan.folder, is_sender=self.is_main)
        self.watch = Watch(
            default_store(),
            plan.folder / "stacks",
            job.job.timeout_s,
            on_stall=lambda step, text: self.alerts.send("stalled", text, step),
            on_lost=self._report_lost,
        )
        self.mesh = build_mesh(self.device.type, plan.degrees)
        # Before the transformer, because encoding prompts and media needs the device's memory.
        self.validation = None
        if job.validation.interval is not None:
            self.validation = TrainingValidation(plan, self.mesh, self.device)
        self.model = load_transformer(plan, self.mesh, self.device)
        self.connectors = load_connectors(plan, self.mesh, self.device)
        # The learning rate is a function of the step, set before each one; there is no scheduler state to save.
        self.optimizers = build_optimizers(self.model.named_parameters(), job.optimizer, seed=job.training.seed)
        decay = job.optimizer.ema_decay
        self.ema = None if decay is None else EMA(self.model.parameters(), decay)
        training = job.training
        guard = self.skipped = None
        if training.max_skipped_steps > 0 and not job.optimizer.in_backward:
            guard = StepGuard(training.max_skipped_steps, training.spike_factor)
            self.skipped = SkippedSteps(plan, guard, self.alerts, is_main=self.is_main)
        self.train_step = TrainStep(
            plan,
            self.model,
            self.connectors,
            self.optimizers,
            self.ema,
            self.skipped,
            dp_rank=self.mesh.dp_rank,
            device=self.device,
        )
        self.saves = Saves(plan, self.model, self.optimizers, self.ema, guard, is_main=self.is_main)
        # Last, because it fills the parameters, optimizer states and average that exist by now.
        self.step, self.next_batch = self.saves.resume()
        set_timeouts(job.job.timeout_s)  # of all groups that exist by now
        self.vote = StepVote()
        self.heartbeat = Heartbeat(plan.folder, is_writer=self.is_main)
        self.report = StepReport(self.mesh, self.device, guard, self.heartbeat)

    def train(self) -> None:
        """Runs the remaining steps, saves, exports and logs where the files are.

        Raises:
            FloatingPointError: the loss, the gradient norm, or a tensor to be saved is not finite.
            SaveError, OSError: checkpoints cannot be written.
            StalledError: a rank was waited for until the time-out.
        """
        try:
            with self.watch.explained():
                self._train()
        except BaseException as error:
            self.heartbeat.set_phase("failed")
            self.alerts.send("failed", f"{type(error).__name__}: {error}", self.step)
            raise
        finally:
            self.alerts.close()

    def close(self) -> None:
        """Frees the CUDA graphs, for which the communicators of a process group wait. Waits for the device."""
        self.train_step.micro_step.drop()

    def _report_lost(self, error: StalledError) -> None:
        """Reports that another rank is gone, in the watch's thread, which then ends this process."""
        report_error(error, self.plan.folder)
        self.heartbeat.set_phase("failed")
        self.alerts.send("failed", str(error), self.step)
        self.alerts.close()

    def _train(self) -> None:
        job, plan = self.job, self.plan
        if self.is_main:
            # As resolved, with defaults and overrides, so that the run can be repeated without its command line.
            write_text(plan.folder / "job.toml", redacted(dump_job(job)))
        log = MetricsLogger(
            plan.folder,
            total_steps=plan.last_step,
            resumed_step=self.step,
            is_writer=self.is_main,
            tensorboard=job.metrics.tensorboard,
            wandb=self._start_wandb(),
            intervals={
                "validating": job.validation.interval,
                "reporting": job.validation.interval,
                "saving": job.checkpoint.interval if job.checkpoint.enable else None,
                "exporting": job.checkpoint.export_interval if plan.exports else None,
            },
        )
        try:
            garbage = GarbageCollector(job.training.gc_interval)
            loader = StepLoader(
                plan.dataset,
                plan.batches,
                dp_rank=self.mesh.dp_rank,
                dp_size=plan.degrees.dp,
                local_batch_size=job.training.local_batch_size,
                start_step=self.step + 1,
                stop_step=plan.last_step + 1,
                first_batch=self.next_batch,
                draw=self.train_step.draw,
                num_workers=job.data.num_workers,
                prefetch=job.data.prefetch,
            )
            profiling = profile_steps(
                plan.folder,
                first_step=job.profiling.trace_start,
                steps=job.profiling.trace_steps,
                memory=job.profiling.memory_snapshot,
                rank=dist.get_rank(),
            )
            clock = StepClock(self.device)
            prompts = [] if self.validation is None else self.validation.prompts
            page = RunReport(job, plan.last_step, prompts, is_writer=self.is_main)
            self.heartbeat.step(self.step)
            self.watch.enter(self.step + 1, "loading")
            with loader, profiling as before_step:
                sources = [part.name for part in plan.parts if part.name]
                sums = Sums(self.device, job.preservation.parts, sources)
                if self.step == 0 and not job.validation.skip_initial_validation:
                    with clock.paused(), self._in_phase("validating", log):
                        log.show(self._validate(log), step=0)
                        page.write(0)
                for batches in loader:
                    before_step(batches.step)
                    self.watch.enter(batches.step, "training")
                    # Asked before the step and read after it, so the all-reduce overlaps with the step.
                    self.vote.ask(save_failed=self.saves.has_failed)
                    grad_norms = self.train_step.run(batches, sums)
                    self.step, self.next_batch = batches.step, batches.batch_number + 1
                    if self.skipped is not None and self.skipped.given_up is not None:
                        raise self.saves.not_finite(self.step, self.skipped.given_up)
                    garbage.after(self.step)
                    validated: dict[str, float] = {}
                    validates = _is_due(self.step, job.validation.interval)
                    if validates:
                        # Validation is no part of the step time, or the figure would depend on the interval.
                        with clock.paused(), self._in_phase("validating", log):
                            validated = self._validate(log)
                    is_last = self.step == plan.last_step
                    stop, save_failed = self.vote.result()
                    if save_failed:
                        self.saves.settle()
                    ends = is_last or stop is not None
                    # A failed save is tried again at once rather than an interval later.
                    saves = ends or save_failed or _is_due(self.step, job.checkpoint.interval)
                    # Decided by the job, since only rank 0 has scores of clips and all ranks reduce together.
                    has_figures = validates and job.validation.has_figures
                    if saves or has_figures or _is_due(self.step, job.metrics.interval):
                        # Before the save: it raises if the loss is not finite, so bad weights never replace good ones.
                        self._log(log, sums, grad_norms, clock.lap(), validated)
                        sums = Sums(self.device, job.preservation.parts, sources)
                    if validates:
                        with clock.paused(), log.paused("reporting"):
                            page.write(self.step)  # after the log, which it shows
                    if saves:
                        with clock.paused(), self._in_phase("saving", log):
                            self.saves.save(self.step, self.next_batch, log.newest)
                            while ends and not self.saves.settle():
                                self.saves.save(self.step, self.next_batch, log.newest)
                    if _is_due(self.step, job.checkpoint.export_interval) and not is_last:
                        with clock.paused(), self._in_phase("exporting", log):
                            self.saves.export(self.step)
                    if stop is not None and not is_last:
                        logger.warning(
                            "received %s: %s after step %d. Rerun the same command to resume.",
                            stop.name,
                            "saved and stopped" if job.checkpoint.enable else "stopped without a checkpoint",
                            self.step,
                        )
                        self.heartbeat.set_phase("stopped")
                        return
                    self.watch.enter(self.step + 1, "loading")
        finally:
            # Both, whatever the other raises: a thread that still saves would lose its process group.
            with ExitStack() as stack:
                stack.callback(log.close)
                stack.callback(self.saves.close)
        self.close()  # the export may need the graphs' memory
        with self._in_phase("exporting"):
            export = self.saves.export(self.step)
        self.heartbeat.set_phase("finished")
        self.alerts.send("finished", "", self.step)
        if idle_steps := self.report.idle_steps:
            logger.warning("%d steps of this run had no token to generate and learned nothing", idle_steps)
        seen = self.next_batch * plan.batches.global_batch_size
        for name, (samples, epochs) in plan.drawn(self.next_batch).items():
            share = samples / max(seen, 1)
            logger.info(
                "drawn from %s: %d of %d samples (%.1f %%), %.2f epochs", name, samples, seen, 100 * share, epochs
            )
        if not job.checkpoint.enable:
            lost = f"the weights of step {self.step} are neither saved nor exported"
            logger.warning("checkpoint.enable = false: %s", lost)
        if self.is_main:
            # Without checkpoints the newest one is of an earlier step.
            newest = latest_complete(self.saves.folder) if job.checkpoint.enable else None
            files = {"checkpoint": newest, "export": export}
            if job.checkpoint.enable and (best := self.saves.best()) is not None:
                path, value = best
                files[f"best checkpoint ({value})"] = path
            page.write(self.step, export)
            summarize_run(plan.folder, title=job.job.description or str(plan.folder), files=files)

    def _validate(self, log: MetricsLogger) -> dict[str, float]:
        if self.validation is None:
            return {}
        # Their memory is needed, and offloading moves tensors that they address; recorded again afterwards.
        self.train_step.micro_step.drop()
        return self.validation.run(
            self.step,
            self.model,
            self.connectors,
            writer=log.tensorboard,
            wandb_run=log.wandb if self.job.metrics.wandb_clips else None,
            ema=self.ema,
            optimizers=self.optimizers,
        )

    @contextmanager
    def _in_phase(self, phase: Phase, log: MetricsLogger | None = None) -> Iterator[None]:
        self.watch.enter(self.step, phase)
        with self.heartbeat.phase(phase), nullcontext() if log is None else log.paused(phase):
            yield

    def _start_wandb(self) -> "Run | None":
        if not self.is_main or self.job.metrics.wandb == "off":
            return None
        return start_wandb(
            self.job.metrics, self.plan.folder, redacted_values(plain_job(self.job)), self.job.job.description
        )

    def _log(
        self,
        log: MetricsLogger,
        sums: Sums,
        grad_norms: GradNorms | None,
        elapsed_s: float,
        validated: dict[str, float],
    ) -> None:
        """Logs the steps of `sums`.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite.
        """
        # As drawn from the data: with skipped updates, too, and over all runs of a resumed job.
        seen = self.next_batch * self.plan.batches.global_batch_size
        drawn = {"data/samples": seen, "data/epochs": seen / self.plan.batches.epoch_samples}
        for name, (samples, epochs) in self.plan.drawn(self.next_batch).items():
            drawn |= {f"data/{name}/samples": samples, f"data/{name}/epochs": epochs}
        not_finite = self.report.log(
            log,
            self.step,
            sums,
            grad_norms,
            elapsed_s=elapsed_s,
            lr=self.train_step.learning_rate(self.step),
            graph_bytes=self.train_step.micro_step.peak_bytes,
            extra=validated | drawn | self.saves.take_figures() | self.optimizers.figures(),
        )
        if not_finite is not None:
            raise self.saves.not_finite(self.step, not_finite)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and interval > 0 and step % interval == 0
