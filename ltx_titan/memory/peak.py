"""Predicts the peak memory of a training step on the fullest GPU, from the tensors alive at two moments.

    start of backward   all saved activations, no gradients yet
    end of backward     all gradients, the activations of one block

In between, each block frees its activations and adds its gradients, so the peak is at one of the ends. Weights,
optimizer state, one block's working set and FSDP2's buffers are alive at both. The result counts bytes held by tensors,
as `peak_mem_gib` in metrics.jsonl does; `RESERVE` and `SLACK` add what the driver and the allocator take.

Activations are counted in units: one value of the compute dtype per token and column of the stream's residual.
"""

from collections import Counter
from dataclasses import dataclass

from ltx_titan.common.hardware import GIB
from ltx_titan.memory.workload import Setup, Workload
from ltx_titan.optim.build import STATE_BYTES
from ltx_titan.parallel.activation_checkpoint import Level

RESERVE = 2.5 * GIB
"""Bytes of the CUDA context, NCCL buffers and cuBLAS workspaces. Assumed."""
SLACK = 1.04
"""Ratio of memory reserved by the allocator to memory held by tensors, with expandable segments. Assumed."""


@dataclass(frozen=True)
class SavedUnits:
    """Activations that autograd saves of one block, in units per token.

    Attributes:
        own: self-attention, text cross-attention and feed-forward of a stream.
        video_cross, audio_cross: a stream's part of the cross-modal attentions.
        own_timestep, cross_timestep: additional units of both if the tokens of a sample have two timesteps.
        text: keys, values and modulated text of a text cross-attention, per text token.
    """

    own: float
    video_cross: float
    audio_cross: float
    own_timestep: float
    cross_timestep: float
    text: float


# Counted with saved-tensor hooks on blocks of these proportions; tests/estimate/test_prediction.py repeats it. For
# compiled blocks the min-cut partitioner of AOTAutograd decides what is saved. Compiled LoRA is fitted to 48 blocks on
# an H200: packed adapters save less than the 20.7 that were counted before. (is compiled, trained) -> units.
SAVED = {
    (False, "full"): SavedUnits(49.1, 18.6, 25.1, 12.0, 4.0, 9.0),
    (True, "full"): SavedUnits(18.1, 6.0, 8.2, 13.0, 5.0, 2.0),
    (False, "lora"): SavedUnits(26.3, 10.7, 15.4, 12.0, 4.0, 5.1),
    (True, "lora"): SavedUnits(18.0, 6.3, 10.2, 10.0, 4.0, 4.1),
}
NATIVE_SAVED = 3.8
"""Additional units of `float8.recipe = "native"` at level `none`: 2.75 and 5.6 GiB of 24 blocks on two H200s at 4,032
and 8,064 tokens. With recomputation there are none."""
KERNELS_TIMESTEP = 0.6
"""Units for a second timestep with the fused kernels: a block grew by 1.16 instead of 1.14 GiB (bench block, H100)."""
SELECTIVE = {1: SavedUnits(4.0, 2.0, 1.0, 0.0, 0.0, 0.0), 2: SavedUnits(6.0, 1.5, 2.0, 0.0, 0.0, 0.0)}
"""Units under selective checkpointing, compiled: the block's input and attention outputs; without tensor parallelism
(key 1, counted) also the outputs of matmuls that narrow (feed-forward, cross-modal); with it (key 2, computed by hand)
the outputs of reduce-scatters instead."""
MATMULS = SavedUnits(10.0, 2.0, 5.0, 0.0, 0.0, 2.0)
"""Units under `budget` at level `matmuls`: `SELECTIVE` and the outputs of matmuls that do not widen; counted."""
ALL_MATMULS = SavedUnits(14.0, 3.0, 5.0, 0.0, 0.0, 2.0)
"""At level `all_matmuls`: also of those that widen; counted."""
_LEVEL_UNITS = {"full": SavedUnits(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), "matmuls": MATMULS, "all_matmuls": ALL_MATMULS}
TRANSIENT = {False: 20.0, True: 10.0}
"""Units of gradients and temporaries within a block's backward pass. They peak in the feed-forward: two tensors of
4 x width, its input and its output; in float32 if blocks are not compiled."""
OUTSIDE = 7.5
"""Units saved outside the blocks, counted like `SAVED`: RoPE cos/sin tables in float32 (3 units), and the output head,
whose norm is in float32; 2 units less with one timestep."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU by purpose.

    Attributes:
        parameters: shards.
        optimizer: state, and the moving average of the weights if there is one.
        gradients: shards, at the end of the backward pass.
        connectors: shards of resident text connectors.
        activations: saved by the forward pass.
        working_set: one block's recomputed activations and temporaries.
        buffers: gathered weights and unsharded gradients.
        start_of_backward, end_of_backward: sums at these moments.
        apart: gradients that cannot use the memory that activations free.
    """

    parameters: float
    optimizer: float
    gradients: float
    connectors: float
    activations: float
    working_set: float
    buffers: float
    start_of_backward: float
    end_of_backward: float
    apart: float

    @property
    def peak(self) -> float:
        """Largest number of bytes held by tensors."""
        return max(self.start_of_backward, self.end_of_backward)

    @property
    def needed(self) -> float:
        """Memory that a GPU must have."""
        return max(self.start_of_backward * SLACK + self.apart, self.end_of_backward * SLACK) + RESERVE


def estimate_memory(work: Workload, setup: Setup) -> Memory:
    """Predicts the bytes of a step on the largest sample, by purpose and at both candidates for the peak."""
    parts = _states(work, setup)
    saved, one_block = _activations(work, setup)
    temporary = _units_to_bytes(work, setup, TRANSIENT[setup.compile])
    outside = _units_to_bytes(work, setup, OUTSIDE)
    buffers = _buffers(work, setup)
    states = parts["parameters"] + parts["optimizer"] + parts["connectors"]
    shard = _gradient_shard(work, setup)  # of one block
    all_shards = parts["gradients"]
    if _micro_batches(work, setup) > 1:
        # Accumulated gradients are there from the second micro-batch on, so the backward pass adds none.
        states += all_shards
        shard = all_shards = 0.0
    resident = states + buffers.outside + buffers.block + outside
    recomputed = 0.0 if setup.recompute == "none" else one_block

    # During a block's backward pass: its activations, and the gradients of the block before, which are being reduced.
    # At its end: its own gradients, in the compute dtype, as the input of the reduce-scatter and as its output.
    activations_peak = one_block + temporary + buffers.reducing
    gradients_peak = buffers.gradients + buffers.reducing + buffers.reduced
    prefetched = buffers.prefetched
    if setup.static_slots:
        # Both slots are there all the time. Gradients are kept until the next block's are, because the reduce-scatter's
        # stream copies them.
        resident += prefetched
        prefetched = 0.0
        activations_peak += buffers.gradients
        gradients_peak += buffers.gradients
    block_peak = max(activations_peak, gradients_peak)
    # The backward pass runs from the last block to the first. In the last one no gradients are being reduced yet.
    last = saved + recomputed + temporary + prefetched
    second_last = saved + shard
    if work.num_layers > 2:
        second_last += prefetched
    if setup.recompute == "none":
        # `saved` still counts the last block, which is free by now, and this one, which the peaks count as well.
        second_last += max(activations_peak - 2 * one_block, gradients_peak - 2 * one_block, 0.0)
    else:
        second_last += block_peak
    # The first block of the model is the last to run: FSDP2 has nothing left to prefetch.
    second = prefetched + max(work.num_layers - 2, 0) * shard + block_peak
    first = (work.num_layers - 1) * shard + block_peak
    root = states + buffers.outside + all_shards + buffers.outside_gradients
    if setup.static_slots:
        root += buffers.block + buffers.prefetched
    return Memory(
        **parts,
        activations=saved + outside,
        working_set=recomputed + temporary,
        buffers=buffers.outside + buffers.block + buffers.prefetched + buffers.reducing,
        start_of_backward=resident + max(last, second_last),
        end_of_backward=max(resident + max(first, second), root),
        # FSDP2 allocates gradient shards on a stream of its own, and the allocator keeps the memory of streams apart.
        # Short of memory it gives free blocks back to the device, which takes time and is impossible in a CUDA graph's
        # pool. Accumulated gradients are there from the start.
        # Exchanged gradients are allocated where activations are freed.
        apart=all_shards if (setup.graphs or setup.recompute == "budget") and not setup.exchanges_gradients else 0.0,
    )


def saved_per_block(work: Workload, setup: Setup, level: Level) -> float:
    """Bytes that autograd saves of one block.

    Args:
        work: the workload.
        setup: the setup; its activation checkpointing is not read.
        level: what the block saves.
    """
    video, audio = _tokens(work, setup)
    both = work.video_tokens > 0 and work.audio_tokens > 0
    gathered = 0.0
    if level == "selective":
        units = SELECTIVE[min(setup.degrees.tp, 2)]
    elif level != "none":
        units = _LEVEL_UNITS[level]
    else:
        units = SAVED[setup.compile, work.trained]
        if setup.degrees.tp > 1:
            # Inputs of column-wise matmuls are saved after the all-gather: the tokens of all tp ranks.
            gathered = (5.0 if both else 3.0) * setup.degrees.tp
    own = units.own
    if setup.float8 == "native" and work.trained == "full" and level == "none":
        own += NATIVE_SAVED
    if work.trained == "lora" and level not in ("full", "none"):
        # The feed-forward's output is saved for the gradient of its gate, which is frozen (`SAVED` was counted so).
        own -= 1.0
    per_video = per_audio = own + gathered
    timestep = units.own_timestep
    if both:
        per_video += units.video_cross
        per_audio += units.audio_cross
        timestep += units.cross_timestep
    if setup.kernels:
        timestep = min(timestep, KERNELS_TIMESTEP)
    if work.video_timesteps > 1:
        per_video += timestep
    if work.audio_timesteps > 1:
        per_audio += timestep
    values = video * per_video * work.video_width + audio * per_audio * work.audio_width
    # Every rank holds the whole text, but keys and values only of its heads.
    text_width = work.video_width if work.video_tokens > 0 else 0
    if work.audio_tokens > 0:
        text_width += work.audio_width
    values += setup.local_batch_size * work.text_tokens * units.text * text_width / setup.degrees.tp
    return values * work.itemsize


def _activations(work: Workload, setup: Setup) -> tuple[float, float]:
    """Bytes saved by all blocks at the start of the backward pass, and by one block without checkpointing."""
    everything = saved_per_block(work, setup, "none")
    if setup.recompute == "none":
        return work.num_layers * everything, everything
    if setup.recompute == "budget":
        return saved_by_levels(work, setup), everything
    video, audio = _tokens(work, setup)
    inputs = (video * work.video_width + audio * work.audio_width) * work.itemsize
    if setup.recompute == "every_k":
        recomputed = -(-work.num_layers // setup.k)
        on_device = 0.0 if setup.offload_activations else recomputed * inputs
        return on_device + (work.num_layers - recomputed) * everything, everything
    if setup.offload_activations:
        # The inputs of two blocks are on the device: one in use, one being copied.
        return 2 * inputs, everything
    return work.num_layers * saved_per_block(work, setup, setup.recompute), everything


def saved_by_levels(work: Workload, setup: Setup) -> float:
    """Bytes that autograd saves of all blocks under `budget`, at the setup's levels."""
    # Without this, a setup that nobody chose levels for would need no memory at all.
    assert len(setup.levels) == work.num_layers, f"budget: {len(setup.levels)} levels for {work.num_layers} blocks"
    counts = Counter(setup.levels)
    return sum(count * saved_per_block(work, setup, level) for level, count in counts.items())


def _states(work: Workload, setup: Setup) -> dict[str, float]:
    trained, trained_size = _sharded(work, setup, trained_only=True)
    state = STATE_BYTES[work.optimizer]
    ema = 4.0 if work.ema else 0.0  # float32
    optimizer = trained * (state + ema)
    if work.offload_state:
        # The state of two blocks is on the device: one being updated, one being copied.
        block = work.block.sharded(setup.degrees, trained_only=True)[0]
        optimizer = trained * ema + 2 * block * state
    on_device = 0.0 if setup.cpu_offload else 1.0
    return {
        "parameters": _parameters(work, setup) * on_device,
        "optimizer": optimizer * on_device,
        # In the parameter's dtype; with in_backward each is used and freed at once.
        "gradients": 0.0 if work.in_backward else trained_size * on_device,
        "connectors": 2.0 * work.connectors / setup.fsdp,  # bfloat16
    }


def _parameters(work: Workload, setup: Setup) -> float:
    if setup.stream_blocks == 0:
        return _sharded(work, setup, trained_only=False)[1]
    adapters = work.block.sharded(setup.degrees, trained_only=True)[1]
    # Every rank has slots of its own.
    slots = setup.stream_blocks * work.block.frozen_bytes
    return work.num_layers * adapters + slots + work.outside.sharded(setup.degrees)[1]


def pinned_bytes(work: Workload, setup: Setup) -> float:
    """Host memory of all ranks for streamed weights."""
    return work.num_layers * work.block.frozen_bytes * setup.gpus if setup.stream_blocks else 0.0


def _sharded(work: Workload, setup: Setup, *, trained_only: bool) -> tuple[int, int]:
    block = work.block.sharded(setup.degrees, trained_only=trained_only)
    outside = work.outside.sharded(setup.degrees, trained_only=trained_only)
    return work.num_layers * block[0] + outside[0], work.num_layers * block[1] + outside[1]


@dataclass(frozen=True)
class _Buffers:
    """Bytes of FSDP2's buffers.

    Attributes:
        outside: gathered weights outside the blocks, which stay gathered.
        block: gathered weights of the current block.
        prefetched: of the next block, being gathered.
        gradients: of a block, before their reduction, in the compute dtype.
        reducing: the same, being reduced; FSDP2 waits for them at the end of the next block's backward pass.
        reduced: shards of the sums, until they are stored in the dtype of the weights or, with `in_backward`, used.
        outside_gradients: all three, of the weights outside the blocks.
    """

    outside: float
    block: float
    prefetched: float
    gradients: float
    reducing: float
    reduced: float
    outside_gradients: float


def _buffers(work: Workload, setup: Setup) -> _Buffers:
    tp, size = setup.degrees.tp, work.itemsize
    trained, trained_outside = (weights.gathered(tp, trained_only=True) for weights in (work.block, work.outside))
    block, outside = size * trained, size * trained_outside
    if setup.gathers_frozen:
        block, outside = (size * weights.gathered(tp) for weights in (work.block, work.outside))
    if setup.stream_blocks:
        block = size * trained
    shards = [weights.sharded(setup.degrees, trained_only=True) for weights in (work.block, work.outside)]
    is_compute_dtype = all(shard == size * count for count, shard in shards)
    # As in `apply_fsdp`.
    reduce_size = size if setup.fsdp * setup.degrees.dp_replicate == 1 and is_compute_dtype else 4.0
    reduced, reduced_outside = (
        (0.0 if shard == reduce_size * count else reduce_size * count) + (shard if work.in_backward else 0.0)
        for count, shard in shards
    )
    return _Buffers(
        outside=outside,
        block=block,
        prefetched=block / size if setup.float8_all_gather else block,  # float8: one byte per weight
        gradients=size * trained,
        reducing=reduce_size * trained,
        reduced=reduced,
        outside_gradients=(size + reduce_size) * trained_outside + reduced_outside,
    )


def _gradient_shard(work: Workload, setup: Setup) -> float:
    if work.in_backward or setup.cpu_offload:
        return 0.0
    return work.block.sharded(setup.degrees, trained_only=True)[1]


def _tokens(work: Workload, setup: Setup) -> tuple[float, float]:
    """Video and audio tokens of the largest micro-batch on one rank: tp shards both, cp only video."""
    video, audio = work.largest
    degrees = setup.degrees
    return (
        setup.local_batch_size * video / (degrees.cp * degrees.tp),
        setup.local_batch_size * audio / degrees.tp,
    )


def _units_to_bytes(work: Workload, setup: Setup, units: float) -> float:
    video, audio = _tokens(work, setup)
    return (video * work.video_width + audio * work.audio_width) * units * work.itemsize


def _micro_batches(work: Workload, setup: Setup) -> int:
    return -(-work.global_batch_size // (setup.local_batch_size * setup.degrees.dp))
