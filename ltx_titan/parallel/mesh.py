"""Process groups and the device mesh.

A rank has a coordinate on four axes: `dp_replicate x dp_shard x cp x tp`. Two meshes over them are built, with public
API only:

    parameters   (dp_replicate, fsdp, tp)   fsdp = dp_shard x cp: context-parallel ranks shard parameters too
    data         (dp, cp, tp)               dp = dp_replicate x dp_shard: ranks of one dp index read the same samples

Axes of size 1 stay in both, with real process groups, so that no code needs a special case for them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ltx_titan.common.gloo import use_one_gloo_thread
from ltx_titan.common.ranks import rank_and_size
from ltx_titan.config import Degrees
from ltx_titan.parallel.join import join, record_collectives


@dataclass(frozen=True)
class Mesh:
    """Both meshes, on one device type."""

    degrees: Degrees
    parameters: DeviceMesh
    data: DeviceMesh

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for `fully_shard`: 1-D, or 2-D (HSDP) if parameters are also replicated."""
        if self.degrees.dp_replicate > 1:
            return self.parameters["dp_replicate", "fsdp"]
        return self.parameters["fsdp"]

    @property
    def dp_rank(self) -> int:
        """Index of this rank's share of a global batch."""
        return self.data.get_local_rank("dp")

    def sum_over_samples(self, values: Tensor) -> Tensor:
        """Sums over the ranks that read different samples (dp), in place.

        For values such as losses, which every rank of a cp or tp group computes in full for its samples.
        """
        if self.degrees.dp > 1:
            dist.all_reduce(values, group=self.data.get_group("dp"))
        return values


def init_distributed(timeout_s: float = 1800.0, stacks: Path | None = None) -> torch.device:
    """Joins the job's process group, NCCL on CUDA and gloo on a CPU, and returns this rank's device.

    Under torchrun it reads the environment; without it, the job has one rank.

    Args:
        timeout_s: how long to wait for other ranks, now and in each collective.
        stacks: folder for NCCL's record of collectives; None records none.

    Raises:
        StalledError: a rank did not come in time; on rank 0.
    """
    if torch.cuda.is_available():
        # Segments that grow, so that what was freed in small parts can be used for large tensors: gradients after
        # activations, and other shapes. Read when the first tensor is allocated, whoever started this process.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # Buffers of collectives inside CUDA graphs would be registered with NCCL, which fails with the allocator's
        # expandable segments (illegal accesses) and keeps the graphs' memory alive.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        # Checkpoints and the stop signal communicate CPU tensors, which need gloo next to NCCL.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        use_one_gloo_thread()
        timeout = timedelta(seconds=timeout_s)
        if stacks is not None and device.type == "cuda":
            record_collectives(stacks)
        if "RANK" in os.environ:
            rank, size = rank_and_size()
            store = join(timeout_s)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        else:
            # An in-process store: a job of one rank needs neither a port nor environment variables.
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def default_store() -> dist.Store:
    """The store through which the ranks have met."""
    return dist.distributed_c10d._get_default_store()


def set_timeouts(timeout_s: float) -> None:
    """Sets the time-out of every process group; those that libraries make would otherwise keep torch's 10 or 30 min."""
    groups = dist.distributed_c10d._world.pg_map
    # Public since torch 2.14, which deprecates the private name.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(groups):
        set_timeout(timedelta(seconds=timeout_s), group)


def build_mesh(device_type: str, degrees: Degrees) -> Mesh:
    """Builds both meshes; the product of the degrees must be the world size."""
    assert dist.get_world_size() == degrees.dp * degrees.cp * degrees.tp, (dist.get_world_size(), degrees)
    # tp is innermost: its ranks are neighbors within a node, and nothing overlaps its collectives.
    parameters = init_device_mesh(
        device_type,
        (degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp),
        mesh_dim_names=("dp_replicate", "fsdp", "tp"),
    )
    # The same row-major order of ranks as above, so that both meshes agree on each rank's cp and tp coordinates.
    data = init_device_mesh(device_type, (degrees.dp, degrees.cp, degrees.tp), mesh_dim_names=("dp", "cp", "tp"))
    return Mesh(degrees, parameters, data)
