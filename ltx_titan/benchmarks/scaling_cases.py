"""Cases of the scaling table: what is trained, on how many GPUs, and what the estimate predicts for it.

    weak     one clip a GPU, full fine-tuning and LoRA, bfloat16 and float8, 4k, 8k and 16k video tokens
    strong   one clip of 32k tokens over cp = all GPUs
    hsdp     the weak case of 4k in bfloat16 with replicas: two (of a node each, on several nodes); with LoRA, all GPUs

Depth: all blocks if one GPU can train them, else the largest number that it can, and all blocks where these fit. The
work of a GPU is the same on any number of them, recomputation included: a strong case recomputes every block, the
others store as many activations as the smallest column that the case fits, so that memory which sharding frees makes no
step faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from math import ceil
from pathlib import Path
from typing import Literal

from ltx_titan.common.hardware import GIB, Gpu
from ltx_titan.config import Degrees, check_world, load_job
from ltx_titan.estimate.prediction import Estimate, estimate
from ltx_titan.memory.budget import fitting_levels
from ltx_titan.memory.peak import saved_by_levels
from ltx_titan.memory.workload import Setup, Workload, make_setup, make_workload
from ltx_titan.parallel.activation_checkpoint import Level
from ltx_titan.plan import plan_job

COLUMNS = (1, 2, 4, 8)
"""Numbers of GPUs that are measured."""

_LONG, _LARGE = ("num_frames=185", "fps=36.6"), ("width=1536", "height=896")
# Video tokens, of the job's own 768x448x89.
_CLIPS = {"4k": (), "8k": _LONG, "16k": _LARGE, "32k": _LARGE + _LONG}
_MODES = {
    "full": (),
    "LoRA": (
        "--model.mode=lora",
        "--lora.rank=32",
        "--lora.alpha=32.0",
        '--lora.targets=["all_attention"]',
        "--optimizer.lr=1e-4",
    ),
}
_FLOAT8 = {
    "full": ("--float8.recipe=tensorwise",),
    "LoRA": ("--lora.base_dtype=float8", "--lora.float8_matmuls=auto"),
}
_STEPS = 14


@dataclass(frozen=True)
class Case:
    """One line of the table; a column has it on its number of GPUs.

    Attributes:
        family: see above.
        mode: "full" or "LoRA".
        precision: "bf16" or "float8".
        tokens: "4k" to "32k".
        layers: blocks of the model.
        budget: GiB of saved activations; "auto" fills the GPU.
        is_whole: these are all blocks of the model.
    """

    family: Literal["weak", "strong", "hsdp"]
    mode: str
    precision: str
    tokens: str
    layers: int
    budget: float | Literal["auto"] = "auto"
    is_whole: bool = False

    @property
    def name(self) -> str:
        """Name in rows and tables."""
        return f"{self.family} {self.mode} {self.precision} {self.tokens}, {self.layers} layers"

    @property
    def twin(self) -> str:
        """Name of the case without replicas, which an `hsdp` case is compared with."""
        return replace(self, family="weak").name

    def runs_on(self, gpus: int, gpus_per_node: int) -> bool:
        """Whether there is such a mesh: replicas need two GPUs, cp stays within a node."""
        return {"weak": True, "strong": gpus <= gpus_per_node, "hsdp": gpus > 1}[self.family]

    def settings(self, gpus: int, gpus_per_node: int) -> list[str]:
        """Overrides of the job, `--section.key=value`."""
        found = [f"--data.synthetic.{value}" for value in _CLIPS[self.tokens]] + [*_MODES[self.mode]]
        found += _FLOAT8[self.mode] if self.precision == "float8" else ()
        found += [f"--model.num_layers={self.layers}", f"--training.steps={_STEPS}"]
        if self.family == "strong":
            return [
                *found,
                "--activation_checkpoint.mode=full",
                "--training.global_batch_size=1",
                f"--parallelism.cp={gpus}",
            ]
        found += ["--activation_checkpoint.mode=budget", f"--activation_checkpoint.memory_gib={self.budget}"]
        found += [f"--training.global_batch_size={gpus}"]
        if self.family == "hsdp":
            # A replica of LoRA's frozen base fits every GPU, which then gathers nothing.
            replicas = gpus if self.mode == "LoRA" else max(2, gpus // gpus_per_node)
            found.append(f"--parallelism.dp_replicate={replicas}")
        return found


def all_cases(
    job: Path,
    gpu: Gpu,
    layers: int | None = None,
    overrides: Sequence[str] = (),
    names: Sequence[str] = ("*",),
) -> list[Case]:
    """The cases of a kind of GPU, the same for every number of them, in the order of what matters most.

    Args:
        job: job file of full fine-tuning on synthetic clips of 4k tokens.
        gpu: kind of GPU, whose memory decides about depth and recomputation.
        layers: depth of full fine-tuning. Default: as described above.
        overrides: of every case.
        names: patterns of the wanted ones; `*` stands for anything. The GPUs wait while budgets of others are found.

    Raises:
        ValueError: the job cannot be planned, or an override sets the depth.
    """
    if any(override.startswith("--model.num_layers") for override in overrides):
        raise ValueError(
            "--model.num_layers: expected no such override, since cases have depths of their own; pass --layers."
        )
    depth = plan_job(load_job(job, overrides), 1).architecture.num_layers

    def fitting(mode: str, tokens: str) -> int:
        if layers is not None and mode == "full":
            return layers
        return _fitting_depth(job, Case("strong", mode, "bf16", tokens, depth), gpu, overrides)

    def is_wanted(case: Case) -> bool:
        return any(fnmatch(case.name, pattern) for pattern in names)

    found = []
    common = {mode: fitting(mode, "16k") for mode in _MODES}
    for precision in ("bf16", "float8"):
        for mode, blocks in common.items():
            for tokens in ("4k", "16k", "8k"):
                # A set: both may be the same.
                cases = [Case("weak", mode, precision, tokens, n, is_whole=n == depth) for n in sorted({blocks, depth})]
                # A case with replicas has the budget of the one without.
                wanted = [case for case in cases if is_wanted(case) or is_wanted(replace(case, family="hsdp"))]
                found += [replace(case, budget=_budget(job, case, gpu, overrides)) for case in wanted]
        if precision == "bf16":
            for mode in _MODES:
                if any(is_wanted(Case("strong", mode, precision, "32k", n)) for n in range(1, depth + 1)):
                    blocks = fitting(mode, "32k")
                    found.append(Case("strong", mode, precision, "32k", blocks, is_whole=blocks == depth))
            found += [replace(case, family="hsdp") for case in found if case.family == "weak" and case.tokens == "4k"]
    return [case for case in found if is_wanted(case)]


def predict(
    job: Path, case: Case, columns: Sequence[int], gpu: Gpu, overrides: Sequence[str] = ()
) -> dict[int, Estimate]:
    """Estimates a case on several numbers of GPUs; those without such a mesh are absent."""
    found: dict[int, Estimate] = {}
    work: Workload | None = None
    for gpus in columns:
        if not case.runs_on(gpus, gpu.gpus_per_node):
            continue
        planned = load_job(job, [*case.settings(gpus, gpu.gpus_per_node), *overrides])
        degrees = check_world(planned, gpus)
        if work is None:
            # Planned once, since it takes a second: only the batch depends on the number of GPUs.
            work = make_workload(plan_job(planned, gpus))
        own = replace(work, global_batch_size=planned.training.global_batch_size)
        setup = make_setup(planned, degrees, gpu.name)
        found[gpus] = estimate(own, _with_levels(own, setup, planned.activation_checkpoint.memory_gib, gpu), gpu)
    return found


def _with_levels(work: Workload, setup: Setup, budget: float | Literal["auto"], gpu: Gpu) -> Setup:
    if setup.recompute != "budget":
        return setup
    # As the trainer chooses them; with all blocks recomputed if nothing fits.
    least: Level = "full"
    return replace(setup, levels=fitting_levels(work, setup, budget, gpu.memory) or (least,) * work.num_layers)


def _fitting_depth(job: Path, case: Case, gpu: Gpu, overrides: Sequence[str]) -> int:
    """Largest number of blocks with which one GPU can train a case that recomputes all of them."""
    work, setup = _on_one_gpu(job, case, gpu, overrides)
    setup = replace(setup, recompute="budget")
    for layers in range(case.layers, 0, -1):
        if fitting_levels(replace(work, num_layers=layers), setup, "auto", gpu.memory) is not None:
            return layers
    return 1  # does not fit either, and is then not run


def _budget(job: Path, case: Case, gpu: Gpu, overrides: Sequence[str]) -> float | Literal["auto"]:
    """GiB of activations that the smallest column saves which the case fits; "auto" if it fits none."""
    work, setup = _on_one_gpu(job, case, gpu, overrides)
    for gpus in COLUMNS:
        own = replace(work, global_batch_size=gpus)
        setup = replace(setup, recompute="budget", degrees=Degrees(dp_shard=gpus))
        levels = fitting_levels(own, setup, "auto", gpu.memory)
        if levels is not None:
            # Rounded up, so that the same levels fit it.
            return ceil(100 * saved_by_levels(own, replace(setup, levels=levels)) / GIB) / 100
    return "auto"


def _on_one_gpu(job: Path, case: Case, gpu: Gpu, overrides: Sequence[str]) -> tuple[Workload, Setup]:
    planned = plan_job(load_job(job, [*case.settings(1, gpu.gpus_per_node), *overrides]), 1)
    return make_workload(planned), make_setup(planned.job, planned.degrees, gpu.name)
