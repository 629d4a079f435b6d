"""Predicts the time of a training step from its FLOPs and bytes at the rates that GPUs reach (common/hardware.py).

A block runs its matmuls, attention, memory-bound operations and FSDP2's copies one after the other; recomputation
repeats their forward part. The host, which launches all of it, and FSDP2's collectives run at the same time: a block
takes as long as the slowest of the three, and collectives slow down what runs beside them. Collectives of tensor and
context parallelism are not overlapped.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ltx_titan.common.hardware import Gpu, bus_bandwidth, ring_latency
from ltx_titan.memory.workload import Setup, Workload
from ltx_titan.model.flops import Passes, layer_flops, outside_flops, training_flops
from ltx_titan.parallel.activation_checkpoint import Level

MEMORY_BOUND_UNITS = {True: 235.0, False: 1130.0}
"""Memory traffic of a block's memory-bound operations, forward and backward, in values read or written per token and
column. Compiled: another compiled layer, without matmuls and attention, took 2.6 ms at 4,032 and 10.3 ms at 16,128
tokens of 4,096 columns at 3.0 TB/s. Not compiled: counted over the operations of our block."""
FLOAT8_UNITS = 190.0
"""Traffic of quantization to float8: 2.8 ms per layer at 4,032 and 7.8 ms at 16,128 tokens (tensorwise)."""
BASE_FLOAT8_UNITS = 35.0
"""The same for a frozen base in float8: every input and every gradient of an output is read in bfloat16 and written in
float8 once. Counted over a block's layers that read video or text tokens."""
NATIVE_UNITS = 26.0
"""The same for `float8.recipe = "native"`, fitted to the rows of two H200s; counted are 30: 67 to quantize and
transpose, of which 37 replace GELU, sums of biases' gradients and of gradients of one input in bfloat16."""
NATIVE_WEIGHT_BYTES = 3.0
"""Bytes read and written per weight to quantize it, in the forward and again in the backward pass."""
NATIVE_EXACT = 1.2
"""Ratio of times of float8 matmuls with exact accumulation, its gradients of weights, and without (float8.jsonl)."""
CONTENTION = 0.9
"""Seconds that computation takes longer per second of FSDP2's collectives beside it: NCCL's kernels occupy
multiprocessors, caches and memory. Fitted to 48 layers on four H200s at 4,032, 8,064 and 16,128 tokens: all five rows
took 0.25 to 0.30 s longer without it, whatever the number of tokens."""
COPY_CONTENTION = 5.7
"""The same where copy engines move weights and gradients between GPUs, per second that one GPU's memory takes to read
as many bytes: 3.1 ms a block on two and on four H200s, however large the part of the other GPUs. Fitted to 24 and 48
layers at 4,032, 8,064 and 16,128 tokens."""
LAUNCHES = {1: 150, 2: 366}
"""Kernels of a compiled block by its streams, forward and backward; with two counted by `ltx-titan bench block`."""
LAUNCH_S = 4e-6
"""Shortest time from one kernel to the next in a CUDA graph: about 3 us of work and 1 us between them. It decides where
there are few tokens, as in audio alone: of a block with video, 126 tokens of audio take 0.7 to 1 ms."""
FORWARD_SHARE = 0.36
"""Share of the forward pass in the memory-bound traffic."""
HOST_CALL_S = 6e-3
"""Host time of one compiled block's forward, recomputation or backward pass; measured with `HOST_FSDP_S`."""
HOST_FSDP_S = 9e-3
"""Host time of FSDP2 per block and step. Both are derived from 21 ms per block at 4,032 tokens with selective
checkpointing, which is host-bound: two H100s, 12 layers, 2026-11-25."""
HOST_FLOAT8_S = 4e-3
"""Additional host time of a compiled pass with float8 matmuls: scales and casts are separate launches. From a
difference of 9 ms per block and step between bfloat16 and float8 at 4,032 tokens, both host-bound: two H100s,
2026-11-26."""
LORA_UNITS = 40.0
"""Traffic of adapters on all attention layers, in units as above. Chosen so that the LoRA rows of docs/benchmarks with
CUDA graphs lie on both sides of their predictions."""
EAGER_HOST_S = 11e-3
"""Host time of one pass of a block that is not compiled: a few hundred launches. Assumed."""
UPDATE_BYTES = {
    "adamw": 28.0,
    "adamw8bit": 16.125,
    "adamw4bit": 16.0,
    "adamw_schedulefree": 104.0,
    "prodigy": 164.0,
    "muon": 60.0,
    "adafactor": 24.0,
}
"""Bytes read and written per trained weight and update: weight, gradient and state, by every operation that is not
fused with another one."""
RECOMPUTED_LINEAR = {"selective": 10.5 / 16, "matmuls": 4.5 / 16, "all_matmuls": 0.0}
"""Share of a block's matmuls that a level of activation checkpointing recomputes. A video token is multiplied with 16
width x width matrices: 4 are the feed-forward's second matmul, which `selective` saves with three cross-modal ones of
1/2; `matmuls` leaves the feed-forward's first (4) and the output of one cross-modal attention (1/2)."""
NORM_BYTES, SCALE_BYTES = 4.0, 8.0
"""Bytes per trained weight of clipping: the norm reads every gradient, and scaling reads and writes it. AdamW's update
scales what it reads, with moments of 32 and of 8 bits, and updates in the backward pass do without both."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. The first six run one after the other on the GPU.

    Attributes:
        matmul, attention, memory_bound: computation of all blocks and micro-batches, recomputation included.
        fsdp_copies: copies into and out of the buffers of FSDP2's collectives; with static slots they are beside the
            computation.
        communication: collectives of tensor and context parallelism.
        outside: everything outside the blocks, and the optimizer.
        host: time that the GPU waits for launches, if the host is slower.
        exposed: time that FSDP2's collectives take beyond the computation that they overlap with.
        contention: time that computation takes longer because of collectives beside it.
        streaming: the same for copies of weights from host memory.
    """

    matmul: float
    attention: float
    memory_bound: float
    fsdp_copies: float
    communication: float
    outside: float
    host: float
    exposed: float
    contention: float
    streaming: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_time(work: Workload, setup: Setup, gpu: Gpu) -> StepTime:
    """Predicts the seconds of a step on samples with the workload's token counts, by component."""
    degrees, layers = setup.degrees, work.num_layers
    micro_batches = -(-work.global_batch_size // (setup.local_batch_size * degrees.dp))
    forward, backward = _compute(work, setup, gpu)
    again = _recomputed(work, setup, gpu)
    copies = 0.0 if setup.static_slots else _fsdp_copies(work, setup) / gpu.copy
    communication = _communication(work, setup, gpu)
    gather, reduce, replicate = _fsdp_traffic(work, setup, gpu)

    # A third of copies and collectives belongs to the forward pass: weights are gathered in both passes, gradients are
    # reduced in the backward pass, and each collective of tp and cp has one adjoint.
    busy_forward = sum(forward) + copies / 3 + communication / 3
    busy_backward = sum(backward) + sum(again) + copies * 2 / 3 + communication * 2 / 3
    # FSDP2 overlaps its collectives with the computation of the same pass; only the excess takes time.
    exposed = max(0.0, gather - busy_forward) + max(0.0, gather + reduce + replicate - busy_backward)
    gathering, reducing = _contention(work, setup, gpu)
    contention = 2 * gathering + reducing + _one_rank_copies(work, setup) / gpu.copy
    busy = busy_forward + busy_backward + exposed + contention
    # A CUDA graph is one launch; otherwise the device waits wherever the host is slower.
    host = 0.0 if setup.graphs else max(0.0, _host(setup) - busy)

    # The host launches everything, and copies run meanwhile: they overlap with whichever of the two is slower.
    slower = (busy + host) / busy
    streaming = sum(_exposed_copies(work, setup, gpu, part * slower) for part in (busy_forward, busy_backward))

    def all_blocks(seconds: float, forward_s: float) -> float:
        # The base's passes have a forward only.
        return micro_batches * layers * (work.passes * seconds + work.base_passes * forward_s)

    kinds = [
        all_blocks(forward_s + backward_s + again_s, forward_s)
        for forward_s, backward_s, again_s in zip(forward, backward, again, strict=True)
    ]
    return StepTime(
        matmul=kinds[0],
        attention=kinds[1],
        memory_bound=kinds[2],
        fsdp_copies=all_blocks(copies, copies / 3),
        communication=all_blocks(communication, communication / 3),
        outside=_outside(work, setup, gpu, micro_batches),
        host=all_blocks(host, host / 3),
        exposed=all_blocks(exposed, max(0.0, gather - busy_forward)),
        contention=all_blocks(contention, gathering),
        streaming=micro_batches * (work.passes + work.base_passes / 2) * streaming,
    )


def _exposed_copies(work: Workload, setup: Setup, gpu: Gpu, block_s: float) -> float:
    """Seconds that one pass over all blocks waits for copies of weights, if a block takes `block_s` without them."""
    if setup.stream_blocks == 0:
        return 0.0
    copied = work.num_layers - setup.stream_blocks
    # The first copy starts when the first block is done, and the last one ends before the last block starts.
    return max(0.0, copied * work.block.frozen_bytes / gpu.host_link - (work.num_layers - 2) * block_s)


def model_flops(work: Workload) -> float:
    """Model FLOPs of a step over all GPUs, the numerator of MFU."""

    def of(trained: Passes) -> float:
        return training_flops(
            work.architecture,
            video_tokens=work.video_tokens,
            audio_tokens=work.audio_tokens,
            text_tokens=work.text_tokens,
            batch=work.global_batch_size,
            num_layers=work.num_layers,
            trained=trained,
        )

    return work.passes * of(work.trained) + (work.base_passes * of("none") if work.base_passes else 0.0)


def _compute(work: Workload, setup: Setup, gpu: Gpu) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of one block and micro-batch on one rank: (matmul, attention, memory-bound), forward and backward."""
    share = setup.local_batch_size / (setup.degrees.cp * setup.degrees.tp)
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    flops = layer_flops(work.architecture, **counts, trained=work.trained)
    # Backward has one matmul for the input's gradient and, unless weights are frozen, one for the weight's.
    linear_forward = flops.linear / (3 if work.trained == "full" else 2)
    rate = gpu.matmul if setup.float8 == "none" and not setup.base_in_float8 else gpu.matmul_float8
    linear = (linear_forward * share / rate, (flops.linear - linear_forward) * share / rate)
    if setup.float8 == "native" and work.trained == "full":
        linear = (linear[0], linear[1] + (NATIVE_EXACT - 1) * linear[0])
    attention = (
        flops.attention / 3 * share / gpu.attention_forward,
        flops.attention * 2 / 3 * share / gpu.attention_backward,
    )
    units = MEMORY_BOUND_UNITS[setup.compile]
    if setup.float8 not in ("none", "native"):
        units += FLOAT8_UNITS
    if setup.float8 == "native":
        units += NATIVE_UNITS
    if setup.base_in_float8:
        units += BASE_FLOAT8_UNITS
    if work.trained == "lora":
        units += LORA_UNITS
    columns = work.video_tokens * work.video_width + work.audio_tokens * work.audio_width
    moved = units * columns * work.itemsize * share / gpu.copy
    # A quantized base is dequantized for every matmul: one byte read, one value of the compute dtype written. If it is
    # multiplied in float8, it is transposed in the backward pass: one byte read and one written.
    quantized = work.quantized / setup.degrees.tp / gpu.copy
    prepared = (0.0, 2 * quantized) if setup.base_in_float8 else ((1 + work.itemsize) * quantized,) * 2
    if setup.float8 == "native":
        gathered = work.block.gathered(setup.degrees.tp) / gpu.copy
        prepared = (NATIVE_WEIGHT_BYTES * gathered,) * 2
    memory = (moved * FORWARD_SHARE + prepared[0], moved * (1 - FORWARD_SHARE) + prepared[1])
    least = LAUNCH_S * LAUNCHES[(work.video_tokens > 0) + (work.audio_tokens > 0)]
    forward, backward = zip(linear, attention, memory, strict=True)
    return _at_least(least / 3, forward), _at_least(least * 2 / 3, backward)


def _at_least(seconds: float, parts: tuple[float, ...]) -> tuple[float, ...]:
    return *parts[:-1], parts[-1] + max(0.0, seconds - sum(parts))


def _recomputed(work: Workload, setup: Setup, gpu: Gpu) -> tuple[float, ...]:
    """Seconds of recomputation of an average block: matmul, attention, memory-bound."""
    once, _ = _compute(work, setup, gpu)
    parts: tuple[float, ...] = (0.0, 0.0, 0.0)
    for level, blocks in setup.level_shares().items():
        shares = _recomputed_shares(level, setup.degrees.tp)
        parts = tuple(part + blocks * share for part, share in zip(parts, shares, strict=True))
    return tuple(part * seconds for part, seconds in zip(parts, once, strict=True))


def _recomputed_shares(level: Level, tp: int) -> tuple[float, float, float]:
    """Shares of a block's matmuls, attention and memory-bound operations that a level recomputes."""
    if level == "none":
        return 0.0, 0.0, 0.0
    if level == "full":
        return 1.0, 1.0, 1.0
    # Under tensor parallelism the outputs of reduce-scatters are saved instead, which saves no matmul.
    return RECOMPUTED_LINEAR[level] if tp == 1 else 1.0, 0.0, 1.0


def _host(setup: Setup) -> float:
    """Host seconds of one block and micro-batch."""
    shares = setup.level_shares()
    # Selective recomputation is part of the compiled backward graph, so it adds no call.
    again = shares.get("full", 0.0) if setup.compile else 1 - shares.get("none", 0.0)
    call = HOST_CALL_S if setup.compile else EAGER_HOST_S
    return (2 + again) * (call + (HOST_FLOAT8_S if setup.float8 not in ("none", "native") else 0.0)) + HOST_FSDP_S


def _fsdp_copies(work: Workload, setup: Setup) -> float:
    """Bytes of one block: weights pass through the gather's buffer in both passes, gradients are cast to float32."""
    gathered = work.block.gathered(setup.degrees.tp, trained_only=not setup.gathers_frozen)
    trained = work.block.gathered(setup.degrees.tp, trained_only=True)
    return 2 * 2 * work.itemsize * gathered + (work.itemsize + 4) * trained


def _one_rank_copies(work: Workload, setup: Setup) -> float:
    """Bytes of one block that FSDP2 moves on one rank beside the computation, which waits for memory meanwhile.

    Trained weights are cast or copied into the slots in both passes, and gradients to the dtype of their sums.
    """
    if setup.fsdp > 1 or not setup.static_slots:
        return 0.0
    count, stored = work.block.sharded(setup.degrees, trained_only=True)
    has_replicas = setup.degrees.dp_replicate > 1
    reduced = 4 if has_replicas or stored != work.itemsize * count else work.itemsize
    copied = 4 * reduced if has_replicas else 0  # FSDP2 divides gradients, and copies them, before replicas add theirs
    return 2 * (stored + work.itemsize * count) + (work.itemsize + reduced + copied) * count


def _contention(work: Workload, setup: Setup, gpu: Gpu) -> tuple[float, float]:
    """Seconds by which an all-gather of one block, and all that happens to its gradients, slow down the computation."""
    gather, reduce, replicate = _fsdp_traffic(work, setup, gpu)
    if not setup.copy_engines:
        return CONTENTION * gather, CONTENTION * (reduce + replicate)
    gathered, trained = (
        work.itemsize * work.block.gathered(setup.degrees.tp, trained_only=only) / gpu.copy for only in (False, True)
    )
    reducing = COPY_CONTENTION * trained if setup.exchanges_gradients else CONTENTION * reduce
    return COPY_CONTENTION * gathered, reducing + CONTENTION * replicate


def _fsdp_traffic(work: Workload, setup: Setup, gpu: Gpu) -> tuple[float, float, float]:
    """Seconds of one block's all-gather, reduce-scatter, and all-reduce over replicas."""
    degrees, ranks = setup.degrees, setup.fsdp
    gathered = work.block.gathered(degrees.tp)
    trained = work.block.gathered(degrees.tp, trained_only=True)
    itemsize = 1 if setup.float8_all_gather else work.itemsize
    bandwidth = bus_bandwidth(gpu, degrees.tp, ranks)
    others = (ranks - 1) / ranks  # each rank has its own part already
    latency = ring_latency(gpu, degrees.tp, ranks)
    gather = others * itemsize * gathered / bandwidth + latency
    reduced_itemsize = work.itemsize if setup.exchanges_gradients else 4  # float32
    reduce = others * reduced_itemsize * trained / bandwidth + latency
    copies = degrees.dp_replicate
    between = bus_bandwidth(gpu, degrees.tp * ranks, copies)
    # A ring all-reduce sends every byte twice, once to reduce and once to gather.
    replicate = 2 * (copies - 1) / copies * 4 * trained / ranks / between
    return gather, reduce, replicate + 2 * ring_latency(gpu, degrees.tp * ranks, copies)


def _communication(work: Workload, setup: Setup, gpu: Gpu) -> float:
    """Seconds of one block's collectives of tensor and context parallelism, which are not overlapped."""
    tp, cp = setup.degrees.tp, setup.degrees.cp
    both = work.video_tokens > 0 and work.audio_tokens > 0
    batch, size = setup.local_batch_size, work.itemsize
    shares = setup.level_shares()
    whole = shares.get("full", 0.0)
    partly = 1 - whole - shares.get("none", 0.0)
    seconds = 0.0
    if tp > 1:
        columns = (work.video_tokens / cp * work.video_width + work.audio_tokens * work.audio_width) * batch
        # Tokens are all-gathered before self-attention, text attention and feed-forward (and as queries and keys of
        # both cross-modal attentions) and reduce-scattered after each; backward has the adjoint of each.
        gathers, scatters = (5.0, 4.0) if both else (3.0, 3.0)
        once = gathers + scatters
        # Selective checkpointing saves the outputs of reduce-scatters.
        again = once * whole + gathers * partly
        seconds += (2 * once + again) * columns * size * (tp - 1) / tp / bus_bandwidth(gpu, 1, tp)
    if cp > 1:
        # All-to-all of queries, keys, values and outputs of self-attention, and of the video's keys and values that
        # audio attends to.
        widths = 4 * work.video_width
        if both:
            widths += 2 * work.audio_width
        columns = work.video_tokens / cp / tp * batch * widths
        passes = 2 + whole + partly
        seconds += passes * columns * size * (cp - 1) / cp / bus_bandwidth(gpu, tp, cp)
    return seconds


def _outside(work: Workload, setup: Setup, gpu: Gpu, micro_batches: int) -> float:
    """Seconds of embeddings, output heads, gradient norm and optimizer."""
    counts = {"video_tokens": work.video_tokens, "audio_tokens": work.audio_tokens, "text_tokens": work.text_tokens}
    share = setup.local_batch_size / (setup.degrees.cp * setup.degrees.tp)
    flops = outside_flops(work.architecture, **counts, trained=work.trained).total * share
    columns = work.video_tokens * work.video_width + work.audio_tokens * work.audio_width
    # RoPE tables, input, norm and modulation run uncompiled in float32: about 10 x the bytes saved of them (OUTSIDE).
    moved = 75 * columns * work.itemsize * share
    gathered, trained = (work.outside.gathered(setup.degrees.tp, trained_only=only) for only in (False, True))
    seconds = micro_batches * (flops / gpu.matmul + moved / gpu.copy)
    bandwidth = bus_bandwidth(gpu, setup.degrees.tp, setup.fsdp)
    others = (setup.fsdp - 1) / setup.fsdp
    seconds += micro_batches * others * (work.itemsize * gathered + 4 * trained) / bandwidth
    # A forward pass is about a third of a pass.
    seconds *= work.passes + work.base_passes / 3
    updated = sum(_trained_shards(work, setup))
    bytes_per_weight = UPDATE_BYTES[work.optimizer] + (12.0 if work.ema else 0.0)
    bytes_per_weight += 0.0 if work.in_backward else NORM_BYTES
    bytes_per_weight += 0.0 if work.in_backward or work.optimizer in ("adamw", "adamw8bit") else SCALE_BYTES
    return seconds + updated * bytes_per_weight / gpu.copy


def _trained_shards(work: Workload, setup: Setup) -> Iterable[int]:
    yield work.num_layers * work.block.sharded(setup.degrees, trained_only=True)[0]
    yield work.outside.sharded(setup.degrees, trained_only=True)[0]
