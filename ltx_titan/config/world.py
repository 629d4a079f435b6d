"""Mesh and global batch of a job against the number of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

from ltx_titan.config.errors import ConfigError, Problem
from ltx_titan.config.job import JobConfig


@dataclass(frozen=True)
class Degrees:
    """Size of each axis of the mesh; their product is the number of ranks."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Number of ranks that read different samples."""
        return self.dp_replicate * self.dp_shard


def batch_problems(job: JobConfig, dp: int, *, is_exact: bool) -> Iterator[Problem]:
    """Problems of the global batch on `dp` data-parallel ranks, each with micro-batches of `local_batch_size`.

    Args:
        job: the job.
        dp: number of data-parallel ranks.
        is_exact: `dp` is the number of the run, not a divisor of it, so that the number of micro-batches is known.
    """
    training = job.training
    unit = training.local_batch_size * dp
    if training.global_batch_size % unit:
        rounded = -(-training.global_batch_size // unit) * unit
        yield Problem(
            "training.global_batch_size",
            training.global_batch_size,
            f"a multiple of local_batch_size x data-parallel ranks = {training.local_batch_size} x {dp} = {unit}",
            f"set it to {rounded}, or change training.local_batch_size or the parallelism",
        )
        return
    micro_batches = training.global_batch_size // unit
    if is_exact and job.optimizer.in_backward and micro_batches > 1:
        yield Problem(
            "optimizer.in_backward",
            True,
            "one micro-batch per step, because gradients are freed instead of accumulated; found global_batch_size / "
            f"(local_batch_size x data-parallel ranks) = {training.global_batch_size} / ({training.local_batch_size} "
            f"x {dp}) = {micro_batches}",
            f"set training.local_batch_size = {training.global_batch_size // dp}, lower training.global_batch_size, "
            "or set optimizer.in_backward = false",
        )


def check_world(job: JobConfig, world_size: int) -> Degrees:
    """Resolves `parallelism.dp_shard = -1` and checks that mesh and batch fit `world_size` ranks.

    Raises:
        ConfigError: the degrees do not multiply to `world_size`, the batch does not divide, or gradients would have to
            be accumulated with `optimizer.in_backward`; with the arithmetic.
    """
    parallelism = job.parallelism
    others = parallelism.dp_replicate * parallelism.cp * parallelism.tp
    terms = f"dp_replicate x cp x tp = {parallelism.dp_replicate} x {parallelism.cp} x {parallelism.tp} = {others}"
    dp_shard = parallelism.dp_shard
    # Resolved here, because only the launcher knows the number of ranks.
    if dp_shard == -1:
        if world_size % others:
            raise ConfigError(
                [
                    Problem(
                        "parallelism.dp_shard",
                        -1,
                        f"{terms} to divide the {world_size} ranks of this run",
                        "change these degrees or the number of ranks",
                    )
                ]
            )
        dp_shard = world_size // others
    elif dp_shard * others != world_size:
        raise ConfigError(
            [
                Problem(
                    "parallelism.dp_shard",
                    dp_shard,
                    f"dp_shard x {terms} to equal {world_size} ranks, not {dp_shard} x {others} = {dp_shard * others}",
                    f"set parallelism.dp_shard = -1, or start {dp_shard * others} ranks",
                )
            ]
        )
    degrees = Degrees(parallelism.dp_replicate, dp_shard, parallelism.cp, parallelism.tp)
    # Again, with the exact number of data-parallel ranks: before, -1 stood for at least one.
    if problems := list(batch_problems(job, degrees.dp, is_exact=True)):
        raise ConfigError(problems)
    return degrees
