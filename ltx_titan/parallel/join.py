"""Joins the ranks of a job, and says in one line why they do not come together.

torch waits half an hour without a word for an address that does not resolve, for a rank that was never started, and for
ranks with the same number.
"""

import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from ltx_titan.common.ranks import StalledError, number_of, rank_and_size

logger = logging.getLogger(__name__)

# Name servers of a cluster learn of a new node with a delay.
_RESOLVE_S = 30.0
_PATIENCE_S = 60.0
_REPORT_S = 10.0
# Key of the store under which the launcher of a node leaves a message if its ranks end too early.
_LOST = "ltx_titan/lost"


def check_environment(environment: Mapping[str, str]) -> None:
    """Checks the variables with which torchrun, Slurm scripts and users describe the ranks of a job.

    Raises:
        ValueError: one is not a number or out of range, or MASTER_ADDR does not resolve within 30 s.
    """
    _, size = rank_and_size(environment)
    number_of(environment, "LOCAL_RANK", 0, at_least=0)
    port = number_of(environment, "MASTER_PORT", 29500, at_least=0, at_most=65535)
    if "RANK" in environment and size > 1:
        check_address(environment.get("MASTER_ADDR", ""), port)


def check_address(address: str, port: int, limit_s: float = _RESOLVE_S) -> None:
    """Resolves the address at which the ranks meet.

    Raises:
        ValueError: it does not resolve within the limit.
    """
    deadline = time.monotonic() + limit_s
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or not address:
                raise ValueError(
                    f"MASTER_ADDR = {address!r}: expected the address of the first node, found one that does not "
                    f"resolve on {socket.gethostname()} ({error}); set it to a name or an IP address that every node "
                    f"can reach."
                ) from error
        time.sleep(min(1.0, limit_s))


def join(timeout_s: float) -> dist.Store:
    """Meets the other ranks at MASTER_ADDR:MASTER_PORT, as torchrun's environment describes, and returns their store.

    Raises:
        StalledError: a rank did not come within the time limit, or its launcher has reported that it ended; on rank 0,
            which names it.
        ValueError: two processes have this rank's number.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torchrun's agent hosts the store; without it rank 0 does.
    has_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = dist.TCPStore(
        address,
        port,
        size,
        is_master=rank == 0 and not has_host,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    store = dist.PrefixStore(f"ltx_titan/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", tcp)
    if store.add(f"joined/{rank}", 1) > 1:
        raise ValueError(f"RANK = {rank}: expected every rank once, found a second process with this number; see RANK.")
    if rank == 0:
        _wait_for_all(store, tcp, size, timeout_s)
    return store


def report_lost(address: str, port: int, message: str) -> None:
    """Leaves a message for rank 0, in case it waits for ranks that will not join; called by their launcher.

    Args:
        address: of the first node, whose launcher hosts the store.
        port: of the store.
        message: which rank ended, and how.
    """
    try:
        # Where the first node has ended as well, a TCPStore would try for ten seconds and print a page of C++ frames.
        socket.create_connection((address, port), timeout=_REPORT_S).close()
        store = dist.TCPStore(
            address, port, is_master=False, timeout=timedelta(seconds=_REPORT_S), wait_for_workers=False
        )
        store.set(_LOST, message)
    except (OSError, RuntimeError) as error:  # the first node has ended, too
        logger.debug("%s:%d was not informed: %s", address, port, error)


def _wait_for_all(store: dist.Store, shared: dist.Store, size: int, timeout_s: float) -> None:
    started, said = time.monotonic(), _PATIENCE_S
    missing = list(range(size))
    while missing := [rank for rank in missing if not store.check([f"joined/{rank}"])]:
        waited = time.monotonic() - started
        names = ", ".join(map(str, missing))
        if shared.check([_LOST]):
            raise StalledError(
                f"rank {names} of {size} did not join, and will not: {shared.get(_LOST).decode()}. See the log of its "
                f"node."
            )
        if waited > timeout_s:
            raise StalledError(
                f"rank {names} of {size} did not join within {timeout_s:.0f} s (job.timeout_s). See the log of its "
                f"node, or correct the number of ranks (NGPU, NNODES, WORLD_SIZE)."
            )
        if waited > said:
            logger.warning("waiting for rank %s of %d to join since %.0f s", names, size, waited)
            said *= 2
        time.sleep(0.05)


def record_collectives(folder: Path) -> None:
    """Turns on NCCL's flight recorder, unless the environment sets it: which collectives each rank has begun and ended.

    Written to `folder` when a collective times out; read with `torchfrtrace`. Call it before the process group exists.
    """
    # Older and newer names of the same switches.
    for name in ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"):
        os.environ.setdefault(name, "2000")
    for name in ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"):
        os.environ.setdefault(name, str(folder / "nccl-rank-"))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
