"""Predicts memory, step time and MFU of a setup, and searches for the fastest setup that fits.

Memory comes from `memory/peak.py`, time from `time.py`. Predictions are for comparing setups and for choosing a machine
before renting it. Each constant of theirs names its source; a test compares predictions with the measured runs in
`docs/benchmarks/`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

from ltx_titan.common.hardware import GPUS, Gpu
from ltx_titan.config import ActivationCheckpointMode, Degrees, LoRASection
from ltx_titan.estimate.time import StepTime, estimate_time, model_flops
from ltx_titan.memory.budget import fitting_levels
from ltx_titan.memory.peak import Memory, estimate_memory
from ltx_titan.memory.workload import Setup, Workload, has_measured_kernels, model_weights
from ltx_titan.model import TransformerConfig
from ltx_titan.model.flops import Trained
from ltx_titan.weights import read_source

# Prompts are padded to this many tokens.
_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Estimate:
    """Memory and time of a setup.

    Attributes:
        setup: the estimated setup.
        gpu: kind of GPU.
        memory: of the fullest GPU.
        time: of a step; None with `cpu_offload`, since PCIe transfers and the update on the CPU are not modeled.
        flops: model FLOPs of a step over all GPUs.
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
        """Whether the GPU has enough memory."""
        return self.memory.needed <= self.gpu.memory

    @property
    def step_time_s(self) -> float:
        """Seconds of a step; only if `time` is predicted."""
        assert self.time is not None, "cpu_offload: the step time is not predicted"
        return self.time.total

    @property
    def tokens_per_s(self) -> float:
        """Video and audio tokens per second and GPU."""
        return self.tokens / self.step_time_s / self.setup.gpus

    @property
    def tflops(self) -> float:
        """Model TFLOP/s per GPU."""
        return self.flops / self.step_time_s / self.setup.gpus / 1e12

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: the fraction of the GPU's peak."""
        return self.tflops * 1e12 / self.gpu.peak


def estimate(work: Workload, setup: Setup, gpu: Gpu) -> Estimate:
    """Estimates one setup: bytes on the fullest GPU, seconds of a step, FLOPs over all GPUs."""
    return Estimate(
        setup=setup,
        gpu=gpu,
        memory=estimate_memory(work, setup),
        time=None if setup.cpu_offload else estimate_time(work, setup, gpu),
        flops=model_flops(work),
        tokens=work.global_batch_size * (work.video_tokens + work.audio_tokens),
    )


@dataclass(frozen=True)
class SampleTimes:
    """Step times of single samples on one GPU.

    Attributes:
        work: the model; its token counts are replaced by a sample's.
        gpu: kind of GPU.
        mfu: assumed MFU; None predicts the time from the rates of the GPU.
    """

    work: Workload
    gpu: Gpu
    mfu: float | None

    def seconds(self, video_tokens: int, audio_tokens: int) -> float:
        """Seconds of a training step on one sample, without data loading."""
        largest = (video_tokens, audio_tokens)
        work = replace(self.work, video_tokens=video_tokens, audio_tokens=audio_tokens, largest=largest)
        if self.mfu is not None:
            return model_flops(work) / (self.gpu.peak * self.mfu)
        kernels = has_measured_kernels(self.gpu.name)
        setup = Setup(Degrees(), recompute="selective", compile=True, graphs=True, kernels=kernels, static_slots=True)
        return estimate_time(work, setup, self.gpu).total

    @property
    def assumption(self) -> str:
        """The assumptions in words."""
        kind = "LoRA" if self.work.trained == "lora" else "full fine-tuning"
        name = self.gpu.name.upper()
        if self.mfu is not None:
            return f"one sample on one {name} at {self.mfu:.0%} of its peak, {kind}"
        return f"one sample on one {name}, compiled with selective checkpointing, {kind}"


def step_times(
    model_path: Path | None, shape: str | None, gpu: str, mfu: float | None, trained: Trained
) -> SampleTimes:
    """Prepares estimates of the step time of single samples.

    Args:
        model_path: checkpoint to be trained; None for a released shape.
        shape: name of the released shape, if there is no checkpoint.
        gpu: name of the GPU, such as H100; case does not matter, and A100 is the one with 80 GB.
        mfu: assumed MFU, in (0, 1]; None to predict it.
        trained: "full" or "lora".

    Raises:
        ValueError: the checkpoint or shape cannot be read, the GPU is unknown, or `mfu` is out of range.
    """
    kind = next((kind for name, kind in GPUS.items() if gpu.lower() in (name, name.partition("-")[0])), None)
    if kind is None:
        raise ValueError(f"--gpu: the peak of {gpu!r} is not known; expected one of {', '.join(GPUS)}.")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu: expected a fraction of the peak, above 0 and at most 1, found {mfu}.")
    source = read_source(None if model_path is None else str(model_path), None if model_path else shape, None)
    transformer = source.config["transformer"]
    weights = model_weights(transformer, "av", LoRASection() if trained == "lora" else None)
    work = Workload(
        transformer=transformer,
        trained=trained,
        block=weights.block,
        outside=weights.outside,
        connectors=0,
        num_layers=TransformerConfig.from_metadata(transformer).num_layers,
        video_tokens=0,
        audio_tokens=0,
        text_tokens=_TEXT_TOKENS,
        video_timesteps=1,
        audio_timesteps=1,
        largest=(0, 0),
        global_batch_size=1,
    )
    return SampleTimes(work, kind, mfu)


def search(work: Workload, setup: Setup, gpu: Gpu) -> list[Estimate]:
    """Estimates all setups with the same number of GPUs and returns those that fit, fastest first.

    Varies the mesh, activation checkpointing and the micro-batch; everything else is taken from `setup`. The global
    batch size stays, since the learning rate was chosen for it. Among equally fast setups the simplest comes first.
    """
    found = []
    for candidate in candidates(work, setup, gpu.gpus_per_node):
        if candidate.recompute == "budget":
            levels = fitting_levels(work, candidate, "auto", gpu.memory)
            # With everything saved it is the candidate of mode "none".
            if levels is None or set(levels) == {"none"}:
                continue
            candidate = replace(candidate, levels=levels)
        found.append(estimate(work, candidate, gpu))
    fitting = [one for one in found if one.fits]
    # Rounded to a percent: finer differences are below the model's error, and fewer mesh axes are easier to run.
    return sorted(fitting, key=lambda one: (_rounded(one.step_time_s), _complexity(one.setup), one.memory.peak))


def candidates(work: Workload, setup: Setup, gpus_per_node: int) -> Iterator[Setup]:
    """Yields all setups of `setup.gpus` ranks that `plan_job` accepts.

    Args:
        work: the workload; its heads and global batch size have to divide.
        setup: number of ranks, and the options that are not varied.
        gpus_per_node: largest degree of tensor parallelism.
    """
    gpus = setup.gpus
    # Without compilation, checkpointing by operations runs them one by one and is slower than full.
    modes: list[ActivationCheckpointMode] = ["none", "budget", "full"] if setup.compile else ["none", "full"]
    for tp in _divisors(min(gpus, gpus_per_node)):  # tp's collectives are not overlapped, so it stays within a node
        for cp in _divisors(gpus // tp if gpus % tp == 0 else 1):
            splits_evenly = gpus % (tp * cp) == 0 and work.heads % (tp * cp) == 0
            if not splits_evenly or (cp > 1 and work.video_tokens == 0):
                continue
            dp = gpus // (tp * cp)
            # HSDP: replication costs memory and saves traffic between nodes, so every split of dp is a candidate.
            for dp_replicate in _divisors(dp):
                degrees = Degrees(dp_replicate, dp // dp_replicate, cp, tp)
                for batch in _divisors(work.global_batch_size):
                    # Every rank runs equally many micro-batches of equal size.
                    if work.global_batch_size % (batch * dp):
                        continue
                    if work.in_backward and work.global_batch_size != batch * dp:
                        continue  # updates in the backward pass leave no gradient to accumulate
                    for mode in modes:
                        offload = setup.offload_activations and mode == "full"
                        yield replace(
                            setup,
                            degrees=degrees,
                            recompute=mode,
                            k=1,
                            levels=(),
                            local_batch_size=batch,
                            offload_activations=offload,
                            # Its time is not predicted, so it could not be ranked.
                            cpu_offload=False,
                            # The mesh of a streamed job has neither tp nor cp.
                            stream_blocks=setup.stream_blocks if tp * cp == 1 else 0,
                        )


def _rounded(seconds: float) -> int:
    # The logarithm makes equal ratios equal differences, so that the steps are percents at any duration.
    return round(100 * log(seconds))


def _complexity(setup: Setup) -> tuple[int, int, int]:
    degrees = setup.degrees
    # Fewer tp and cp ranks first, then less replication, then no recomputation.
    return (degrees.tp * degrees.cp, degrees.dp_replicate, setup.recompute != "none")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
