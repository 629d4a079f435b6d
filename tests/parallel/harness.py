"""Trains a tiny audio-video transformer under some mesh and on one process, and hands both records to the tests.

`records(world)` starts `world` gloo processes once and runs all selected cases of that size in them.
LTX_TITAN_PARALLEL=all selects the whole matrix instead of the cases marked for continuous integration.
"""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ltx_titan.common.tensors import without_wrappers
from ltx_titan.conditioning import FlexibleStrategy
from ltx_titan.config import Degrees
from ltx_titan.diffusion import ShiftedLogitNormal, draw_step
from ltx_titan.model import LTXTransformer
from ltx_titan.optim.adamw import ShardedAdamW
from ltx_titan.parallel import static_slots
from ltx_titan.parallel.activation_checkpoint import apply_full_checkpointing, apply_selective_checkpointing
from ltx_titan.parallel.cp import apply_context_parallel
from ltx_titan.parallel.float8 import apply_float8, precompute_float8_scales, token_multiple
from ltx_titan.parallel.fsdp import apply_fsdp, use_static_slots
from ltx_titan.parallel.grad_norm import grad_norms
from ltx_titan.parallel.mesh import Mesh, build_mesh
from ltx_titan.parallel.tokens import shard_tokens
from ltx_titan.parallel.tp import apply_tensor_parallel
from tests.golden_cases import load_case
from tests.processes import run_ranks

STEPS, GLOBAL_BATCH, LR = 2, 4, 1e-3

_FIRST_FRAME = {"type": "first_frame", "probability": 0.5}
_REFERENCE = {"type": "reference", "latents_dir": "references"}
_VIDEO = {"is_generated": True, "latents_dir": "latents"}
_AUDIO = {"is_generated": True, "latents_dir": "audio_latents"}

# Samples of one forward pass; the others take all of a rank's. A batch of one compiles to other code than several.
_MICRO_BATCH = {"joint": 1}

# Token counts (45 video, 7 audio) divide by no degree.
SCENARIOS = {
    "joint": {"video": _VIDEO, "audio": _AUDIO},
    "first_frame": {"video": _VIDEO | {"conditions": [_FIRST_FRAME]}, "audio": _AUDIO},
    "reference": {"video": _VIDEO | {"conditions": [_FIRST_FRAME, _REFERENCE]}, "audio": _AUDIO},
    "frozen_audio": {"video": _VIDEO, "audio": _AUDIO | {"is_generated": False}},
    "frozen_video": {"video": _VIDEO | {"is_generated": False}, "audio": _AUDIO},
    "video_alone": {"video": _VIDEO | {"conditions": [_FIRST_FRAME]}},
}


@dataclass(frozen=True)
class Case:
    """One parallel run. `compile` is a backend of torch.compile or None."""

    degrees: Degrees
    scenario: str
    recompute: str = "none"
    compile: str | None = None
    float8: str | None = None
    float8_all_gather: bool = False
    dtype: torch.dtype = torch.float32
    static_slots: str = "auto"
    copy_engines: str = "off"
    exchange_gradients: str = "off"
    ci: bool = False

    def __str__(self) -> str:
        axes = [f"{k}{v}" for k, v in vars(self.degrees).items() if v > 1]
        float8 = [f"float8_{self.float8}{'_gathered' * self.float8_all_gather}"] if self.float8 else []
        dtype = ["bfloat16"] if self.dtype == torch.bfloat16 else []
        slots = [f"slots_{self.static_slots}"] if self.static_slots != "auto" else []
        slots += ["copy_engines"] if self.copy_engines != "off" else []
        slots += ["exchange"] if self.exchange_gradients != "off" else []
        return "-".join([*axes, self.scenario, self.recompute, self.compile or "eager", *float8, *dtype, *slots])

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.degrees.dp * self.degrees.cp * self.degrees.tp


@dataclass(frozen=True)
class Record:
    """Results of `STEPS` steps: losses and gradient norms per step, first gradients, last weights."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def selected(cases: list[Case]) -> list[Case]:
    """The cases to run now."""
    wanted = cases if os.environ.get("LTX_TITAN_PARALLEL") == "all" else [case for case in cases if case.ci]
    return list({str(case): case for case in wanted}.values())


def model_config() -> dict:
    """A 22B-style transformer, tiny: gates, nine-row tables, 4 heads, 2 blocks."""
    return load_case("av_22b").entry["config"]["transformer"]


def batch_of(scenario: str, rows: slice) -> dict[str, dict[str, Tensor]]:
    """Rows of a seeded global batch."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(GLOBAL_BATCH, *shape, generator=generator)[rows]

    batch = {
        "video_latents": {"latents": draw(16, 3, 3, 5), "fps": torch.full((GLOBAL_BATCH,), 24.0)[rows]},
        "audio_latents": {"latents": draw(3, 7, 4)},
        "conditions": {"video_prompt_embeds": draw(6, 64), "audio_prompt_embeds": draw(6, 32)},
        "references": {"latents": draw(16, 2, 3, 5), "fps": torch.full((GLOBAL_BATCH,), 24.0)[rows]},
    }
    if scenario != "reference":
        del batch["references"]
    return batch


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all runs."""
    return ShardedAdamW(model.parameters(), lr=LR)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scenario: str,
    *,
    dp_rank: int = 0,
    dp: int = 1,
    steps: range = range(STEPS),
    after_step: Callable[[], None] = lambda: None,
) -> Record:
    """Runs the steps of a trainer on the rows of one data-parallel rank."""
    strategy = FlexibleStrategy.from_config(SCENARIOS[scenario])
    size = GLOBAL_BATCH // dp
    micro = _MICRO_BATCH.get(scenario, size)
    losses, norms, gradients = [], [], {}
    for step in steps:
        losses.append(0.0)
        for first in range(dp_rank * size, (dp_rank + 1) * size, micro):
            batch = batch_of(scenario, slice(first, first + micro))
            plans = strategy.draw_plan(batch)
            rows = range(first, first + micro)
            draws = draw_step(*plans, sampler=ShiftedLogitNormal(), seed=3, step=step, indices=rows)
            inputs = strategy.prepare(batch, draws)
            loss = strategy.loss(*model(inputs.video, inputs.audio), inputs).per_sample.sum() / GLOBAL_BATCH
            loss.backward()
            losses[-1] += loss.item()
        if step == steps[0]:
            gradients = {name: whole(p.grad) for name, p in named(model) if p.grad is not None}
        norms.append(grad_norms(model.named_parameters())[0])
        optimizer.step()
        optimizer.zero_grad()
        after_step()
    weights = {name: whole(p) for name, p in named(model)}
    return Record(losses, [float(x) for x in norms], gradients, weights)


def empty_model(scenario: str) -> LTXTransformer:
    """The model of a scenario's streams, on the default device."""
    return LTXTransformer.from_config(model_config(), "av" if "audio" in SCENARIOS[scenario] else "video")


@cache
def single(scenario: str) -> Record:
    """The run on one process."""
    model = empty_model(scenario)
    weights = load_case("av_22b").weights
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return train(model, adamw(model), scenario)


@cache
def records(world: int, cases: tuple[Case, ...]) -> dict[str, Record]:
    """The parallel runs of `world` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "records.pt"
        run_ranks(_work, world, cases, out)
        return torch.load(out, weights_only=False)


def _work(cases: tuple[Case, ...], out: Path) -> None:
    found = {}
    for case in cases:
        torch.compiler.reset()
        found[str(case)] = run(case)
    if dist.get_rank() == 0:
        torch.save(found, out)


def run(case: Case) -> Record:
    """One parallel run, on each of its processes."""
    mesh = build_mesh("cpu", case.degrees)
    model = build(case, mesh)
    fill(model)
    after_step = partial(precompute_float8_scales, model) if case.float8_all_gather else lambda: None
    return train_on(model, adamw(model), case, mesh, after_step=after_step)


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, mesh: Mesh, **options: Any) -> Record:
    """`train` on this rank's rows, with the losses of the whole batch."""
    record = train(model, optimizer, case.scenario, dp_rank=mesh.dp_rank, dp=case.degrees.dp, **options)
    # Velocities, hence losses, are whole on every cp and tp rank: only data-parallel ranks hold different samples.
    losses = torch.tensor(record.losses)
    dist.all_reduce(losses, group=mesh.data.get_group("dp"))
    return replace(record, losses=losses.tolist())


def build(case: Case, mesh: Mesh) -> LTXTransformer:
    """The model, built on the meta device, parallelized, then given storage, as by the trainer."""
    with torch.device("meta"):
        model = empty_model(case.scenario)
    names = [name for name, _ in model.named_parameters()]
    tp = case.degrees.tp
    if case.float8:
        apply_float8(model, case.float8, emulate=True, tp=tp, fsdp_all_gather=case.float8_all_gather)
    if tp * case.degrees.cp > 1 or case.float8:
        layout = shard_tokens(model, mesh, multiple=token_multiple(case.float8 or "none"))
        if tp > 1:
            apply_tensor_parallel(model, mesh, layout)
        apply_context_parallel(model, layout)
    if case.recompute == "selective":
        apply_selective_checkpointing(model.transformer_blocks, tp=tp)
    if case.compile:
        for block in model.transformer_blocks:
            block.compile(fullgraph=True, dynamic=False, backend=case.compile)
    if case.recompute in ("full", "every_k"):
        numbers = range(0, len(model.transformer_blocks), 2 if case.recompute == "every_k" else 1)
        apply_full_checkpointing(model.transformer_blocks, numbers)
    apply_fsdp(model, model.transformer_blocks, mesh.fsdp, case.dtype)
    # Of the tiny model's weights, the larger ones have all-gathers of their own, as in a real model.
    static_slots.DIRECT_BYTES = 4096
    use_static_slots(
        model,
        model.transformer_blocks,
        case.static_slots,
        copy_engines=case.copy_engines,
        exchange_gradients=case.exchange_gradients,
    )
    model.to_empty(device="cpu")
    assert [name for name, _ in named(model)] == names
    return model


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Gives every parameter this rank's part of the golden weights."""
    weights = load_case("av_22b").weights
    for name, p in named(model):
        p.copy_(distribute_tensor(weights[name], p.device_mesh, p.placements, src_data_rank=None))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, a copy."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters by official name."""
    return [(without_wrappers(name), p) for name, p in model.named_parameters()]
