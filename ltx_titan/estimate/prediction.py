"""What a job will need and take on a kind of GPU, and the mesh on which it would be fastest; no GPU is asked.

Memory comes from memory_estimate.py, time from time_estimate.py; this is where both meet, and where a search compares
setups. Predictions are for comparing setups and for knowing what fits before a machine is rented: each constant names
its source beside it, and `docs/benchmarks/` holds predictions against measurements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log

from ltx_titan.common.hardware import Gpu
from ltx_titan.config import Degrees
from ltx_titan.estimate.memory import Memory, estimate_memory
from ltx_titan.estimate.time import StepTime, estimate_time, useful_flops
from ltx_titan.estimate.workload import Setup, Workload


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a setup.

    Attributes:
        setup: what is estimated.
        gpu: on which kind.
        memory: of the fullest GPU.
        time: of a step; None where weights are in host memory, whose buses and processor are not modelled.
        flops: useful ones of a step over all GPUs.
        tokens: video and audio tokens in a step.
    """

    setup: Setup
    gpu: Gpu
    memory: Memory
    time: StepTime | None
    flops: float
    tokens: int

    @property
    def fits(self) -> bool:
        """Whether the GPU has the memory."""
        return self.memory.needed <= self.gpu.memory

    @property
    def tokens_per_s(self) -> float:
        """Video and audio tokens a second and GPU."""
        return self.tokens / self.time.total / self.setup.gpus

    @property
    def tflops(self) -> float:
        """Useful TFLOP/s per GPU."""
        return self.flops / self.time.total / self.setup.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Share of the GPU's peak."""
        return self.tflops * 1e12 / self.gpu.peak


def estimate(work: Workload, setup: Setup, gpu: Gpu) -> Estimate:
    """Estimates one setup."""
    return Estimate(
        setup=setup,
        gpu=gpu,
        memory=estimate_memory(work, setup),
        time=None if setup.cpu_offload else estimate_time(work, setup, gpu),
        flops=useful_flops(work),
        tokens=work.global_batch_size * (work.video_tokens + work.audio_tokens),
    )


def search(work: Workload, setup: Setup, gpu: Gpu) -> list[Estimate]:
    """Estimates of all setups of as many GPUs that fit, fastest first; of equals the simplest.

    Varied are the mesh, activation checkpointing and the micro-batch; the rest is as in `setup`. The global batch
    stays, for the learning rate belongs to it.
    """
    found = [estimate(work, candidate, gpu) for candidate in candidates(work, setup, gpu.gpus_per_node)]
    fitting = [one for one in found if one.fits]
    # To a percent: finer differences are noise, and a mesh with fewer axes is easier to run.
    return sorted(fitting, key=lambda one: (_rounded(one.time.total), _complexity(one.setup), one.memory.peak))


def candidates(work: Workload, setup: Setup, gpus_per_node: int) -> Iterator[Setup]:
    """All setups of `setup.gpus` ranks that `plan_job` accepts."""
    gpus = setup.gpus
    modes = ["none", "selective", "full"] if setup.compile else ["none", "full"]
    for tp in _divisors(min(gpus, gpus_per_node)):
        for cp in _divisors(gpus // tp if gpus % tp == 0 else 1):
            if gpus % (tp * cp) or work.heads % (tp * cp) or (cp > 1 and not work.video_tokens):
                continue
            dp = gpus // (tp * cp)
            for dp_replicate in _divisors(dp):
                degrees = Degrees(dp_replicate, dp // dp_replicate, cp, tp)
                for batch in _divisors(work.global_batch_size):
                    if work.global_batch_size % (batch * dp):
                        continue
                    if work.in_backward and work.global_batch_size != batch * dp:
                        continue
                    for mode in modes:
                        offload = setup.offload_activations and mode == "full"
                        yield replace(
                            setup,
                            degrees=degrees,
                            recompute=mode,
                            k=1,
                            local_batch_size=batch,
                            offload_activations=offload,
                            cpu_offload=False,
                        )


def _rounded(seconds: float) -> int:
    return round(100 * log(seconds))


def _complexity(setup: Setup) -> tuple[int, int, int]:
    degrees = setup.degrees
    return (degrees.tp * degrees.cp, degrees.dp_replicate, setup.recompute != "none")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
