"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`.

`plan_job` validates the job on the host. `Trainer.__init__` then joins the other ranks, builds the model on the meta
device, shards it, loads this rank's slices and resumes. `Trainer.train` loops; each step is

    data -> text contexts -> inputs -> forward -> loss -> backward     for each micro-batch
    clip -> optimizer -> log -> save
"""

import faulthandler
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ltx_titan.build import export_bytes, export_model, load_connectors, load_transformer
from ltx_titan.checkpoint import (
    BackgroundSaver,
    DamagedError,
    TrainingState,
    complete_folders,
    first_not_finite,
    latest_complete,
    load_state,
    num_bytes,
    remove_leftovers,
    save_everything,
    save_state,
    set_aside,
    state_tensors,
)
from ltx_titan.common.determinism import set_determinism
from ltx_titan.common.failure import report_error
from ltx_titan.common.files import claimed, free_bytes, remove_temporaries, write_text
from ltx_titan.common.logs import quiet_libraries, set_up_logging
from ltx_titan.common.ranks import agree, rank_and_size
from ltx_titan.common.secrets import redacted, redacted_values
from ltx_titan.common.tensors import COMPUTE_DTYPES, without_wrappers
from ltx_titan.common.titan import GarbageCollection, peak_flops
from ltx_titan.conditioning import Loss, ModelInputs, absent_streams, to_contexts, weighted_loss
from ltx_titan.config import JobConfig, dump_job, job_changes, load_job, plain_job
from ltx_titan.data import Batch, DataPosition, MicroBatch, StepBatches, StepLoader, map_tensors, resume_step
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws, UniformSigma, draw_caption_drops, draw_step
from ltx_titan.lora import DropoutStep, is_adapter
from ltx_titan.metrics import (
    MetricsLogger,
    StepGuard,
    StepMetrics,
    Sums,
    peak_memory_gib,
    profile_steps,
    reset_peak_memory,
    start_wandb,
    summarize_run,
)
from ltx_titan.metrics.alerts import Alerts
from ltx_titan.metrics.clock import StepClock
from ltx_titan.metrics.heartbeat import Heartbeat, Phase
from ltx_titan.metrics.step import Mark
from ltx_titan.optim import EMA, build_optimizers, lr_factor
from ltx_titan.optim.build import STATE_BYTES
from ltx_titan.parallel.float8 import precompute_float8_scales
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from ltx_titan.parallel.graphs import GraphedMicroStep, make_recorder
from ltx_titan.parallel.join import check_environment
from ltx_titan.parallel.mesh import build_mesh, default_store, init_distributed, set_timeouts
from ltx_titan.parallel.stop import StepVote, end_with_launcher
from ltx_titan.parallel.watch import Watch
from ltx_titan.plan import Plan, check_dump_folder, is_finished, plan_job
from ltx_titan.validation.report import Report
from ltx_titan.validation.training import TrainingValidation, check_validation_files
from ltx_titan.weights import stream_of

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger("ltx_titan")

GradNorms = tuple[Tensor, dict[str, Tensor]]

# More micro-batches than any step has, so that (step, micro-batch) maps to a unique number.
_MICRO_STEPS = 1 << 20


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
        )
        self.is_lora = job.model.mode == "lora"
        self.mesh = build_mesh(self.device.type, plan.degrees)
        self.dtype = COMPUTE_DTYPES[job.training.dtype]
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None)
        self.sampler = _sigma_sampler(job)
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
        # Audio is replicated across cp and tp, so all ranks of such a group need the same dropout mask.
        self.dropout = DropoutStep(self.model, job.training.seed, self.mesh.dp_rank)
        recorder = make_recorder(job, plan.degrees, self.device)
        self.micro_step = GraphedMicroStep(self._micro_step, self.model.parameters(), recorder)
        self.saver = self._make_saver()
        training = job.training
        self.guard: StepGuard | None = None
        if training.max_skipped_steps > 0 and not job.optimizer.in_backward:
            self.guard = StepGuard(training.max_skipped_steps, training.spike_factor)
        # Last, because it fills the parameters, optimizer states and average that exist by now.
        self.step, self.next_batch = self._resume()
        self._check_room()
        set_timeouts(job.job.timeout_s)  # of all groups that exist by now
        self.vote = StepVote()
        self.idle_steps = 0  # of this run, as far as logged
        self.heartbeat = Heartbeat(plan.folder, is_writer=self.is_main)
        self.save_blocked_s: float | None = None  # how long the newest save blocked training, until it is logged

    def _resume(self) -> tuple[int, int]:
        """Restores the newest complete checkpoint; returns the steps taken and the number of the next global batch."""
        folder, damaged = self.plan.folder / "checkpoint", None
        for path in complete_folders(folder) if self.job.checkpoint.resume else ():
            try:
                saved = load_state(path, self._state({}))
            except DamagedError as error:
                damaged = error
                if self.is_main:
                    logger.warning("%s It is now %s; trying the next older one.", error, set_aside(path).name)
                continue
            return self._resume_from(path, saved)
        if damaged is not None:
            # What was read of it has overwritten the initial weights.
            raise ValueError(f"{damaged} There is no older one; rerun the command to start from the beginning.")
        return 0, 0

    def _resume_from(self, path: Path, saved: dict[str, Any]) -> tuple[int, int]:
        for change in job_changes(saved["job"], self.job):
            logger.warning("job settings changed since the checkpoint: %s", change)
        batches = self.plan.batches
        # Only warnings: settings may change between runs. State that does not fit has been refused by `load_state`.
        position = DataPosition.from_dict(saved["data"])
        next_batch, notes = resume_step(
            position, global_batch_size=batches.global_batch_size, fingerprint=batches.fingerprint
        )
        for note in notes:
            logger.warning("resumed: %s", note)
        if self.guard is not None and "guard" in saved:
            self.guard.load_state_dict(saved["guard"])
        logger.info("resumed from %s: step %d of %d", path, saved["step"], self.job.training.steps)
        return saved["step"], next_batch

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
                "saving": job.checkpoint.interval if job.checkpoint.enable else None,
                "exporting": job.checkpoint.export_interval if plan.exports else None,
            },
        )
        # Collect garbage at fixed steps: an unsynchronized collection on one rank stalls all others.
        garbage = GarbageCollection(job.training.gc_interval)
        loader = StepLoader(
            plan.dataset,
            plan.batches,
            dp_rank=self.mesh.dp_rank,
            dp_size=plan.degrees.dp,
            local_batch_size=job.training.local_batch_size,
            start_step=self.step + 1,
            stop_step=plan.last_step + 1,
            first_batch=self.next_batch,
            draw=self._draw,
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
        report = Report(job, plan.last_step, prompts, is_writer=self.is_main)
        self.heartbeat.step(self.step)
        self.watch.enter(self.step + 1, "loading")
        try:
            with loader, profiling as before_step:
                sums = self._new_sums()
                if self.step == 0 and not job.validation.skip_initial_validation:
                    with clock.paused(), self._in_phase("validating", log):
                        log.show(self._validate(log), step=0)
                        report.write(0)
                for batches in loader:
                    before_step(batches.step)
                    self.watch.enter(batches.step, "training")
                    # Asked before the step and read after it, so the all-reduce overlaps with the step.
                    self.vote.ask(save_failed=self.saver is not None and self.saver.has_failed)
                    grad_norms = self._train_step(batches, sums)
                    self.step, self.next_batch = batches.step, batches.batch_number + 1
                    garbage.run(self.step)
                    validated = {}
                    if _is_due(self.step, job.validation.interval):
                        # Validation is no part of the step time, or the figure would depend on the interval.
                        with clock.paused(), self._in_phase("validating", log):
                            validated = self._validate(log)
                    is_last = self.step == plan.last_step
                    stop, save_failed = self.vote.result()
                    if self.saver is not None and save_failed:
                        self.saver.settle()
                    ends = is_last or stop is not None
                    # A failed save is tried again at once rather than an interval later.
                    saves = ends or save_failed or _is_due(self.step, job.checkpoint.interval)
                    if saves or validated or _is_due(self.step, job.metrics.interval):
                        # Before the save: it raises if the loss is not finite, so bad weights never replace good ones.
                        self._log(log, sums, grad_norms, clock.lap(), validated)
                        sums = self._new_sums()
                    if _is_due(self.step, job.validation.interval):
                        with clock.paused():
                            report.write(self.step)  # after the log, which it shows
                    if saves:
                        with clock.paused(), self._in_phase("saving", log):
                            self._save()
                            while ends and self.saver is not None and not self.saver.settle():
                                self._save()
                    if _is_due(self.step, job.checkpoint.export_interval) and not is_last:
                        with clock.paused(), self._in_phase("exporting", log):
                            self._export()
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
            # Before the process group: its communicators wait for graphs that contain them.
            self.micro_step.drop()
            log.close()
            self._close_saver()
        with self._in_phase("exporting"):
            export = self._export()
        self.heartbeat.set_phase("finished")
        self.alerts.send("finished", "", self.step)
        if self.idle_steps:
            logger.warning("%d steps of this run had no token to generate and learned nothing", self.idle_steps)
        if self.is_main:
            files = {"checkpoint": latest_complete(plan.folder / "checkpoint"), "export": export}
            report.write(self.step, export)
            summarize_run(plan.folder, title=job.job.description or str(plan.folder), files=files)

    def _train_step(self, batches: StepBatches, sums: Sums) -> GradNorms | None:
        """Forward and backward of every micro-batch, then one update.

        Returns:
            The gradient norms before clipping; None if the step was skipped, and with `optimizer.in_backward`, which
            frees each gradient at once.
        """
        max_norm = self.job.training.max_grad_norm
        mark = sums.begin_step()
        # Before the backward pass, in which `optimizer.in_backward` already updates.
        self.optimizers.set_lr(self._learning_rate(batches.step))
        for number, micro_batch in enumerate(batches.micro_batches):
            # Dropout masks depend on the micro-batch alone, so a resumed run draws the same ones.
            self.dropout.set(batches.step * _MICRO_STEPS + number)
            self._forward_backward(micro_batch, sums)
        grad_norms = None
        if not self.job.optimizer.in_backward:
            with record_function("ltx_titan::clip"):
                grad_norms = clip_grad_norm_(
                    self.model.named_parameters(), max_norm, lambda name: stream_of(without_wrappers(name))
                )
            if self.guard is not None and self._skips(batches, sums, mark, grad_norms[0]):
                self.optimizers.zero_grad()
                return None
        self.optimizers.step()
        self.optimizers.zero_grad()
        if self.job.float8.all_gather:
            # The updated weights' scales in one all-reduce, instead of one per layer in the next forward pass.
            precompute_float8_scales(self.model)
        if self.ema is not None:
            self.ema.update(batches.step)
        return grad_norms

    def _skips(self, batches: StepBatches, sums: Sums, mark: Mark, grad_norm: Tensor) -> bool:
        """Whether all ranks skip this step's update; records the step and takes its losses out of the means if so.

        Raises:
            FloatingPointError: too many steps in a row.
        """
        assert self.guard is not None
        degrees = self.plan.degrees
        # Shares whose sum over all ranks is the figure, in one all-reduce, which gives every rank the same bits.
        share = sums.loss_since(mark) / (degrees.cp * degrees.tp)
        figures = torch.stack([share, grad_norm.to(share.device) / dist.get_world_size()])
        dist.all_reduce(figures)
        loss, norm = figures.tolist()  # the step's one wait for the device: the update depends on it
        reason = self.guard.judge(loss, norm)
        if reason is None:
            return False
        sums.undo(mark)
        file = self.plan.folder / "skipped" / f"step-{batches.step}.json"
        if self.is_main:
            indices = self.plan.batches.global_batch(batches.batch_number)
            # Draws are functions of seed, step and position, so this is all that a replay needs.
            record = {
                "step": batches.step,
                "reason": reason,
                "loss": str(loss),
                "grad_norm": str(norm),
                "seed": self.job.training.seed,
                "batch": batches.batch_number,
                "dataset": self.plan.batches.fingerprint,
                "samples": [self.plan.dataset.name(index) for index in indices],
                "skipped_in_a_row": self.guard.in_a_row,
            }
            write_text(file, json.dumps(record, indent=1) + "\n")
            self.alerts.send("spiking", f"skipped, {reason}", batches.step)
            logger.warning("step %d: skipped, %s; its samples are in %s", batches.step, reason, file)
        if self.guard.gives_up:
            self.step = batches.step
            counts = f"{self.guard.in_a_row} steps in a row would have to be skipped, training.max_skipped_steps is"
            raise self._not_finite(f"{reason}; {counts} {self.guard.max_in_a_row}")
        return True

    def _forward_backward(self, micro_batch: MicroBatch, sums: Sums) -> None:
        """Adds this micro-batch's share of the global mean gradient to the parameters."""
        # From pinned memory, so the host does not wait for the copy.
        batch = map_tensors(micro_batch.batch, lambda tensor: tensor.to(self.device, non_blocking=True))
        batch["conditions"] = to_contexts(batch["conditions"], self.connectors, self.dtype)
        inputs = self.plan.strategy.prepare(batch, micro_batch.draws)
        weighted, loss = self.micro_step(inputs)
        sums.add(weighted, loss, inputs, self._sample_share)
        # From the shapes in the plan: counting tokens on the device would make the host wait for it.
        sums.flops += sum(self.plan.sample_flops(index) for index in micro_batch.samples)
        sums.tokens += sum(self.plan.sample_tokens(index) for index in micro_batch.samples)

    def _micro_step(self, inputs: ModelInputs) -> tuple[Tensor, Loss]:
        """Forward, loss and backward. All of it may be one CUDA graph: see `GraphedMicroStep` for what that forbids.

        Returns:
            Weighted loss of each sample [B], and its parts.
        """
        video, audio = self.model(inputs.video, inputs.audio, absent_streams(inputs))
        loss = self.plan.strategy.loss(video, audio, inputs)
        weighted = weighted_loss(loss, self.job.loss.video_weight, self.job.loss.audio_weight)
        (weighted.sum() * self._sample_share).backward()
        return weighted.detach(), loss.detach()

    @property
    def _sample_share(self) -> float:
        """Weight of a sample in the global mean: gradients are summed over ranks and micro-batches of any size."""
        return 1 / self.job.training.global_batch_size

    def _draw(self, batch: Batch, step: int, positions: tuple[int, ...]) -> StepDraws:
        """Draws all random numbers of a micro-batch; called in the loader's threads.

        Args:
            batch: collated samples; dropped captions are masked in place.
            step: optimizer step.
            positions: index of each sample in the global batch. With the seed and step they key each sample's
                generator, so the draws are the same on every mesh.
        """
        seed = self.job.training.seed
        if self.job.data.caption_dropout > 0:
            drops = draw_caption_drops(self.job.data.caption_dropout, seed=seed, step=step, indices=positions)
            batch["conditions"]["prompt_attention_mask"][drops] = 0  # the connectors replace masked tokens by registers
        video, audio = self.plan.strategy.draw_plan(batch)
        return draw_step(video, audio, sampler=self.sampler, seed=seed, step=step, indices=positions)

    def _learning_rate(self, step: int) -> float:
        training = self.job.training
        return self.job.optimizer.lr * lr_factor(step - 1, total_steps=training.steps, scheduler=self.job.scheduler)

    def _validate(self, log: MetricsLogger) -> dict[str, float]:
        if self.validation is None:
            return {}
        # Their memory is needed, and offloading moves tensors that they address; recorded again afterwards.
        self.micro_step.drop()
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
        started = time.monotonic()
        with self.heartbeat.phase(phase):
            yield
        if log is not None:
            log.pause(phase, time.monotonic() - started)

    def _start_wandb(self) -> "Run | None":
        if not self.is_main or self.job.metrics.wandb == "off":
            return None
        return start_wandb(
            self.job.metrics, self.plan.folder, redacted_values(plain_job(self.job)), self.job.job.description
        )

    def _new_sums(self) -> Sums:
        return Sums(self.device)

    def _log(
        self,
        log: MetricsLogger,
        sums: Sums,
        grad_norms: GradNorms | None,
        elapsed_s: float,
        validated: dict[str, float],
    ) -> None:
        """Reduces over ranks and logs; waits for the device.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite.
        """
        # One collective and one copy to the host for all figures.
        means = sums.means(self.mesh.sum_over_samples(sums.flat()).tolist())
        peak_memory = peak_memory_gib(self.device)
        if peak_memory is not None:
            peak = sums.loss.new_tensor(max(peak_memory, self.micro_step.peak_bytes / 1024**3))
            # The fullest rank decides whether a job fits.
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            peak_memory = peak.item()
            reset_peak_memory(self.device)
        tflops = means.tflop / dist.get_world_size() / elapsed_s
        norm, extra = None, {}
        if grad_norms is not None:
            norm = grad_norms[0].item()
            extra = {f"optim/grad_norm_{stream}": value.item() for stream, value in sorted(grad_norms[1].items())}
        extra |= means.by_sigma | validated
        # As drawn from the data: with skipped updates, too, and over all runs of a resumed job.
        seen = self.next_batch * self.plan.batches.global_batch_size
        extra |= {"data/samples": seen, "data/epochs": seen / len(self.plan.dataset)}
        if means.idle_steps:
            extra["data/idle_steps"] = means.idle_steps
            self._count_idle(means.idle_steps)
        if self.guard is not None and self.guard.total:
            extra["optim/skipped_steps"] = self.guard.total
        if self.save_blocked_s is not None:
            extra["perf/save_blocked_s"], self.save_blocked_s = self.save_blocked_s, None
        log.log(
            StepMetrics(
                step=self.step,
                loss=means.loss,
                loss_video=means.video,
                loss_audio=means.audio,
                grad_norm=norm,
                lr=self._learning_rate(self.step),
                step_time_s=elapsed_s / sums.taken,
                tokens_per_s=means.tokens / elapsed_s,
                tflops_per_gpu=tflops,
                mfu=None if self.peak_flops is None else tflops * 1e12 / self.peak_flops,
                peak_mem_gib=peak_memory,
                extra=extra,
            )
        )
        self.heartbeat.step(self.step, means.loss)
        # The norm is of the last step; without a step in the sums all were skipped, as the records in skipped/ say.
        if sums.steps and not (means.is_finite and isfinite(norm or 0.0)):
            raise self._not_finite(f"loss {means.loss}, gradient norm {norm}")

    def _count_idle(self, steps: int) -> None:
        """Counts steps without a token to generate, and warns of the first one; the total is logged at the end."""
        if self.idle_steps == 0:
            logger.warning(
                "step %d, or one since the last log line: no sample had a token to generate (clips without the "
                "generated stream, or covered by conditions), so nothing was learned; metrics.jsonl counts such steps "
                "as data/idle_steps",
                self.step,
            )
        self.idle_steps += steps

    def _not_finite(self, what: str) -> FloatingPointError:
        self._close_saver()  # so that the newest checkpoint is known
        return FloatingPointError(
            f"step {self.step}: {what}. Nothing of this step was saved or exported; the newest checkpoint is "
            f"{latest_complete(self.plan.folder / 'checkpoint')}. Lower optimizer.lr, keep training.max_grad_norm at "
            f"1.0 (optimizer.in_backward cannot clip), and inspect this step's samples."
        )

    def _refuse_not_finite(self, state: TrainingState) -> None:
        """Raises FloatingPointError on every rank if a tensor to be written is NaN or infinite on any of them."""
        name = first_not_finite(state_tensors(state))
        if name is not None:
            raise self._not_finite(f"{name} contains NaN or infinity")

    def _close_saver(self) -> None:
        """Waits for the save in progress and ends the saver; an error of that save is logged, not raised."""
        saver, self.saver = self.saver, None
        if saver is None:
            return
        try:
            saver.close()
        except Exception as error:  # the run ends anyway, with an error that matters more
            logger.error("the checkpoint in progress failed: %s", error)

    def _check_room(self) -> None:
        """Refuses to start if the disk has no room for what the remaining run writes at least.

        Raises:
            ValueError: on rank 0.
            PeerError: on the others.
        """
        checkpoint, error = self.job.checkpoint, None
        if self.is_main and checkpoint.enable:
            select = is_adapter if self.is_lora else save_everything
            weights = state_tensors(TrainingState(self.model, select=select))
            trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
            # Before the first step the optimizer has no state yet.
            state = trained * (STATE_BYTES[self.job.optimizer.name] + (0 if self.ema is None else 4))
            saves = num_bytes(weights) + state if self.step < self.plan.last_step else 0
            exports = export_bytes(self.plan, self.model) if self.plan.exports else 0
            free = free_bytes(self.plan.folder)
            if saves + exports > free:
                error = ValueError(
                    f"job.dump_folder = {str(self.plan.folder)!r}: a checkpoint needs {saves / 2**30:.2f} GiB and the "
                    f"export {exports / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free on its disk. Free some space, "
                    f"or set another folder."
                )
        agree(error, "checking the disk")

    @property
    def _keep_last(self) -> int:
        return max(self.job.checkpoint.keep_last, 0)

    def _make_saver(self) -> BackgroundSaver | None:
        if not (self.job.checkpoint.enable and self.job.checkpoint.background):
            return None
        return BackgroundSaver(self.plan.folder / "checkpoint", keep_last=self._keep_last)

    def _state(self, trainer: dict[str, Any]) -> TrainingState:
        """State to save or restore. With LoRA only the adapters: the frozen base is read from its own file."""
        optimizers = [*self.optimizers.parts, *([self.ema] if self.ema is not None else [])]
        select = is_adapter if self.is_lora else save_everything
        return TrainingState(self.model, optimizers, select=select, trainer=trainer)

    def _save(self) -> None:
        if not self.job.checkpoint.enable:
            return
        batches = self.plan.batches
        position = DataPosition(
            self.next_batch * batches.global_batch_size, batches.global_batch_size, batches.fingerprint
        )
        # The scale is derived from the data, which `ltx-titan export` does not have.
        trainer = {
            "data": position.to_dict(),
            "job": redacted_values(plain_job(self.job)),
            "reference_scale": self.plan.reference_scale,
        }
        if self.guard is not None:
            trainer["guard"] = self.guard.state_dict()
        state, folder = self._state(trainer), self.plan.folder / "checkpoint"
        self._refuse_not_finite(state)
        started = time.perf_counter()
        if self.saver is not None:
            self.saver.save(self.step, state)
        else:
            save_state(folder, self.step, state, keep_last=self._keep_last)
        # Every rank pauses here anyway: also collect the oldest generation, which the runs between steps skip.
        GarbageCollection.collect("after a save", generation=2)
        self.save_blocked_s = time.perf_counter() - started
        how = "is being written in the background" if self.saver is not None else "is saved"
        logger.info("checkpoint of step %d %s; training was blocked for %.1f s", self.step, how, self.save_blocked_s)

    def _export(self) -> Path | None:
        """Writes the file for inference tools unless `checkpoint.export` is off; every rank calls it."""
        if not self.plan.exports:
            return None
        self._refuse_not_finite(TrainingState(self.model, select=is_adapter if self.is_lora else save_everything))
        return export_model(self.plan, self.model, self.step)


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and interval > 0 and step % interval == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line; returns the exit code (docs/reliability.md)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    set_up_logging()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    folder = Path()
    try:
        check_environment(os.environ)
        # Checked before a process group exists: every rank finds the same error by itself, and none waits for another.
        if arguments[0].startswith("--"):
            raise ValueError(
                f"{arguments[0]}: expected the job file first, then overrides; put it behind the job file."
            )
        plan = plan_job(load_job(arguments[0], arguments[1:]), rank_and_size()[1])
        folder = plan.folder
        check_validation_files(plan)
        check_dump_folder(folder)
        if is_finished(plan):
            return 0
        with _claimed_by_rank_0(folder):
            Trainer(plan).train()
    except Exception as error:
        if not report_error(error, folder):
            raise
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


@contextmanager
def _claimed_by_rank_0(folder: Path) -> Iterator[None]:
    """Holds the dump folder, and clears it of files that a killed run was writing. The other ranks wait for rank 0."""
    if rank_and_size()[0] > 0:
        yield
        return
    with claimed(folder):
        for path in remove_temporaries(folder):
            logger.info("removed %s of an interrupted run", path)
        remove_leftovers(folder / "checkpoint")
        yield


def _sigma_sampler(job: JobConfig) -> ShiftedLogitNormal | UniformSigma:
    sigma = job.sigma
    if sigma.name == "uniform":
        return UniformSigma(sigma.min_value, sigma.max_value)
    return ShiftedLogitNormal(sigma.std, sigma.eps, sigma.uniform_prob)


if __name__ == "__main__":
    end_with_launcher()
    faulthandler.enable()  # a crash in native code ends with the Python stack that led there
    sys.exit(main())
