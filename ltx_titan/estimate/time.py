"""Time of a training step, from what the GPU must compute and move, at rates that are reached (hardware.py).

Of one block: matrix products, attention, memory-bound operations, and FSDP2's copies around its collectives, one after
the other; recomputation adds their forward part. Against that stand the host, which must launch it all, and the
network, which overlaps except for the collectives of tensor and context parallelism. The slower one counts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ltx_titan.common.hardware import Gpu, bus_bandwidth
from ltx_titan.estimate.workload import Setup, Workload
from ltx_titan.model.flops import layer_flops, outside_flops, training_flops

MEMORY_BOUND_UNITS = {True: 235.0, False: 1130.0}
"""Traffic of a block's memory-bound operations, forward and backward, in units of one value per token and column, read
or written. Compiled: a lean compiled peer's layer without its products and attention took 2.6 ms at 4,032 and 10.3 ms
at 16,128 tokens of 4,096 columns at 3.0 TB/s. Not compiled: counted over the operations of our block."""
FLOAT8_UNITS = 190.0
"""Quantising for float8 products: 2.8 ms a layer more at 4,032 and 7.8 ms at 16,128 tokens (tensorwise)."""
FORWARD_SHARE = 0.36
"""Of the memory-bound traffic."""
HOST_CALL_S = 6e-3
"""Host time for one compiled block's forward, recomputation or backward (with the next)."""
HOST_FSDP_S = 9e-3
"""Host time of FSDP2 per block and step. Both from 21 ms a block at 4,032 tokens with selective checkpointing, where
the host is the limit: two H100s, 12 layers, 2026-11-25."""
HOST_FLOAT8_S = 4e-3
"""Host time more of a compiled pass with float8 products: scales and casts are launches of their own. From 9 ms a block
and step between bfloat16 and float8 at 4,032 tokens, where the host is the limit of both: two H100s, 2026-11-26."""
LORA_UNITS = 200.0
"""Traffic of adapters on all attention layers, in units as above: input, update and sum of 24 layers. Reckoned."""
EAGER_HOST_S = 11e-3
"""Host time for one block's pass that is not compiled: a few hundred launches. Assumed."""
UPDATE_BYTES = {"adamw": 28.0, "adamw8bit": 18.0, "adamw4bit": 16.0, "muon": 60.0, "adafactor": 24.0}
"""Read and written per trained weight and step: weight, gradient and state."""
CLIP_BYTES = 12.0
"""The norm reads every gradient, and scaling reads and writes it."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. The first six follow one another on the GPU.

    Attributes:
        matmul, attention, memory_bound: computation of all blocks and micro-batches, recomputation included.
        fsdp_copies: into and out of the buffers of collectives.
        exchange: collectives of tensor and context parallelism, and gradient reduction that nothing hides.
        outside: everything that is not a block, and the optimizer.
        host: if the host is the slower one, what it adds.
        exposed: time that FSDP2's collectives take longer than the computation they run beside.
    """

    matmul: float
    attention: float
    memory_bound: float
    fsdp_copies: float
    exchange: float
    outside: float
    host: float
    exposed: float

    @property
    def total(self) -> float:
        """The step."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_time(work: Workload, setup: Setup, gpu: Gpu) -> StepTime:
    """Time of a step of samples with the workload's token counts."""
    degrees, layers = setup.degrees, work.num_layers
    micro_batches = -(-work.global_batch_size // (setup.local_batch_size * degrees.dp))
    forward, backward = _compute(work, setup, gpu)
    again = _recomputed(work, setup, gpu)
    copies = _fsdp_copies(work, setup) / gpu.copy
    exchange = _exchange(work, setup, gpu)
    gather, reduce, replicate = _fsdp_traffic(work, setup, gpu)

    busy_forward = sum(forward) + copies / 3 + exchange / 3
    busy_backward = sum(backward) + sum(again) + copies * 2 / 3 + exchange * 2 / 3
    exposed = max(0.0, gather - busy_forward) + max(0.0, gather + reduce + replicate - busy_backward)
    busy = busy_forward + busy_backward + exposed
    host = max(0.0, _host(setup) - busy)

    def all_blocks(seconds: float) -> float:
        return micro_batches * layers * seconds

    return StepTime(
        matmul=all_blocks(forward[0] + backward[0] + again[0]),
        attention=all_blocks(forward[1] + backward[1] + again[1]),
        memory_bound=all_blocks(forward[2] + backward[2] + again[2]),
        fsdp_copies=all_blocks(copies),
        exchange=all_blocks(exchange),
        outside=_outside(work, setup, gpu, micro_batches),
        host=all_blocks(host),
        exposed=all_blocks(exposed),
    )


def useful_flops(work: Workload) -> float:
    """FLOPs of a step over all GPUs, by the formula of MFU."""
    return training_flops(
        work.transformer,
        video_tokens=work.video_tokens,
        audio_tokens=work.audio_tokens,
        text_tokens=work.text_tokens,
        batch=work.global_batch_size,
        num_layers=work.num_layers,
        trained=work.trained,
    )


def _compute(work: Workload, setup: Setup, gpu: Gpu) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of one block and micro-batch on one rank: (matmul, attention, memory-bound), forward and backward."""
    share = setup.local_batch_size / (setup.degrees.cp * setup.degrees.tp)
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    flops = layer_flops(work.transformer, **counts, trained=work.trained)
    linear_forward = flops.linear / (3 if work.trained == "full" else 2)
    rate = gpu.matmul if setup.float8 == "none" else gpu.matmul_float8
    linear = (linear_forward * share / rate, (flops.linear - linear_forward) * share / rate)
    attention = (
        flops.attention / 3 * share / gpu.attention_forward,
        flops.attention * 2 / 3 * share / gpu.attention_backward,
    )
    units = MEMORY_BOUND_UNITS[setup.compile] + (FLOAT8_UNITS if setup.float8 != "none" else 0.0)
    units += LORA_UNITS if work.trained == "lora" else 0.0
    columns = work.video_tokens * work.video_width + work.audio_tokens * work.audio_width
    moved = units * columns * work.itemsize * share / gpu.copy
    # A quantised base is read and written out in the compute dtype for every product.
    widened = work.quantised / setup.degrees.tp * (1 + work.itemsize) / gpu.copy
    memory = (moved * FORWARD_SHARE + widened, moved * (1 - FORWARD_SHARE) + widened)
    return (linear[0], attention[0], memory[0]), (linear[1], attention[1], memory[1])


def _recomputed(work: Workload, setup: Setup, gpu: Gpu) -> tuple[float, ...]:
    """What checkpointing computes again of an average block; selective keeps attention and (without tp) one product."""
    (linear, attention, memory), _ = _compute(work, setup, gpu)
    share = setup.recomputed_share()
    if setup.recompute == "selective":
        # Of 16 width x width weights that a video token meets, kept are the feed-forward's 4 and three of 1/2 between
        # the streams.
        return linear * (10.5 / 16 if setup.degrees.tp == 1 else 1.0), 0.0, memory
    return linear * share, attention * share, memory * share


def _host(setup: Setup) -> float:
    """Host seconds of one block and micro-batch."""
    # Selective recomputation is part of a compiled block's backward.
    passes = 2.0 if setup.recompute == "selective" and setup.compile else 2 + setup.recomputed_share()
    call = HOST_CALL_S if setup.compile else EAGER_HOST_S
    return passes * (call + (HOST_FLOAT8_S if setup.float8 != "none" else 0.0)) + HOST_FSDP_S


def _fsdp_copies(work: Workload, setup: Setup) -> float:
    """Bytes of one block: gathered weights are read and written twice a step, gradients read, widened and written."""
    gathered = work.block.gathered(setup.degrees.tp)
    trained = work.block.gathered(setup.degrees.tp, trained_only=True)
    return 2 * 2 * work.itemsize * gathered + (work.itemsize + 4) * trained


def _fsdp_traffic(work: Workload, setup: Setup, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of one block's all-gather, reduce-scatter, and all-reduce between replicas."""
    degrees, ranks = setup.degrees, setup.fsdp
    gathered = work.block.gathered(degrees.tp)
    trained = work.block.gathered(degrees.tp, trained_only=True)
    travelling = 1 if setup.float8_all_gather else work.itemsize
    bandwidth = bus_bandwidth(gpu, degrees.tp, ranks)
    others = (ranks - 1) / ranks
    gather, reduce = others * travelling * gathered / bandwidth, others * 4 * trained / bandwidth
    copies = degrees.dp_replicate
    between = bus_bandwidth(gpu, degrees.tp * ranks, copies)
    return gather, reduce, 2 * (copies - 1) / copies * 4 * trained / ranks / between


def _exchange(work: Workload, setup: Setup, gpu: Gpu) -> float:
    """Seconds of one block's collectives of tensor and context parallelism; nothing runs beside them."""
    tp, cp = setup.degrees.tp, setup.degrees.cp
    both = work.video_tokens > 0 and work.audio_tokens > 0
    batch, size = setup.local_batch_size, work.itemsize
    seconds = 0.0
    if tp > 1:
        columns = (work.video_tokens / cp * work.video_width + work.audio_tokens * work.audio_width) * batch
        # Own tokens are gathered for each reading and scattered after each sum; backward is the mirror image.
        once = (3 + 2 * both) + (3 + both)
        again = {"selective": 3.0 + 2 * both}.get(setup.recompute, once * setup.recomputed_share())
        seconds += (2 * once + again) * columns * size * (tp - 1) / tp / bus_bandwidth(gpu, 1, tp)
    if cp > 1:
        # Queries, keys, values and results of self-attention; keys and values of the audio's attention to the video.
        columns = work.video_tokens / cp / tp * batch * (4 * work.video_width + 2 * both * work.audio_width)
        passes = 2 + setup.recomputed_share()
        seconds += passes * columns * size * (cp - 1) / cp / bus_bandwidth(gpu, tp, cp)
    return seconds


def _outside(work: Workload, setup: Setup, gpu: Gpu, micro_batches: int) -> float:
    """Seconds of embedding, output, their traffic, gradient norm and optimizer."""
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    share = setup.local_batch_size / (setup.degrees.cp * setup.degrees.tp)
    flops = outside_flops(work.transformer, **counts, trained=work.trained).total * share
    columns = work.video_tokens * work.video_width + work.audio_tokens * work.audio_width
    # Rotary tables, input, norm and modulation in float32 that are not compiled: about as many bytes as are kept, x 10.
    moved = 75 * columns * work.itemsize * share
    gathered, trained = (work.outside.gathered(setup.degrees.tp, trained_only=only) for only in (False, True))
    seconds = micro_batches * (flops / gpu.matmul + moved / gpu.copy)
    bandwidth = bus_bandwidth(gpu, setup.degrees.tp, setup.fsdp)
    others = (setup.fsdp - 1) / setup.fsdp
    seconds += micro_batches * others * (work.itemsize * gathered + 4 * trained) / bandwidth
    updated = sum(_trained_shards(work, setup))
    bytes_per_weight = UPDATE_BYTES[work.optimizer] + CLIP_BYTES + (12.0 if work.ema else 0.0)
    return seconds + updated * bytes_per_weight / gpu.copy


def _trained_shards(work: Workload, setup: Setup) -> Iterable[int]:
    yield work.num_layers * work.block.sharded(setup.degrees, trained_only=True)[0]
    yield work.outside.sharded(setup.degrees, trained_only=True)[0]
