"""What the GPUs can do that `ltx-titan estimate` knows: memory, rates that are reached (not the maker's), bandwidths.

H100 rates are measured: NVIDIA H100 80GB HBM3, torch 2.11, 2026-11-22, medians over the shapes of an LTX-2.3 block. An
H200 has the same processors beside faster memory. What is not measured says so in `assumed`.
"""

import logging
from dataclasses import dataclass

GIB = 2**30
_KNOWN_DEVICES = ("A100", "H100", "H200", "H20", "B200", "MI250X", "MI300X", "MI325X", "MI355X", "l40s")


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, and how several are joined. Rates are operations or bytes a second.

    Attributes:
        name: as the user writes it.
        memory: bytes that a process can have.
        peak: bfloat16 operations of the data sheet; the denominator of MFU.
        matmul: reached by bfloat16 products of a block's sizes, forward and backward.
        matmul_float8: the same in float8, quantising not included.
        attention_forward, attention_backward: reached by fused attention with heads of 128.
        copy: bytes read plus bytes written.
        nvlink: bus bandwidth of a large collective within a node.
        network: the same per GPU between nodes.
        gpus_per_node: of the usual machine.
        assumed: what of this is not measured.
    """

    name: str
    memory: float
    peak: float
    matmul: float
    matmul_float8: float
    attention_forward: float
    attention_backward: float
    copy: float
    nvlink: float
    network: float
    gpus_per_node: int = 8
    assumed: str = ""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            memory=79.1 * GIB,
            peak=989e12,
            matmul=715e12,  # 640-780 over the block's shapes; 717-746 in whole layers
            matmul_float8=1300e12,  # 1,200-1,440 over the shapes; 1,242-1,382 in whole layers
            attention_forward=600e12,  # cuDNN, 4,032 to 16,128 tokens: 585-646
            attention_backward=400e12,  # forward and backward together 469-504; in whole layers 402-488
            copy=3.0e12,  # 2.87 at 128 MiB, 3.02 at 2 GiB
            nvlink=330e9,
            network=42e9,
            assumed="NVLink 330 GB/s bus bandwidth (of 450), network 42 GB/s a GPU (of 50: 400 Gb/s InfiniBand)",
        ),
        Gpu(
            name="h200",
            memory=139.8 * GIB,
            peak=989e12,
            matmul=715e12,
            matmul_float8=1300e12,
            attention_forward=600e12,
            attention_backward=400e12,
            copy=4.3e12,
            nvlink=330e9,
            network=42e9,
            assumed="matrix and attention rates of the H100; copy 4.3 TB/s (the H100's 90 % of the data sheet's 4.8); "
            "NVLink 330 GB/s bus bandwidth (of 450), network 42 GB/s a GPU (of 50)",
        ),
        Gpu(
            name="a100-80",
            memory=79.2 * GIB,
            peak=312e12,
            matmul=245e12,
            matmul_float8=245e12,
            attention_forward=190e12,
            attention_backward=140e12,
            copy=1.8e12,
            nvlink=220e9,
            network=21e9,
            assumed="nothing measured: 79 % of peak in matrix products, FlashAttention 2 rates, 90 % of memory "
            "bandwidth, NVLink 220 GB/s (of 300), network 21 GB/s a GPU (of 25); no float8",
        ),
    )
}


def bus_bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bus bandwidth of a collective over `size` ranks that are `stride` apart, for each rank.

    Within a node it is NVLink's. Between nodes, the members that share a node share its network cards as well: a ring
    crosses each node boundary once for all of them.

    Args:
        gpu: kind of GPU and node.
        stride: distance between neighbours of the group in rank order; ranks fill one node after the other.
        size: of the group.
    """
    if stride * size <= gpu.gpus_per_node:
        return gpu.nvlink
    members_in_node = max(gpu.gpus_per_node // stride, 1)
    return min(gpu.nvlink, members_in_node * gpu.network)


def peak_flops(device_name: str | None) -> float | None:
    """bf16 operations a second that a GPU's maker states, without sparsity; None on a CPU or an unknown GPU.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it; None for a CPU.
    """
    # torchtitan answers with an A100's figure for a device it does not know: a wrong MFU is worse than none.
    if device_name is None or not any(name in device_name for name in _KNOWN_DEVICES):
        return None
    # Here, because torchtitan takes seconds to import and a CPU job or an estimate needs none of it.
    from ltx_titan.common.titan import get_peak_flops

    # It looks for a GPU's variant with a tool that containers lack, and says so once for every rank.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return get_peak_flops(device_name)
    finally:
        logging.disable(before)
