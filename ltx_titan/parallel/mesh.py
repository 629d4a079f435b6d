"""Process groups and the device mesh.

One rank has a place on four axes: `dp_replicate x dp_shard x cp x tp`. Two views of them are built with public API
only:

    parameters   (dp_replicate, fsdp, tp)   fsdp = dp_shard x cp: context-parallel ranks shard parameters too
    data         (dp, cp, tp)               dp = dp_replicate x dp_shard: ranks of one dp index read the same samples

Axes of size 1 stay in both views, with real process groups, so that nothing needs a special case for them.
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


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


@dataclass(frozen=True)
class Mesh:
    """Both views of the mesh, on one device type."""

    degrees: Degrees
    parameters: DeviceMesh
    data: DeviceMesh

    @property
    def fsdp(self) -> DeviceMesh:
        """Mesh for `fully_shard`: 1-D, or 2-D (HSDP) where parameters are also replicated."""
        if self.degrees.dp_replicate > 1:
            return self.parameters["dp_replicate", "fsdp"]
        return self.parameters["fsdp"]

    @property
    def dp_rank(self) -> int:
        """Which share of a global batch this rank reads."""
        return self.data.get_local_rank("dp")

    def sum_over_samples(self, values: Tensor) -> Tensor:
        """Sums over the ranks that read different samples (dp), in place; ranks of one cp or tp group get the same.

        Losses are such values: every rank of a cp or tp group computes those of its samples in full.
        """
        if self.degrees.dp > 1:
            dist.all_reduce(values, group=self.data.get_group("dp"))
        return values


def init_distributed(timeout_s: int = 1800) -> torch.device:
    """Joins the job's process group, NCCL on CUDA and gloo on a CPU, and returns this rank's device.

    Started by torchrun it reads the environment; started as a plain process it is a job of one rank.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # Buffers of collectives inside CUDA graphs would be registered with NCCL, which fails with the allocator's
        # expandable segments (illegal accesses) and keeps the graphs' memory alive.
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        # Checkpoints move tensors between hosts' CPUs, so CPU tensors need a backend of their own.
        backend = "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_s)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return device


def build_mesh(device_type: str, degrees: Degrees) -> Mesh:
    """Builds both views of the mesh; the product of the degrees must be the number of ranks."""
    assert dist.get_world_size() == degrees.dp * degrees.cp * degrees.tp, (dist.get_world_size(), degrees)
    parameters = init_device_mesh(
        device_type,
        (degrees.dp_replicate, degrees.dp_shard * degrees.cp, degrees.tp),
        mesh_dim_names=("dp_replicate", "fsdp", "tp"),
    )
    data = init_device_mesh(device_type, (degrees.dp, degrees.cp, degrees.tp), mesh_dim_names=("dp", "cp", "tp"))
    return Mesh(degrees, parameters, data)
