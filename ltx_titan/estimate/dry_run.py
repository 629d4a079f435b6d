"""Dry run: builds a job as the trainer does, on one fake rank of any world size, and runs a step on fake tensors.

The process group is torch's fake one, whose collectives return at once, and all tensors are fake: they have shapes,
dtypes and storage sizes, but no memory. Everything else is real: the transformer, its adapters, the parallel plan,
FSDP2, the optimizer, a micro-batch from the strategy, forward, backward, clipping and update. A mesh, shape or option
that would fail on a cluster fails here, and the bytes held by tensors are counted.

Excluded: compilation (blocks run operation by operation, which also saves more activations), Triton kernels, text
connectors, reading checkpoints, validation.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ltx_titan.build import give_storage, shape_transformer
from ltx_titan.common.tensors import COMPUTE_DTYPES
from ltx_titan.conditioning import ModelInputs, absent_streams, to_contexts, weighted_loss
from ltx_titan.config import CompileSection, JobConfig, KernelsSection
from ltx_titan.data import collate
from ltx_titan.diffusion import UniformSigma, draw_step
from ltx_titan.memory.live_bytes import LiveBytes
from ltx_titan.model import TransformerConfig
from ltx_titan.optim import EMA, build_optimizers
from ltx_titan.optim.build import Optimizers
from ltx_titan.parallel.activation_checkpoint import Level
from ltx_titan.parallel.grad_norm import clip_grad_norm_
from ltx_titan.parallel.mesh import build_mesh
from ltx_titan.parallel.stream import weight_stream
from ltx_titan.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DryRun:
    """Bytes held by tensors on rank 0.

    Attributes:
        resident: weights, optimizer state and moving average between steps.
        after_forward: when the backward pass starts.
        peak_backward: peak of forward and backward.
        peak_update: peak of clipping and update.
        seconds: duration of the dry run.
    """

    resident: int
    after_forward: int
    peak_backward: int
    peak_update: int
    seconds: float

    @property
    def peak(self) -> int:
        """Peak of a step."""
        return max(self.peak_backward, self.peak_update)


def dry_run(
    plan: Plan,
    levels: tuple[Level, ...] | None = None,
    stream_blocks: int | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> DryRun:
    """Builds a planned job and runs one step; the process must not have a process group.

    Args:
        plan: the job; the world size is the product of its degrees.
        levels: of each block with `activation_checkpoint.mode = "budget"`, chosen for the GPU that is asked about: the
            fake ranks have none.
        stream_blocks: the same for `parallelism.stream_blocks = "auto"`.
        on_phase: called with what is done next; a large model on many ranks takes minutes.

    Raises:
        Exception: whatever the real job would raise.
    """
    started = time.perf_counter()
    # Compiled code and Triton kernels need real memory.
    plan = dataclasses.replace(plan, job=_without_compilation(plan.job))
    with _fake_ranks(plan):
        # Real tensors, made before the fake mode: a mesh is a tensor of ranks, and `prepare` depends on values.
        device = torch.device("cpu")
        on_phase("building and sharding the model")
        model = shape_transformer(plan, build_mesh(device.type, plan.degrees), device, levels, stream_blocks).train()
        inputs = _inputs(plan)
        stream = weight_stream(model)
        if stream is not None:
            stream.allocate(torch.device("meta"))  # host memory is not counted
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, LiveBytes() as live:
            give_storage(model, device, offloaded=False)
            if stream is not None:
                stream.start(device, _NoCopies())
            return _steps(plan, model, _as_fake(inputs, fake), live, started, on_phase)


class _NoCopies:
    def start(self, slot: Tensor, host: Tensor) -> Callable[[], None]:
        return lambda: None


def _steps(
    plan: Plan,
    model: nn.Module,
    inputs: ModelInputs,
    live: LiveBytes,
    started: float,
    on_phase: Callable[[str], None],
) -> DryRun:
    job = plan.job
    optimizers = build_optimizers(model.named_parameters(), job.optimizer, seed=job.training.seed)
    ema = EMA(model.parameters(), job.optimizer.ema_decay) if job.optimizer.ema_decay is not None else None
    on_phase("optimizer state")
    _make_state(optimizers)
    if job.training.global_batch_size == job.training.local_batch_size * plan.degrees.dp:
        optimizers.zero_grad()
    # With several micro-batches the gradients stay: this is the last of them, which accumulates.
    resident = live.now
    live.reset()
    on_phase("forward pass")
    video, audio = model(inputs.video, inputs.audio, absent_streams(inputs))
    loss = plan.strategy.loss(video, audio, inputs)
    total = weighted_loss(loss, job.loss.video_weight, job.loss.audio_weight).sum() / job.training.global_batch_size
    del video, audio, loss
    after_forward = live.now
    on_phase("backward pass")
    total.backward()
    peak_backward = live.peak
    live.reset()
    on_phase("update")
    if not job.optimizer.in_backward:  # otherwise gradients are used and freed by now
        clip_grad_norm_(model.named_parameters(), job.training.max_grad_norm)
    optimizers.step()
    optimizers.zero_grad()
    if ema is not None:
        ema.update(1)
    return DryRun(resident, after_forward, peak_backward, live.peak, time.perf_counter() - started)


def _make_state(optimizers: Optimizers) -> None:
    """Steps once on zero gradients, because optimizers create their state in the first step."""
    for part in optimizers.parts:
        for group in part.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.step()


def _without_compilation(job: JobConfig) -> JobConfig:
    return job.model_copy(update={"compile": CompileSection(), "kernels": KernelsSection(backend="torch")})


@contextmanager
def _fake_ranks(plan: Plan) -> Iterator[None]:
    # A private path, but the one torch's own tools use: there is no public fake process group.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    degrees = plan.degrees
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=degrees.dp * degrees.cp * degrees.tp)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _inputs(plan: Plan) -> ModelInputs:
    """A micro-batch of the most expensive sample."""
    # The peak of a run is that of its most expensive sample.
    index = max(range(len(plan.dataset)), key=plan.sample_flops)
    count = plan.job.training.local_batch_size
    # Samples of a micro-batch have one shape, so one sample several times has the bytes of any such batch.
    batch = collate([plan.dataset.load(index)] * count)
    if plan.connectors_path is None:
        batch["conditions"] = to_contexts(batch["conditions"], None, COMPUTE_DTYPES[plan.job.training.dtype])
    else:
        batch["conditions"] = _contexts(plan, batch["conditions"]["video_prompt_embeds"])
    # Values of sigma change no shape, so any sampler will do.
    strategy = plan.part_of(index).strategy
    draws = draw_step(*strategy.draw_plan(batch), sampler=UniformSigma(), seed=0, step=1, indices=tuple(range(count)))
    return strategy.prepare(batch, draws)


def _contexts(plan: Plan, features: Tensor) -> dict[str, Tensor]:
    """Zeros of the text connectors' output shape, for features [B, T, D]; the connectors are not built here."""
    config = TransformerConfig.from_metadata(plan.source.config["transformer"])
    streams = {"video_prompt_embeds": config.video, "audio_prompt_embeds": config.audio}
    # Connectors keep the number of tokens: they replace padding by registers.
    return {
        name: torch.zeros(
            *features.shape[:2], stream.caption_dim or stream.context_dim, dtype=COMPUTE_DTYPES[plan.job.training.dtype]
        )
        for name, stream in streams.items()
    }


def _as_fake(value: Any, fake: FakeTensorMode) -> Any:
    """Replaces every tensor in `value` by a fake one, recursing into dataclasses and tuples."""
    if isinstance(value, Tensor):
        return fake.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _as_fake(getattr(value, field.name), fake) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, tuple):
        return tuple(_as_fake(item, fake) for item in value)
    return value
