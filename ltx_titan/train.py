"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`.

`plan_job` finds on the host what can be wrong. `Trainer.__init__` then joins the other ranks, builds the model on the
meta device, shards it, loads this rank's slices and resumes. `Trainer.train` loops; each step is

    data -> text contexts -> inputs -> forward -> loss -> backward     for each micro-batch
    clip -> optimizer -> log -> save
"""

import gc
import logging
import os
import sys
import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from ltx_titan.build import export_model, load_connectors, load_transformer
from ltx_titan.checkpoint import (
    BackgroundSaver,
    TrainingState,
    latest_complete,
    load_state,
    official_name,
    save_state,
    stream_of,
)
from ltx_titan.checkpoint.state import save_everything
from ltx_titan.conditioning import Loss, ModelInputs, absent_streams
from ltx_titan.conditioning.text import to_contexts
from ltx_titan.config import JobConfig, dump_job, job_changes, load_job, plain_job
from ltx_titan.data import Batch, DataPosition, MicroBatch, StepBatches, StepLoader, map_tensors, resume_step
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws, UniformSigma, draw_caption_drops, draw_step
from ltx_titan.lora import DropoutClock, is_adapter
from ltx_titan.metrics import (
    MetricsLogger,
    StepMetrics,
    peak_flops,
    peak_memory_gib,
    profile_steps,
    reset_peak_memory,
    start_wandb,
)
from ltx_titan.metrics.clock import StepClock
from ltx_titan.metrics.sums import Sums, bucket_means
from ltx_titan.optim import EMA, build_optimizers, lr_factor
from ltx_titan.parallel.float8 import precompute_float8_scales
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from ltx_titan.parallel.graphs import GraphedMicroStep, make_recorder
from ltx_titan.parallel.mesh import build_mesh, init_distributed
from ltx_titan.parallel.parallelize import compute_dtype
from ltx_titan.plan import Plan, plan_job
from ltx_titan.quiet import quieten
from ltx_titan.report import is_finished, report
from ltx_titan.stop import StopSignal
from ltx_titan.validate import TrainingValidation, check_validation_files

if TYPE_CHECKING:
    from wandb import Run

logger = logging.getLogger("ltx_titan")

GradNorms = tuple[Tensor, dict[str, Tensor]]

# More micro-batches than any step has, so that each has a number of its own.
_MICRO_STEPS = 1 << 20


class Trainer:
    """One run of a job on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.job = job = plan.job
        self.device = init_distributed()
        self.is_main = dist.get_rank() == 0
        self.is_lora = job.model.mode == "lora"
        self.mesh = build_mesh(self.device.type, plan.degrees)
        self.dtype = compute_dtype(job)
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None)
        self.sampler = _sigma_sampler(job)
        self.validation = None
        if job.validation.interval is not None:
            self.validation = TrainingValidation(plan, self.mesh, self.device)
        self.model = load_transformer(plan, self.mesh, self.device)
        self.connectors = load_connectors(plan, self.mesh, self.device)
        # The rate is set before every step, from the step alone.
        self.optimizers = build_optimizers(self.model.named_parameters(), job.optimizer, seed=job.training.seed)
        decay = job.optimizer.ema_decay
        self.ema = None if decay is None else EMA(self.model.parameters(), decay)
        # One mask for all ranks of a cp or tp group: they must agree on the sound, which each of them has in full.
        self.dropout = DropoutClock(self.model, job.training.seed, self.mesh.dp_rank)
        recorder = make_recorder(job, plan.degrees, self.device)
        self.micro_step = GraphedMicroStep(self._micro_step, self.model.parameters(), recorder)
        self.saver = self._make_saver()
        self.step, self.next_batch = self._resume()
        self.stop = StopSignal()
        self.save_blocked_s: float | None = None  # by the newest save, until it is logged

    def _resume(self) -> tuple[int, int]:
        """Goes on from the newest complete checkpoint; returns the steps taken and the number of the next batch."""
        path = latest_complete(self.plan.folder / "checkpoint") if self.job.checkpoint.resume else None
        if path is None:
            return 0, 0
        saved = load_state(path, self._state({}))
        for change in job_changes(saved["job"], self.job):
            logger.warning("resumed with another job: %s", change)
        batches = self.plan.batches
        position = DataPosition.from_dict(saved["data"])
        next_batch, notes = resume_step(
            position, global_batch_size=batches.global_batch_size, fingerprint=batches.fingerprint
        )
        for note in notes:
            logger.warning("resumed: %s", note)
        logger.info("resumed from %s: step %d of %d", path, saved["step"], self.job.training.steps)
        return saved["step"], next_batch

    def train(self) -> None:
        """Runs the remaining steps, saves, exports and says where everything is.

        Raises:
            FloatingPointError: the loss or the gradient is not a number.
        """
        job, plan = self.job, self.plan
        if self.is_main:
            plan.folder.mkdir(parents=True, exist_ok=True)
            (plan.folder / "job.toml").write_text(dump_job(job))
        log = MetricsLogger(
            plan.folder,
            total_steps=job.training.steps,
            resumed_step=self.step,
            is_writer=self.is_main,
            tensorboard=job.metrics.tensorboard,
            wandb=self._start_wandb(),
        )
        # Collections at steps of one's choosing: left to itself every rank pauses all others at another moment.
        gc.disable()
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
        try:
            with loader, profiling as before_step:
                sums = self._new_sums()
                if self.step == 0 and not job.validation.skip_initial_validation:
                    with clock.paused():
                        log.show(self._validate(log), step=0)
                for batches in loader:
                    before_step(batches.step)
                    self.stop.ask()
                    grad_norms = self._train_step(batches, sums)
                    self.step, self.next_batch = batches.step, batches.batch_number + 1
                    if _is_due(self.step, job.training.gc_interval):
                        gc.collect()
                    validated = {}
                    if _is_due(self.step, job.validation.interval):
                        with clock.paused():
                            validated = self._validate(log)
                    is_last = self.step == plan.last_step
                    stops = self.stop.is_agreed()
                    saves = is_last or stops or _is_due(self.step, job.checkpoint.interval)
                    if saves or validated or _is_due(self.step, job.metrics.interval):
                        # Before a save, so that weights that are not numbers never replace good ones.
                        self._log(log, sums, grad_norms, clock.lap(), validated)
                        sums = self._new_sums()
                    if saves:
                        with clock.paused():
                            self._save()
                    if _is_due(self.step, job.checkpoint.export_interval) and not is_last:
                        with clock.paused():
                            self._export()
                    if stops and not is_last:
                        logger.warning("stopped by a signal after step %d; the same command goes on", self.step)
                        return
        finally:
            # Before the process group: its communicators wait for graphs that contain them.
            self.micro_step.drop()
            log.close()
            if self.saver is not None:
                self.saver.close()
        export = self._export()
        if self.is_main:
            report(plan, export)

    def _train_step(self, batches: StepBatches, sums: Sums) -> GradNorms | None:
        """Forward and backward of every micro-batch, then one update.

        Returns:
            The gradient norms before clipping; None where weights are updated in the backward pass, which leaves none.
        """
        max_norm = self.job.training.max_grad_norm
        self.job.optimizer.check_step(max_grad_norm=max_norm, micro_batches=batches.num_micro_batches)
        self.optimizers.set_lr(self._learning_rate(batches.step))
        for number, micro_batch in enumerate(batches.micro_batches):
            self.dropout.set(batches.step * _MICRO_STEPS + number)
            self._forward_backward(micro_batch, sums)
        grad_norms = None
        if not self.job.optimizer.in_backward:
            with record_function("ltx_titan::clip"):
                grad_norms = clip_grad_norm_(
                    self.model.named_parameters(), max_norm, lambda name: stream_of(official_name(name))
                )
        self.optimizers.step()
        self.optimizers.zero_grad()
        if self.job.float8.all_gather:
            precompute_float8_scales(self.model)
        if self.ema is not None:
            self.ema.update(batches.step)
        sums.steps += 1
        return grad_norms

    def _forward_backward(self, micro_batch: MicroBatch, sums: Sums) -> None:
        """Adds this micro-batch's share of the global mean gradient to the parameters."""
        batch = map_tensors(micro_batch.batch, lambda tensor: tensor.to(self.device, non_blocking=True))
        batch["conditions"] = to_contexts(batch["conditions"], self.connectors, self.dtype)
        inputs = self.plan.strategy.prepare(batch, micro_batch.draws)
        weighted, loss = self.micro_step(inputs)
        sums.add(weighted, loss, inputs, self._sample_share)
        sums.flops += sum(self.plan.sample_flops(index) for index in micro_batch.samples)
        sums.tokens += sum(self.plan.sample_tokens(index) for index in micro_batch.samples)

    def _micro_step(self, inputs: ModelInputs) -> tuple[Tensor, Loss]:
        """Forward, loss and backward. All of it may be one CUDA graph: see `GraphedMicroStep` for what that forbids.

        Returns:
            Weighted loss of each sample [B], and its parts.
        """
        video, audio = self.model(inputs.video, inputs.audio, absent_streams(inputs))
        loss = self.plan.strategy.loss(video, audio, inputs)
        weighted = weigh(loss, self.job.loss.video_weight, self.job.loss.audio_weight)
        (weighted.sum() * self._sample_share).backward()
        return weighted.detach(), loss.detach()

    @property
    def _sample_share(self) -> float:
        """Weight of a sample in the global mean: ranks and micro-batches add up, whatever their sizes."""
        return 1 / self.job.training.global_batch_size

    def _draw(self, batch: Batch, step: int, positions: tuple[int, ...]) -> StepDraws:
        """Runs in the loader's threads."""
        keys = {"seed": self.job.training.seed, "step": step, "indices": positions}
        if self.job.data.caption_dropout > 0:
            drops = draw_caption_drops(self.job.data.caption_dropout, **keys)
            batch["conditions"]["prompt_attention_mask"][drops] = 0  # registers take the place of the whole prompt
        return draw_step(*self.plan.strategy.draw_plan(batch), sampler=self.sampler, **keys)

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

    def _start_wandb(self) -> "Run | None":
        if not self.is_main or self.job.metrics.wandb == "off":
            return None
        return start_wandb(self.job.metrics, self.plan.folder, plain_job(self.job), self.job.job.description)

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
        """Reduces over ranks and records. Only logged steps wait for the device.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite.
        """
        steps = sums.steps
        work = sums.loss.new_tensor([sums.flops / 1e12, sums.tokens])
        totals = self.mesh.sum_over_samples(torch.cat([sums.loss, work, sums.buckets.flatten()])).tolist()
        loss, loss_video, loss_audio, tflop, tokens = totals[:5]
        peak_memory = peak_memory_gib(self.device)
        if peak_memory is not None:
            peak = sums.loss.new_tensor(max(peak_memory, self.micro_step.peak_bytes / 1024**3))
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            peak_memory = peak.item()
            reset_peak_memory(self.device)
        tflops = tflop / dist.get_world_size() / elapsed_s
        norm, extra = None, {}
        if grad_norms is not None:
            norm = grad_norms[0].item()
            extra = {f"optim/grad_norm_{stream}": value.item() for stream, value in sorted(grad_norms[1].items())}
        extra |= bucket_means(totals[5:]) | validated
        if self.save_blocked_s is not None:
            extra["perf/save_blocked_s"], self.save_blocked_s = self.save_blocked_s, None
        log.log(
            StepMetrics(
                step=self.step,
                loss=loss / steps,
                loss_video=loss_video / steps if self.job.video and self.job.video.is_generated else None,
                loss_audio=loss_audio / steps if self.job.audio and self.job.audio.is_generated else None,
                grad_norm=norm,
                lr=self._learning_rate(self.step),
                step_time_s=elapsed_s / steps,
                tokens_per_s=tokens / elapsed_s,
                tflops_per_gpu=tflops,
                mfu=None if self.peak_flops is None else tflops * 1e12 / self.peak_flops,
                peak_mem_gib=peak_memory,
                extra=extra,
            )
        )
        if not all(isfinite(value) for value in (loss, norm) if value is not None):
            raise FloatingPointError(
                f"step {self.step}: loss {loss / steps}, gradient norm {norm}. Nothing was saved of it; the newest "
                f"checkpoint is {latest_complete(self.plan.folder / 'checkpoint')}. Lower optimizer.lr, keep "
                f"training.max_grad_norm at 1.0, and look at the data of this step."
            )

    @property
    def _keep_last(self) -> int:
        return max(self.job.checkpoint.keep_last, 0)

    def _make_saver(self) -> BackgroundSaver | None:
        if not (self.job.checkpoint.enable and self.job.checkpoint.background):
            return None
        return BackgroundSaver(self.plan.folder / "checkpoint", keep_last=self._keep_last)

    def _state(self, trainer: dict[str, Any]) -> TrainingState:
        """What is saved and restored: with LoRA the adapters alone, for the base has its own file."""
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
        trainer = {"data": position.to_dict(), "job": plain_job(self.job)}
        state, folder = self._state(trainer), self.plan.folder / "checkpoint"
        started = time.perf_counter()
        if self.saver is not None:
            self.saver.save(self.step, state)
        else:
            save_state(folder, self.step, state, keep_last=self._keep_last)
        self.save_blocked_s = time.perf_counter() - started
        how = "being written in the background" if self.saver is not None else "saved"
        logger.info("step %d is %s; training waited %.1f s", self.step, how, self.save_blocked_s)

    def _export(self) -> Path | None:
        """Writes the file for inference tools, if the job wants one; every rank calls it."""
        if not (self.job.checkpoint.enable and self.job.checkpoint.export):
            return None
        return export_model(self.plan, self.model, self.step)


def _is_due(step: int, interval: int | None) -> bool:
    return bool(interval) and step % interval == 0


def weigh(loss: Loss, video_weight: float, audio_weight: float) -> Tensor:
    """Each sample's loss [B] with its streams weighted."""
    parts = [
        part * weight for part, weight in ((loss.video, video_weight), (loss.audio, audio_weight)) if part is not None
    ]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job from the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    quieten()
    _set_up_logging()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        plan = plan_job(load_job(arguments[0], arguments[1:]), int(os.environ.get("WORLD_SIZE", 1)))
        check_validation_files(plan)
        if is_finished(plan):
            return 0
        Trainer(plan).train()
    except (ValueError, FloatingPointError) as error:
        # What a user can mend gets its message alone; anything else is ours, and gets its traceback.
        logger.error("%s", "\n".join([str(error), *getattr(error, "__notes__", [])]))
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _sigma_sampler(job: JobConfig) -> ShiftedLogitNormal | UniformSigma:
    sigma = job.sigma
    if sigma.name == "uniform":
        return UniformSigma(sigma.min_value, sigma.max_value)
    return ShiftedLogitNormal(sigma.std, sigma.eps, sigma.uniform_prob)


def _set_up_logging() -> None:
    """One line per event, from rank 0; other ranks only speak up when they are wrong alone."""
    is_main = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(
        format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, stream=sys.stdout
    )
    logging.getLogger("ltx_titan").setLevel(logging.INFO if is_main else logging.CRITICAL)
    logging.captureWarnings(is_main)


if __name__ == "__main__":
    sys.exit(main())
