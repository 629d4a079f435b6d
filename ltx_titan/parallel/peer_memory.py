"""Memory of a GPU that the other GPUs of its host read with their copy engines.

NCCL's collectives are kernels: beside a matmul they take multiprocessors from it. A copy from another GPU's memory
is made by a copy engine and takes none. What is left to a kernel is the barrier before it, one block that waits until
every rank has come.

    rank 0   writes its part | barrier | copies rank 1's part | barrier before it writes again
    rank 1   writes its part | barrier | copies rank 0's part | barrier before it writes again

The memory is torch's symmetric memory, without NVLink multicast. On a CPU, where it is for tests, files that all ranks
map stand in for it.
"""

import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

_SHARED: "WeakSet[PeerTensor]" = WeakSet()


@dataclass(frozen=True, eq=False)
class PeerTensor:
    """A 1-D tensor of every rank of a group, at the same size.

    Attributes:
        by_rank: each rank's tensor, this rank's own included.
        rank: this rank.
        barrier: waits, on the current stream, until every rank of the group has come this far; the device fails after
            the group's time-out (`job.timeout_s`).
    """

    by_rank: list[Tensor]
    rank: int
    barrier: Callable[[], None]

    @property
    def own(self) -> Tensor:
        """This rank's tensor."""
        return self.by_rank[self.rank]

    @property
    def peers(self) -> list[int]:
        """The other ranks, in an order in which no two ranks read from the same one at a time."""
        ranks = len(self.by_rank)
        return [(self.rank + distance) % ranks for distance in range(1, ranks)]


def allocate(numel: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> PeerTensor:
    """Allocates an uninitialized tensor on each rank of a group; all of them call it, in the same order.

    It lives as long as the returned object. The caching allocator neither counts nor reuses it: see `held_bytes`.
    Not while a CUDA graph is recorded.
    """
    shared = _on_gpus(numel, dtype, group, device) if device.type == "cuda" else _in_files(numel, dtype, group)
    _SHARED.add(shared)
    return shared


def held_bytes() -> int:
    """Bytes of this rank's tensors, which torch.cuda.max_memory_allocated does not count."""
    return sum(shared.own.nbytes for shared in _SHARED)


def obstacle(group: dist.ProcessGroup, device: torch.device, *, on_cpu: bool = False) -> str | None:
    """Why the ranks of a group cannot read each other's memory; None if they can. All of them call it.

    Args:
        group: the ranks.
        device: of this rank.
        on_cpu: whether mapped files will do on a CPU.
    """
    if group.size() == 1:
        return "one rank has nothing to gather"
    if dist.get_backend(group) == "fake":
        return "the ranks of a dry run have no memory"
    if device.type != "cuda":
        return None if on_cpu else f"a {device.type} has no copy engines"
    # Device numbers are those of this process, so a rank that sees its own GPU alone cannot ask about the others.
    places = _gather((_host(), torch.cuda.device_count(), torch.cuda.current_device()), group)
    if len({host for host, _, _ in places}) > 1:
        return "ranks that shard the weights are on several hosts"
    if len({count for _, count, _ in places}) == 1 and len({index for _, _, index in places}) == len(places):
        here = torch.cuda.current_device()
        for _, _, other in places:
            if other != here and not torch.cuda.can_device_access_peer(here, other):
                return _agree(f"GPU {here} cannot read the memory of GPU {other}", group)
    try:
        trial = allocate(1, torch.float32, group, device)
        trial.barrier()
        torch.cuda.synchronize(device)
        found = None
    except (RuntimeError, ImportError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        found = f"torch's symmetric memory does not work here ({first_line})"
    return _agree(found, group)


def _agree(found: str | None, group: dist.ProcessGroup) -> str | None:
    """The first rank's reason that has one."""
    return next((reason for reason in _gather(found, group) if reason is not None), None)


def _gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _on_gpus(numel: int, dtype: torch.dtype, group: dist.ProcessGroup, device: torch.device) -> PeerTensor:
    # Multicast is of no use here, and some machines forbid it. Read when the memory is first shared.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric_memory
    from torch._C._distributed_c10d import _SymmetricMemory

    # The driver does not take back what the caching allocator holds for later.
    torch.cuda.empty_cache()
    # Not `symmetric_memory.empty`, which may put several tensors into one allocation.
    own = _SymmetricMemory.empty_strided_p2p((numel,), (1,), dtype, device)
    handle = symmetric_memory.rendezvous(own, group)
    by_rank = [own if rank == handle.rank else handle.get_buffer(rank, (numel,), dtype) for rank in range(group.size())]
    # NCCL's watchdog ends a job whose collectives wait for too long, and does not know of this barrier. Its kernel
    # gives up after the same time, with an error of the device; who is missing has been logged by then (watch.py).
    limit = group._get_backend(device).options._timeout
    barrier = partial(handle.barrier, channel=0, timeout_ms=round(limit.total_seconds() * 1000))
    return PeerTensor(by_rank, handle.rank, barrier)


def _in_files(numel: int, dtype: torch.dtype, group: dist.ProcessGroup) -> PeerTensor:
    with tempfile.TemporaryDirectory() as folder:
        folders = _gather(folder, group)
        name = str(Path(folders[0]) / "{}.bin")
        tensors = [
            torch.from_file(name.format(rank), shared=True, size=numel, dtype=dtype) for rank in range(group.size())
        ]
        # All have mapped the files, which may then lose their names.
        dist.barrier(group)
    return PeerTensor(tensors, group.rank(), lambda: dist.barrier(group))
