"""The table of GPUs for predictions without one: memory, data-sheet peak, and the rates that training reaches.

H100 rates are measured: NVIDIA H100 80GB HBM3, torch 2.11, 2026-11-22, medians over the shapes of an LTX-2.3 block. An
H200 has the same processors with faster memory. `assumed` names every rate that is not measured.
"""

from dataclasses import dataclass

GIB = 2**30

HOP_S, NETWORK_HOP_S = 3.4e-6, 14e-6
"""Latency of one hop of a ring within a node and between nodes. Not measured: the constants with which NCCL itself
predicts its rings over NVLink and a network (protocol "Simple", src/graph/tuning.cc)."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU and its interconnect. Rates are FLOP/s or bytes/s.

    Attributes:
        name: as in `--gpu`.
        memory: bytes available to a process.
        peak: dense bfloat16 FLOP/s of the data sheet; the denominator of MFU.
        matmul: reached by bfloat16 matmuls of a block's sizes, forward and backward.
        matmul_float8: the same in float8, without quantization.
        attention_forward, attention_backward: reached by fused attention with heads of 128.
        copy: bytes read plus bytes written.
        nvlink: bus bandwidth of a large collective within a node.
        network: the same per GPU between nodes.
        gpus_per_node: GPUs that share a fast interconnect.
        host_link: of copies from pinned host memory. Assumed for every GPU: 25 GB/s of PCIe 4.0 x16's 32, and 50 of
            5.0's 64; a slot with fewer lanes has less.
        assumed: which rates are not measured.
        is_measured: whether matmul and attention rates are; a prediction for other GPUs says so.
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
    host_link: float = 25e9
    assumed: str = ""
    is_measured: bool = True


def _from_data_sheet(
    name: str,
    *,
    memory: float,
    peak: float,
    float8: float,
    bandwidth: float,
    link: float,
    network: float,
    host_link: float = 25e9,
) -> Gpu:
    """A GPU that nothing was measured on: the shares of the data sheet that H100s and A100s reach.

    Args:
        name: as in `--gpu`.
        memory: bytes available to a process.
        peak: dense bfloat16 FLOP/s.
        float8: dense float8 FLOP/s.
        bandwidth: of memory, bytes/s.
        link: between GPUs of a node, bytes/s in one direction.
        network: between nodes, bytes/s per GPU.
        host_link: as in `Gpu`.
    """
    return Gpu(
        name=name,
        memory=memory,
        peak=peak,
        matmul=0.72 * peak,
        matmul_float8=0.66 * float8,
        attention_forward=0.60 * peak,
        attention_backward=0.40 * peak,
        copy=0.9 * bandwidth,
        nvlink=0.73 * link,
        network=0.84 * network,
        host_link=host_link,
        assumed="nothing measured: of the data sheet 72 % in matmuls (66 % in float8), 60 / 40 % in attention forward "
        "/ backward, 90 % of memory bandwidth, 73 % of the link between GPUs, 84 % of the network",
        is_measured=False,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h100",
            memory=79.1 * GIB,
            peak=989e12,
            matmul=720e12,  # 640-780 over the block's shapes; 717-746 in whole layers
            matmul_float8=1300e12,  # 1,200-1,440 over the shapes; 1,242-1,382 in whole layers
            attention_forward=600e12,  # cuDNN, 4,032 to 16,128 tokens: 585-646
            attention_backward=400e12,  # forward and backward together 469-504; in whole layers 402-488
            copy=3.0e12,  # 2.87 at 128 MiB, 3.02 at 2 GiB
            nvlink=330e9,
            network=42e9,
            host_link=50e9,
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
            host_link=50e9,
            assumed="attention rates of the H100; copy 4.3 TB/s (the H100's 90 % of the data sheet's 4.8); "
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
            assumed="nothing measured: 79 % of peak in matmuls, FlashAttention 2 rates, 90 % of memory bandwidth, "
            "NVLink 220 GB/s (of 300), network 21 GB/s a GPU (of 25); no float8",
            is_measured=False,
        ),
        _from_data_sheet(
            "l40s", memory=44.5 * GIB, peak=362e12, float8=733e12, bandwidth=0.864e12, link=32e9, network=25e9
        ),
        # GeForce cards accumulate in float32 at half the rate that their data sheets name first. Links are PCIe. Cards
        # before Ada have no float8.
        _from_data_sheet(
            "3090", memory=23.5 * GIB, peak=71e12, float8=71e12, bandwidth=0.936e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "4090", memory=23.5 * GIB, peak=165e12, float8=330e12, bandwidth=1.008e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "5090",
            memory=31.3 * GIB,
            peak=209e12,
            float8=419e12,
            bandwidth=1.792e12,
            link=64e9,
            network=25e9,
            host_link=50e9,
        ),
        _from_data_sheet(
            "4080", memory=15.6 * GIB, peak=97e12, float8=195e12, bandwidth=0.717e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "3060", memory=11.6 * GIB, peak=25e12, float8=25e12, bandwidth=0.360e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "a6000", memory=47.4 * GIB, peak=155e12, float8=155e12, bandwidth=0.768e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "rtx6000-ada", memory=47.4 * GIB, peak=364e12, float8=728e12, bandwidth=0.960e12, link=32e9, network=25e9
        ),
        _from_data_sheet(
            "rtx6000-blackwell",
            memory=95.0 * GIB,
            peak=504e12,
            float8=1007e12,
            bandwidth=1.792e12,
            link=64e9,
            network=50e9,
            host_link=50e9,
        ),
        _from_data_sheet(
            "h20",
            memory=95.0 * GIB,
            peak=148e12,
            float8=296e12,
            bandwidth=4.0e12,
            link=450e9,
            network=50e9,
            host_link=50e9,
        ),
        _from_data_sheet(
            "gh200",
            memory=95.0 * GIB,
            peak=989e12,
            float8=1979e12,
            bandwidth=4.0e12,
            link=450e9,
            network=50e9,
            host_link=50e9,
        ),
        _from_data_sheet(
            "b200",
            memory=178.0 * GIB,
            peak=2250e12,
            float8=4500e12,
            bandwidth=7.7e12,
            link=900e9,
            network=50e9,
            host_link=50e9,
        ),
    )
}


def bus_bandwidth(gpu: Gpu, stride: int, size: int) -> float:
    """Bus bandwidth of a collective over `size` ranks that are `stride` apart, in bytes/s per rank.

    Within a node it is NVLink's. Between nodes, members on one node share its network cards: a ring crosses each node
    boundary once for all of them.

    Args:
        gpu: kind of GPU and node.
        stride: distance between neighbors of the group in rank order; ranks fill one node after the other.
        size: of the group.
    """
    if stride * size <= gpu.gpus_per_node:
        return gpu.nvlink
    members_in_node = max(gpu.gpus_per_node // stride, 1)
    return min(gpu.nvlink, members_in_node * gpu.network)


def ring_latency(gpu: Gpu, stride: int, size: int) -> float:
    """Seconds that the hops of a ring over `size` ranks take besides the transfer: each part passes all other ranks.

    It does not depend on the number of bytes, so that it limits how many ranks can share small weights.

    Args:
        gpu: kind of GPU and node.
        stride: distance between neighbors of the group in rank order.
        size: of the group.
    """
    members_in_node = max(gpu.gpus_per_node // stride, 1)
    between = -(-size // members_in_node) - 1
    return (size - 1 - between) * HOP_S + between * NETWORK_HOP_S
