"""Trains a job: `torchrun ... -m ltx_titan.train job.toml [--section.key=value ...]`.

`plan_job` finds on the host what can be wrong. `Trainer.__init__` then joins the other ranks, builds the model on the
meta device, shards it, loads this rank's slices and resumes. `Trainer.train` loops; each step is

    data -> text contexts -> inputs -> forward -> loss -> backward     for each micro-batch
    clip -> optimizer -> log -> save
"""

import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltx_titan.checkpoint import (
    CONNECTORS,
    TrainingState,
    export_transformer,
    latest_complete,
    load_parameters,
    load_state,
    read_trainer_state,
    save_state,
    unused_by,
)
from ltx_titan.conditioning.text import to_contexts
from ltx_titan.config import JobConfig, build_job, dump_job, job_changes, load_job
from ltx_titan.data import Batch, DataPosition, MicroBatch, StepBatches, StepLoader, map_tensors, resume_step
from ltx_titan.diffusion import ShiftedLogitNormal, StepDraws, UniformSigma, draw_step
from ltx_titan.metrics import (
    MetricsLogger,
    StepMetrics,
    peak_flops,
    peak_memory_gib,
    plot_loss,
    profile_steps,
    read_metrics,
    reset_peak_memory,
)
from ltx_titan.model import TextConnectors
from ltx_titan.model.init import init_random_
from ltx_titan.optim.schedule import lr_factor
from ltx_titan.parallel.fsdp import apply_fsdp
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from ltx_titan.parallel.mesh import build_mesh, init_distributed
from ltx_titan.parallel.parallelize import compute_dtype, parallelize
from ltx_titan.plan import Plan, build_connectors, build_transformer, plan_job
from ltx_titan.quiet import quieten

logger = logging.getLogger("ltx_titan")

# Schedulers announce the end of a job's time with these; the run then saves and ends after the step it is in.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Sums:
    """What is summed over micro-batches and steps until the next log line; tensors stay on the device."""

    loss: Tensor
    flops: float = 0.0
    tokens: int = 0
    steps: int = 0


class Trainer:
    """One run of a job on this rank."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.job = job = plan.job
        self.device = init_distributed()
        self.is_main = dist.get_rank() == 0
        self.mesh = build_mesh(self.device.type, plan.degrees)
        self.dtype = compute_dtype(job)
        self.sampler = _sigma_sampler(job)
        self.model = self._load_transformer()
        self.connectors = self._load_connectors()
        # The rate is set before every step, from the step alone.
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=job.optimizer.lr,
            betas=job.optimizer.betas,
            eps=job.optimizer.eps,
            weight_decay=job.optimizer.weight_decay,
            fused=True,
        )
        self.step, self.next_batch = self._resume()
        self.stop_requested = False

    def _load_transformer(self) -> nn.Module:
        """Builds on the meta device, shards, takes memory for this rank's shards only, and fills them."""
        plan, started = self.plan, time.perf_counter()
        model = build_transformer(plan.source, plan.modalities)
        parallelize(model, self.job, self.mesh)
        model.to_empty(device=self.device)
        if plan.source.path is not None:
            load_parameters(model, plan.source.path, allow_unused=unused_by(plan.modalities))
        else:
            init_random_(model, self.job.training.seed)
        count = sum(parameter.numel() for parameter in model.parameters())
        origin = plan.source.path or f"random weights ({self.job.model.shape})"
        logger.info("transformer: %.3f B parameters from %s in %.1f s", count / 1e9, origin, _since(started))
        return model.train()

    def _load_connectors(self) -> TextConnectors | None:
        """Frozen, sharded like the model, in the dtype they are run in."""
        path = self.plan.connectors_path
        if path is None:
            return None
        connectors = build_connectors(self.plan.source, path).to(self.dtype).requires_grad_(False)
        for connector in connectors.children():
            apply_fsdp(connector, connector.transformer_1d_blocks, self.mesh.fsdp, self.dtype)
        connectors.to_empty(device=self.device)
        load_parameters(connectors, path, component=CONNECTORS)
        logger.info("text connectors from %s", path)
        return connectors.eval()

    def _resume(self) -> tuple[int, int]:
        """Goes on from the newest complete checkpoint; returns the steps taken and the number of the next batch."""
        path = latest_complete(self.plan.folder / "checkpoint") if self.job.checkpoint.resume else None
        if path is None:
            return 0, 0
        saved = load_state(path, TrainingState(self.model, [self.optimizer]))
        for change in job_changes(build_job(saved["job"], str(path)), self.job):
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

    def _request_stop(self, number: int, frame: object) -> None:
        self.stop_requested = True

    def train(self) -> None:
        """Runs the remaining steps, saves, exports and says where everything is.

        Raises:
            FloatingPointError: the loss or the gradient is not a number.
        """
        job, plan = self.job, self.plan
        for number in _STOP_SIGNALS:
            signal.signal(number, self._request_stop)
        if self.is_main:
            plan.folder.mkdir(parents=True, exist_ok=True)
            (plan.folder / "job.toml").write_text(dump_job(job))
        log = MetricsLogger(
            plan.folder,
            total_steps=job.training.steps,
            resumed_step=self.step,
            is_writer=self.is_main,
            tensorboard=job.metrics.tensorboard,
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
        started = time.perf_counter()
        saved_step = self.step
        try:
            with loader, profiling as before_step:
                sums = self._new_sums()
                for batches in loader:
                    before_step(batches.step)
                    grad_norm = self._train_step(batches, sums)
                    self.step, self.next_batch = batches.step, batches.batch_number + 1
                    if self.step % job.training.gc_interval == 0:
                        gc.collect()
                    is_last = self.step == plan.last_step
                    is_due = job.checkpoint.interval > 0 and self.step % job.checkpoint.interval == 0
                    if is_last or is_due or self.step % job.metrics.interval == 0:
                        # Before a save, so that weights that are not numbers never replace good ones.
                        self._log(log, sums, grad_norm, time.perf_counter() - started)
                        sums, started = self._new_sums(), time.perf_counter()
                    if is_last or is_due or self.stop_requested:
                        self._save()
                        saved_step, started = self.step, time.perf_counter()
                    if self.stop_requested:
                        logger.warning("stopped by a signal after step %d; the same command goes on", self.step)
                        return
        finally:
            log.close()
        assert saved_step == self.step
        self._finish()

    def _train_step(self, batches: StepBatches, sums: Sums) -> Tensor:
        """Forward and backward of every micro-batch, then one update; returns the gradient norm before clipping."""
        for micro_batch in batches.micro_batches:
            self._forward_backward(micro_batch, sums)
        grad_norm = clip_grad_norm_(self.model.parameters(), self.job.training.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(batches.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sums.steps += 1
        return grad_norm

    def _forward_backward(self, micro_batch: MicroBatch, sums: Sums) -> None:
        """Adds this micro-batch's share of the global mean gradient to the parameters."""
        batch = map_tensors(micro_batch.batch, lambda tensor: tensor.to(self.device, non_blocking=True))
        batch["conditions"] = to_contexts(batch["conditions"], self.connectors, self.dtype)
        inputs = self.plan.strategy.prepare(batch, micro_batch.draws)
        video, audio = self.model(inputs.video, inputs.audio)
        loss = self.plan.strategy.loss(video, audio, inputs)
        # The mean over the global batch: ranks and micro-batches add up, whatever their sizes.
        share = 1 / self.job.training.global_batch_size
        (loss.per_sample.sum() * share).backward()
        with torch.no_grad():
            parts = (loss.per_sample, loss.video, loss.audio)
            sums.loss += torch.stack([sums.loss.new_zeros(()) if p is None else p.sum() for p in parts]) * share
        sums.flops += sum(self.plan.sample_flops(index) for index in micro_batch.samples)
        sums.tokens += sum(self.plan.sample_tokens(index) for index in micro_batch.samples)

    def _draw(self, batch: Batch, step: int, positions: tuple[int, ...]) -> StepDraws:
        plans = self.plan.strategy.draw_plan(batch)
        return draw_step(*plans, sampler=self.sampler, seed=self.job.training.seed, step=step, indices=positions)

    def _learning_rate(self, step: int) -> float:
        training = self.job.training
        return self.job.optimizer.lr * lr_factor(step - 1, total_steps=training.steps, scheduler=self.job.scheduler)

    def _new_sums(self) -> Sums:
        return Sums(torch.zeros(3, device=self.device))

    def _log(self, log: MetricsLogger, sums: Sums, grad_norm: Tensor, elapsed_s: float) -> None:
        """Reduces over ranks, records, and agrees on whether to stop. The only place where a step waits for the device.

        Raises:
            FloatingPointError: the loss or the gradient norm is not finite.
        """
        steps = sums.steps
        work = sums.loss.new_tensor([sums.flops / 1e12, sums.tokens, float(self.stop_requested)])
        totals = self.mesh.sum_over_data(torch.cat([sums.loss, work]))
        loss, loss_video, loss_audio, tflop, tokens, stops = totals.tolist()
        self.stop_requested = stops > 0
        peak_memory = peak_memory_gib(self.device)
        if peak_memory is not None:
            peak = sums.loss.new_tensor(peak_memory)
            dist.all_reduce(peak, op=dist.ReduceOp.MAX)
            peak_memory = peak.item()
            reset_peak_memory(self.device)
        tflops = tflop / dist.get_world_size() / elapsed_s
        peak = peak_flops(torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else None)
        norm = grad_norm.item()
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
                mfu=None if peak is None else tflops * 1e12 / peak,
                peak_mem_gib=peak_memory,
            )
        )
        if not (abs(loss) < float("inf") and abs(norm) < float("inf")):
            raise FloatingPointError(
                f"step {self.step}: loss {loss / steps}, gradient norm {norm}. Nothing was saved of it; the newest "
                f"checkpoint is {latest_complete(self.plan.folder / 'checkpoint')}. Lower optimizer.lr, keep "
                f"training.max_grad_norm at 1.0, and look at the data of this step."
            )

    def _save(self) -> None:
        batches = self.plan.batches
        position = DataPosition(
            self.next_batch * batches.global_batch_size, batches.global_batch_size, batches.fingerprint
        )
        trainer = {"data": position.to_dict(), "job": self.job.model_dump(mode="json", exclude_none=True)}
        state = TrainingState(self.model, [self.optimizer], trainer=trainer)
        started = time.perf_counter()
        keep_last = max(self.job.checkpoint.keep_last, 0)
        path = save_state(self.plan.folder / "checkpoint", self.step, state, keep_last=keep_last)
        logger.info("saved %s in %.1f s", path, _since(started))

    def _finish(self) -> None:
        """Exports the model, draws the loss curve and says where everything is."""
        folder, checkpoint = self.plan.folder, self.job.checkpoint
        export = None
        if checkpoint.export:
            export = folder / "export" / f"transformer-step-{self.step}.safetensors"
            source = self.plan.source
            dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[checkpoint.export_dtype]
            export_transformer(self.model, export, config=source.config, metadata=source.metadata, dtype=dtype)
        if self.is_main:
            report(self.plan, export)


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
        "checkpoint": latest_complete(folder / "checkpoint"),
        "export": export,
    }
    for name, path in files.items():
        if path is not None and path.exists():
            logger.info("%-12s %s", name, path)


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


def _since(started: float) -> float:
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
